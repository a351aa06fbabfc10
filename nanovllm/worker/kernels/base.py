"""The maths of a decoder layer but for attention, as a seam: plain torch, or fused Triton on CUDA.

One object, chosen once at start (`select`) and handed to every layer.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from nanovllm.worker.layers.linear import Linear


class Weighed(NamedTuple):
    """An RMS norm but for its scale, which belongs to the token and may follow the next product."""

    values: Tensor  # [num_tokens, hidden_size]: the stream times the norm's weight
    squares: Tensor  # [num_tokens, num_parts] fp32, whose sums are those of the stream's squares


class Stream(NamedTuple):
    """The residual stream of the decoder."""

    hidden: Tensor  # [num_tokens, hidden_size]
    weighed: Weighed | None = None  # for the norm that comes next, if who added to it did so


class Kernels(Protocol):
    """What layers ask for besides attention.

    Products with what surrounds them are one call each, so that a device may fuse them.
    """

    def rms_norm(self, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        """hidden: [num_tokens, hidden_size], kept. Mean square in fp32 (Zhang & Sennrich 2019)."""

    def norm_linear(self, stream: Stream, weight: Tensor, eps: float, linear: Linear) -> Tensor:
        """linear(rms_norm(stream)), new memory; stream is kept."""

    def linear_add(
        self, hidden: Tensor, linear: Linear, stream: Tensor, next_norm: Tensor
    ) -> Stream:
        """stream + linear(hidden), perhaps written over stream. next_norm: the weight of the norm
        that comes next, by which the result may be `Weighed`."""

    def mlp(
        self,
        stream: Stream,
        weight: Tensor,
        eps: float,
        gate_up: Linear,
        down: Linear,
        next_norm: Tensor,
    ) -> Stream:
        """stream + down(silu(gate) * up), as `linear_add`.

        gate and up: the halves of gate_up(rms_norm(stream)).
        """

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

        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], perhaps of no query heads,
        and lines may lie apart; cos_sin: [max_positions, head_dim] fp32, cosines then sines;
        layer_cache as in `AttentionBackend.forward`. Returns the queries, [num_tokens, num_heads,
        head_dim], in the memory of qkv; there, too, lie keys and values, as whoever reads them
        from the cache finds them.
        """


class QKNorm(Protocol):
    """Per-head RMS norms of queries and keys (Qwen3)."""

    q_weight: Tensor  # [head_dim]
    k_weight: Tensor  # [head_dim]
    eps: float
