"""The elementwise maths of a decoder, as a seam: plain torch here, fused Triton on CUDA.

One object, chosen once at start and handed to every layer. Each method may write its result over
its first argument; callers use only what is returned.
"""

from typing import Protocol

from torch import Tensor


class Kernels(Protocol):
    """What layers ask for besides matrix products and attention."""

    def rms_norm(self, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        """hidden, result: [num_tokens, hidden_size]; mean square in fp32 (Zhang & Sennrich 2019)."""

    def add_rms_norm(
        self, hidden: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """residual += hidden, then its norm. Returns (normed, residual)."""

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up: [num_tokens, 2 * intermediate], gate first. Returns silu(gate) * up."""

    def rope_and_cache(
        self,
        qkv: Tensor,
        *,
        cos_sin: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        layer_cache: Tensor,
        qk_norm: "QKNorm | None",
    ) -> Tensor:
        """Split, (QK-)norm, rotate (neox halves), and write keys and values to their slots.

        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]; cos_sin: [max_positions,
        head_dim] fp32, cosines then sines; layer_cache as in `AttentionBackend.forward`. Returns
        the queries, [num_tokens, num_heads, head_dim].
        """


class QKNorm(Protocol):
    """Per-head RMS norms of queries and keys (Qwen3)."""

    q_weight: Tensor  # [head_dim]
    k_weight: Tensor  # [head_dim]
    eps: float
