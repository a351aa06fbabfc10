"""The attention seam: four members per backend, one table, one choice made at start.

One maths serves decode, chunks and mixed batches, because every layer writes the step's own keys
and values to the paged cache first. A backend may do that itself, in its own kernel, for each row
when its turn comes if no other reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nanovllm.checkpoint.spec import Attention
from nanovllm.worker.forward_batch import ForwardBatch
from nanovllm.worker.kernels.base import Kernels, QKNorm


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What layers of one kind ask of attention; head counts are those of this rank.

    softcap and sinks: as in `checkpoint.spec.Attention`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    block_size: int
    sliding_window: int | None
    dtype: torch.dtype
    device: torch.device
    kv_dtype: torch.dtype | None = None  # of the cache; None: as `dtype`
    softcap: float | None = None
    sinks: bool = False

    @property
    def cache_dtype(self) -> torch.dtype:
        """What keys and values are stored as; FP8 is read as it stands, with a scale of 1."""
        return self.kv_dtype or self.dtype

    @property
    def block_shape(self) -> tuple[int, int, int]:
        """Of keys, or of values, in one layer."""
        return self.block_size, self.num_kv_heads, self.head_dim

    @property
    def bytes_per_block(self) -> int:
        """Of keys and values of `block_size` tokens, in one layer."""
        values = 2 * self.block_size * self.num_kv_heads * self.head_dim
        return values * self.cache_dtype.itemsize


@dataclass(frozen=True, slots=True)
class Rotary:
    """What a layer does between its qkv product and attention."""

    kernels: Kernels
    cos_sin: Tensor  # [max_positions, head_dim] fp32
    qk_norm: QKNorm | None

    def apply(self, qkv: Tensor, batch: ForwardBatch, layer_cache: Tensor) -> Tensor:
        """Rotate, cache keys and values, and return the queries (`Kernels.rope_and_cache`)."""
        return self.kernels.rope_and_cache(
            qkv,
            cos_sin=self.cos_sin,
            positions=batch.positions,
            slot_mapping=batch.slot_mapping,
            layer_cache=layer_cache,
            qk_norm=self.qk_norm,
        )


class AttentionBackend(Protocol):
    """Causal paged attention with grouped queries (Dao et al. 2022; Kwon et al. 2023).

    shares_prefix: whether it makes use of a batch's `prefix`, which is else not looked for.
    is_capturable: whether it asks the host nothing, so that graphs can hold it.
    most_at_once: in steps of up to so many tokens it may read a row's earlier keys before those of
    other rows are written (`ForwardBatch.reads_new`); 0 if never.
    """

    shares_prefix: bool
    is_capturable: bool
    most_at_once: int

    @staticmethod
    def unsupported(spec: AttentionSpec) -> str | None:
        """Why this backend cannot serve `spec`, or None if it can."""

    @staticmethod
    def kv_shape(spec: AttentionSpec, *, num_layers: int, num_blocks: int) -> tuple[int, ...]:
        """Shape of the whole cache: [2, layers, blocks, block_size, kv_heads, head_dim]."""

    def prepare(self, batch: ForwardBatch) -> None:
        """Once per step, before any layer: what all layers share. Graphs hold it, too."""

    def forward(
        self,
        qkv: Tensor,
        rotary: Rotary,
        layer_cache: Tensor,
        batch: ForwardBatch,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Rotate and cache (by `rotary.apply`, or as it would), then attend. Capturable.

        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], perhaps overwritten;
        layer_cache: [2, num_blocks, block_size, num_kv_heads, head_dim], keys then values; sinks:
        [num_heads] fp32, the layer's, if `AttentionSpec.sinks`. Returns [num_tokens, num_heads,
        head_dim].
        """


class ModelAttention:
    """The backends of a model, one for each kind of attention that its layers have."""

    def __init__(
        self,
        specs: Mapping[Attention, AttentionSpec],
        backends: Mapping[Attention, AttentionBackend],
    ) -> None:
        self._backends = backends
        self._specs = specs
        self.is_capturable = all(backend.is_capturable for backend in backends.values())
        self.shares_prefix = all(backend.shares_prefix for backend in backends.values())
        self.most_at_once = max(backend.most_at_once for backend in backends.values())

    def of(self, attention: Attention) -> AttentionBackend:
        """The backend of layers of that kind."""
        return self._backends[attention]

    def prepare(self, batch: ForwardBatch) -> None:
        """Once per step, before any layer."""
        for backend in self._backends.values():
            backend.prepare(batch)

    def spec_of(self, attention: Attention) -> AttentionSpec:
        return self._specs[attention]

    @property
    def spec(self) -> AttentionSpec:
        """Of any kind of layer: in device, precision and bytes of a block they are all alike."""
        return next(iter(self._specs.values()))

    def kv_shape(self, *, num_layers: int, num_blocks: int) -> tuple[int, ...]:
        """Shape of the whole cache: [2, layers, blocks, block_size, kv_heads, head_dim]."""
        backend = next(iter(self._backends.values()))
        return backend.kv_shape(self.spec, num_layers=num_layers, num_blocks=num_blocks)

    def __str__(self) -> str:
        return ", ".join(dict.fromkeys(type(one).__name__ for one in self._backends.values()))
