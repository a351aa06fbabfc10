"""The attention seam: four members per backend, one table, one choice made at start.

One maths serves decode, chunks and mixed batches, because every layer writes the step's own keys
and values to the paged cache first. A backend may do that itself, in its own kernel.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nanovllm.worker.forward_batch import ForwardBatch
from nanovllm.worker.layers.rotary import Rotary


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What the model asks of attention; head counts are those of this rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    block_size: int
    sliding_window: int | None
    dtype: torch.dtype
    device: torch.device
    kv_dtype: torch.dtype | None = None  # of the cache; None: as `dtype`

    @property
    def cache_dtype(self) -> torch.dtype:
        """What keys and values are stored as; FP8 is read as it stands, with a scale of 1."""
        return self.kv_dtype or self.dtype


class AttentionBackend(Protocol):
    """Causal paged attention with grouped queries (Dao et al. 2022; Kwon et al. 2023).

    shares_prefix: whether it makes use of a batch's `prefix`, which is else not looked for.
    """

    shares_prefix: bool

    @staticmethod
    def unsupported(spec: AttentionSpec) -> str | None:
        """Why this backend cannot serve `spec`, or None if it can."""

    @staticmethod
    def kv_shape(spec: AttentionSpec, *, num_layers: int, num_blocks: int) -> tuple[int, ...]:
        """Shape of the whole cache: [2, layers, blocks, block_size, kv_heads, head_dim]."""

    def prepare(self, batch: ForwardBatch) -> None:
        """Once per step, before any layer and outside any CUDA graph."""

    def forward(
        self, qkv: Tensor, rotary: Rotary, layer_cache: Tensor, batch: ForwardBatch
    ) -> Tensor:
        """Rotate and cache (by `rotary.apply`, or as it would), then attend. Capturable.

        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], perhaps overwritten;
        layer_cache: [2, num_blocks, block_size, num_kv_heads, head_dim], keys then values. Returns
        [num_tokens, num_heads, head_dim].
        """
