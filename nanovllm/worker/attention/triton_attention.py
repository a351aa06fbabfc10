"""Paged attention in Triton (`base.AttentionBackend`): the kernels' tuning, scratch and launches.

`prepare` lists on the device what the step's kernels will do, so it and `forward` never ask the
host anything and can be captured. Grids depend on host integers of the batch alone; programs
without work end at once.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from nanovllm.worker.attention.base import AttentionSpec
from nanovllm.worker.attention.triton_attention_kernels import (
    decode_kernel,
    plan_kernel,
    prefill_kernel,
)
from nanovllm.worker.forward_batch import ForwardBatch
from nanovllm.worker.kernels.triton_launch import launch_options, num_multiprocessors, unusable

LOG2E = 1.4426950408889634
MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class Tuning:
    """Tile sizes: keys and queries (times grouped heads) per tile, pipeline stages, warps."""

    decode_keys: int = 64
    decode_stages: int = 4
    decode_warps: int = 4
    decode_swap: bool = False
    programs_per_sm: int = 3
    min_split: int = 256  # keys; half of it for rows of at most twice as many
    max_splits: int = 32  # of one row, however long
    queries: int = 128
    keys: int = 64
    stages: int = 3
    warps: int = 8


def tuning_for(head_dim: int) -> Tuning:
    """Measured on an H200 for 128 (benchmarks/gpu_kernels.py); the others fit in shared memory."""
    if head_dim > 128:
        return Tuning(decode_keys=32, keys=32, stages=2)
    return Tuning()


@dataclass(frozen=True, slots=True)
class Scratch:
    """Device memory between the kernels of one step, for up to a number of rows."""

    work: Tensor  # [rows * max_splits] int32
    num_work: Tensor  # [1] int32
    arrivals: Tensor  # [rows, num_kv_heads] int32, all zero between launches
    partial_out: Tensor  # [rows, num_heads, max_splits, padded head_dim] fp32
    partial_max: Tensor  # [rows, num_heads, max_splits] fp32
    partial_sum: Tensor  # likewise


class TritonAttention:
    """One per model: layers call it one after the other and share its scratch."""

    def __init__(self, spec: AttentionSpec, tuning: Tuning | None = None) -> None:
        reason = self.unsupported(spec)
        assert reason is None, reason
        assert spec.scale > 0
        self._spec = spec
        self._tuning = tuning or tuning_for(spec.head_dim)
        self._group = spec.num_heads // spec.num_kv_heads
        self._options = launch_options(spec.device)
        self._shape: dict[str, Any] = {
            "KV_HEADS": spec.num_kv_heads,
            "GROUP": self._group,
            "HEAD_DIM": spec.head_dim,
            "BLOCK_D": triton.next_power_of_2(spec.head_dim),
            "BLOCK_SIZE": spec.block_size,
            "WINDOW": spec.sliding_window or 0,
        }
        # Never freed: captured graphs hold addresses in here.
        self._scratch: dict[int, Scratch] = {}
        self._tile_rows: Tensor | None = None  # [number of query tiles] int32

    @staticmethod
    def unsupported(spec: AttentionSpec) -> str | None:
        """Why not, or None."""
        if spec.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"no Triton attention in {spec.dtype}"
        if spec.head_dim > MAX_HEAD_DIM:
            return f"head_dim {spec.head_dim} is over {MAX_HEAD_DIM}"
        return unusable(spec.device)

    @staticmethod
    def kv_shape(spec: AttentionSpec, *, num_layers: int, num_blocks: int) -> tuple[int, ...]:
        """[2, layers, blocks, block_size, kv_heads, head_dim]."""
        return 2, num_layers, num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim

    def prepare(self, batch: ForwardBatch) -> None:
        """List decode work and query tiles on the device; capturable, and asks the host nothing."""
        scratch, tuning = self._scratch_for(batch.num_rows), self._tuning
        plan_kernel[(1,)](
            batch.seq_lens,
            batch.query_start_loc,
            scratch.work,
            scratch.num_work,
            batch.num_rows,
            WINDOW=self._shape["WINDOW"],
            MIN_SPLIT=tuning.min_split,
            MAX_SPLITS=tuning.max_splits,
            BLOCK_N=tuning.decode_keys,
            BLOCK_ROWS=triton.next_power_of_2(batch.num_rows),
            num_warps=8,
            **self._options,
        )
        if batch.max_query_len > 1:
            rows = torch.arange(batch.num_rows, device=self._spec.device, dtype=torch.int32)
            starts = batch.query_start_loc[:-1] // self._tile_tokens + rows
            tiles = torch.arange(
                batch.num_tokens // self._tile_tokens + batch.num_rows,
                device=self._spec.device,
                dtype=torch.int32,
            )
            self._tile_rows = torch.searchsorted(starts, tiles, right=True, out_int32=True) - 1

    def forward(self, query: Tensor, layer_cache: Tensor, batch: ForwardBatch) -> Tensor:
        """Rows with one token are split over their keys, the others tiled over their queries."""
        spec = self._spec
        assert query.stride()[1:] == (spec.head_dim, 1) and layer_cache[0].is_contiguous()
        assert batch.block_tables.stride(1) == 1
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if batch.max_query_len > 1:
            self._prefill(query, layer_cache, batch, out)
        if batch.num_rows > 1 or batch.max_query_len == 1:
            self._decode(query, layer_cache, batch, out)
        return out

    @property
    def _tile_tokens(self) -> int:
        return self._tuning.queries // self._group

    def _prefill(
        self, query: Tensor, layer_cache: Tensor, batch: ForwardBatch, out: Tensor
    ) -> None:
        assert self._tile_rows is not None
        tuning = self._tuning
        prefill_kernel[(self._spec.num_kv_heads, len(self._tile_rows))](
            query,
            query.stride(0),
            layer_cache,
            layer_cache.stride(0),
            out,
            batch.block_tables,
            batch.block_tables.stride(0),
            batch.seq_lens,
            batch.query_start_loc,
            self._tile_rows,
            self._spec.scale * LOG2E,
            **self._shape,
            BLOCK_M=tuning.queries,
            BLOCK_N=tuning.keys,
            STAGES=tuning.stages,
            num_warps=tuning.warps,
            **self._options,
        )

    def _decode(self, query: Tensor, layer_cache: Tensor, batch: ForwardBatch, out: Tensor) -> None:
        scratch, tuning = self._scratch_for(batch.num_rows), self._tuning
        most = batch.num_rows * self._spec.num_kv_heads * tuning.max_splits
        resident = num_multiprocessors(self._spec.device) * tuning.programs_per_sm
        decode_kernel[(min(most, resident),)](
            query,
            query.stride(0),
            layer_cache,
            layer_cache.stride(0),
            out,
            scratch.partial_out,
            scratch.partial_max,
            scratch.partial_sum,
            scratch.arrivals,
            scratch.work,
            scratch.num_work,
            batch.block_tables,
            batch.block_tables.stride(0),
            batch.seq_lens,
            batch.query_start_loc,
            self._spec.scale * LOG2E,
            **self._shape,
            BLOCK_G=max(16, triton.next_power_of_2(self._group)),
            MIN_SPLIT=tuning.min_split,
            MAX_SPLITS=tuning.max_splits,
            BLOCK_N=tuning.decode_keys,
            STAGES=tuning.decode_stages,
            SWAP=tuning.decode_swap,
            num_warps=tuning.decode_warps,
            **self._options,
        )

    def _scratch_for(self, num_rows: int) -> Scratch:
        rows = triton.next_power_of_2(num_rows)
        if rows not in self._scratch:
            heads, splits = self._spec.num_heads, self._tuning.max_splits
            device, padded = self._spec.device, self._shape["BLOCK_D"]
            self._scratch[rows] = Scratch(
                work=torch.empty(rows * splits, dtype=torch.int32, device=device),
                num_work=torch.empty(1, dtype=torch.int32, device=device),
                arrivals=torch.zeros(
                    rows, self._spec.num_kv_heads, dtype=torch.int32, device=device
                ),
                partial_out=torch.empty(rows, heads, splits, padded, device=device),
                partial_max=torch.empty(rows, heads, splits, device=device),
                partial_sum=torch.empty(rows, heads, splits, device=device),
            )
        return self._scratch[rows]
