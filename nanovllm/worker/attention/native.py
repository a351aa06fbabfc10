"""Paged attention of CPUs in C++, which reads keys and values where they lie.

`models.native` runs whole steps by it without coming here; layer by layer it serves models and
precisions for which there is no such step.
"""

import ctypes

import torch
from torch import Tensor

from nanovllm.worker.attention.base import AttentionSpec, Rotary
from nanovllm.worker.forward_batch import ForwardBatch
from nanovllm.worker.kernels.native import library as native

CACHE_DTYPES = (torch.float32, torch.bfloat16)


class NativeAttention:
    """Implements `attention.base.AttentionBackend`."""

    shares_prefix = False
    is_capturable = False
    most_at_once = 0

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec

    def heads(self, sinks: Tensor | None) -> native.Heads:
        """As the kernels are told of them; valid as long as the sinks."""
        spec = self._spec
        return native.Heads(
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.sliding_window or 0,
            spec.scale,
            spec.softcap or 0.0,
            None if sinks is None else sinks.data_ptr(),
        )

    @staticmethod
    def unsupported(spec: AttentionSpec) -> str | None:
        if spec.device.type != "cpu":
            return "it is for CPUs"
        if spec.dtype == torch.float32:
            return "in float32 torch computes, so that ids are those of transformers"
        reason = native.unusable()
        if reason is not None:
            return reason
        if spec.cache_dtype not in CACHE_DTYPES:
            return f"it reads no cache of {spec.cache_dtype}"
        if spec.head_dim % native.BLOCK:
            return f"head_dim {spec.head_dim} is no multiple of {native.BLOCK}"
        return None

    @staticmethod
    def kv_shape(spec: AttentionSpec, *, num_layers: int, num_blocks: int) -> tuple[int, ...]:
        return 2, num_layers, num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim

    def prepare(self, batch: ForwardBatch) -> None:
        """Nothing: the kernel reads the batch as it is."""

    def forward(
        self,
        qkv: Tensor,
        rotary: Rotary,
        layer_cache: Tensor,
        batch: ForwardBatch,
        sinks: Tensor | None = None,
    ) -> Tensor:
        query = rotary.apply(qkv, batch, layer_cache).float().contiguous()
        # Tokens of padding belong to no row, and nobody writes their lines.
        output = torch.zeros_like(query)
        native.library().nv_attend(
            query.data_ptr(),
            query.stride(0),
            ctypes.byref(self.heads(sinks)),
            ctypes.byref(describe_cache(layer_cache)),
            ctypes.byref(describe_batch(batch)),
            output.data_ptr(),
        )
        return output.to(qkv.dtype)


def describe_cache(layer_cache: Tensor) -> native.Cache:
    """layer_cache: [2, num_blocks, block_size, num_kv_heads, head_dim], of one layer."""
    is_bf16 = layer_cache.dtype == torch.bfloat16
    block_size = layer_cache.shape[2]
    return native.Cache(layer_cache.data_ptr(), layer_cache.stride(0), is_bf16, block_size)


def describe_batch(batch: ForwardBatch) -> native.Batch:
    """Valid as long as the batch."""
    return native.Batch(
        batch.positions.data_ptr(),
        batch.slot_mapping.data_ptr(),
        batch.query_start_loc.data_ptr(),
        batch.block_tables.data_ptr(),
        batch.num_tokens,
        batch.num_rows,
        batch.block_tables.stride(0),
    )
