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
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.worker.attention.base import AttentionSpec
from nanovllm.worker.attention.triton_attention_kernels import (
    PLANNED_ROWS,
    RECORD,
    combine_kernel,
    decode_kernel,
    plan_kernel,
    prefill_kernel,
)
from nanovllm.worker.attention.triton_shared_prefix import (
    find_shared_kernel,
    shared_prefix_kernel,
)
from nanovllm.worker.forward_batch import ForwardBatch
from nanovllm.worker.kernels.triton_launch import (
    has_tensor_memory_accelerator,
    launch_options,
    num_multiprocessors,
    unusable,
)

LOG2E = 1.4426950408889634
MAX_HEAD_DIM = 256
MIN_SHARED_KEYS = 256  # shorter shared prefixes are not worth their launch
MIN_SHARING_ROWS = 4


@dataclass(frozen=True, slots=True)
class Tiling:
    """Keys per tile and how a kernel runs on them; `keys` must divide the block size for TMA.

    max_registers: 128 lets two programs of 8 warps share a multiprocessor, so that one's softmax
    hides behind the other's products.
    """

    keys: int
    stages: int
    warps: int
    tma: bool
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What Triton and the kernels take as keywords."""
        return {
            "BLOCK_N": self.keys,
            "TMA": self.tma,
            "num_stages": self.stages,
            "num_warps": self.warps,
            "maxnreg": self.max_registers,
        }


@dataclass(frozen=True, slots=True)
class Tuning:
    """How rows are cut up, and the tiles of both kernels."""

    decode: Tiling
    prefill: Tiling
    queries: int  # times grouped heads, in one tile of the prefill kernel
    programs_per_sm: int = 7
    min_split: int = 128  # keys; half as many for rows of up to twice that
    max_splits: int = 32  # of one row, however long
    prefix_splits: int = 16  # of the keys all rows share


def tuning_for(spec: AttentionSpec) -> Tuning:
    """Measured on an H200 with head_dim 128 (benchmarks/gpu_kernels.py)."""
    head_bytes = spec.head_dim * spec.cache_dtype.itemsize
    can_copy = (
        has_tensor_memory_accelerator(spec.device)
        and spec.head_dim == triton.next_power_of_2(spec.head_dim)
        and head_bytes >= 16
        and spec.num_kv_heads * head_bytes % 16 == 0
    )
    large = spec.head_dim > 128
    decode = Tiling(keys=32 if large else 64, stages=3, warps=4, tma=False)
    if can_copy and spec.block_size % 16 == 0:
        decode = Tiling(keys=16, stages=6, warps=1, tma=True)
    if large:
        prefill = Tiling(keys=32, stages=3, warps=8, tma=False)
    elif can_copy and spec.block_size % 64 == 0:
        prefill = Tiling(keys=64, stages=2, warps=8, tma=True, max_registers=128)
    else:
        prefill = Tiling(keys=64, stages=3, warps=8, tma=False, max_registers=128)
    return Tuning(decode, prefill, queries=128)


@dataclass(frozen=True, slots=True)
class Scratch:
    """Device memory between the kernels of one step, for up to a number of rows."""

    work: Tensor  # [rows * max_splits, RECORD] int32
    num_work: Tensor  # [1] int32
    shared: Tensor  # [2] int32: number of keys all rows share, and a row
    partial_out: Tensor  # [rows, num_heads, slots, padded head_dim] fp32
    partial_max: Tensor  # [rows, num_heads, slots] fp32
    partial_sum: Tensor  # likewise

    @property
    def partials(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the kernels leave for `combine_kernel`."""
        return self.partial_out, self.partial_max, self.partial_sum


class TritonAttention:
    """One per model: layers call it one after the other and share its scratch.

    The cache must hold finite numbers everywhere (it starts as zeros): keys beyond a row's end are
    read and then weighted with zero.

    shares_prefix: look for leading blocks that all decoding rows share and read them once. Costs a
    launch per layer, so it is for steps known to share; a captured graph keeps the value it saw. It
    changes the order of sums, so a row's last bits then do depend on its neighbours.
    """

    def __init__(self, spec: AttentionSpec, tuning: Tuning | None = None) -> None:
        reason = self.unsupported(spec)
        assert reason is None, reason
        assert spec.scale > 0
        self._spec = spec
        self._tuning = tuning or tuning_for(spec)
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
        self._cuts = {
            "WINDOW": spec.sliding_window or 0,
            "MIN_SPLIT": self._tuning.min_split,
            "MAX_SPLITS": self._tuning.max_splits,
            "BLOCK_N": self._tuning.decode.keys,
        }
        self.shares_prefix = False
        self._unshared = torch.zeros(2, dtype=torch.int32, device=spec.device)
        # Never freed: captured graphs hold addresses in here.
        self._scratch: dict[int, Scratch] = {}
        self._tile_rows: Tensor | None = None  # [number of query tiles] int32

    @staticmethod
    def unsupported(spec: AttentionSpec) -> str | None:
        """Why not, or None."""
        if spec.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"no Triton attention in {spec.dtype}"
        if spec.cache_dtype not in (spec.dtype, torch.float8_e4m3fn):
            return f"no Triton attention over a cache in {spec.cache_dtype}"
        if spec.head_dim > MAX_HEAD_DIM:
            return f"head_dim {spec.head_dim} is over {MAX_HEAD_DIM}"
        return unusable(spec.device)

    @staticmethod
    def kv_shape(spec: AttentionSpec, *, num_layers: int, num_blocks: int) -> tuple[int, ...]:
        """[2, layers, blocks, block_size, kv_heads, head_dim]."""
        return 2, num_layers, num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim

    def prepare(self, batch: ForwardBatch) -> None:
        """List decode work and query tiles on the device; capturable, and asks the host nothing.

        An ordinary launch (the embedding's) must lie between this and `forward`: its kernels read
        the lists before they wait for their predecessors.
        """
        scratch = self._scratch_for(batch.num_rows)
        block_rows = triton.next_power_of_2(batch.num_rows)
        if self._shares(batch):
            find_shared_kernel[(1,)](
                batch.seq_lens,
                batch.query_start_loc,
                batch.block_tables,
                batch.block_tables.stride(0),
                scratch.shared,
                batch.num_rows,
                BLOCK_SIZE=self._spec.block_size,
                MIN_SHARED=MIN_SHARED_KEYS,
                MIN_ROWS=MIN_SHARING_ROWS,
                BLOCK_ROWS=block_rows,
            )
        plan_kernel[(triton.cdiv(batch.num_rows, PLANNED_ROWS.value),)](
            batch.seq_lens,
            batch.query_start_loc,
            self._shared(batch, scratch),
            scratch.work,
            scratch.num_work,
            batch.num_rows,
            **self._cuts,
            BLOCK_ROWS=block_rows,
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
        assert query.stride()[1:] == (self._spec.head_dim, 1) and layer_cache[0].is_contiguous()
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

    @property
    def _slots(self) -> int:
        return self._tuning.max_splits + self._tuning.prefix_splits

    def _shares(self, batch: ForwardBatch) -> bool:
        enough = batch.num_rows >= MIN_SHARING_ROWS and batch.max_seq_len > MIN_SHARED_KEYS
        return self.shares_prefix and enough and self._spec.sliding_window is None

    def _shared(self, batch: ForwardBatch, scratch: Scratch) -> Tensor:
        return scratch.shared if self._shares(batch) else self._unshared

    def _keys_and_values(self, layer_cache: Tensor, tiling: Tiling) -> list[Any]:
        """As the kernels take them: keys and the way to values, or descriptors for the TMA."""
        if not tiling.tma:
            return [layer_cache, layer_cache.stride(0)]
        box = [tiling.keys, self._spec.head_dim]
        slots = layer_cache.view(2, -1, self._spec.num_kv_heads * self._spec.head_dim)
        return [TensorDescriptor.from_tensor(half, box) for half in slots]

    def _prefill(
        self, query: Tensor, layer_cache: Tensor, batch: ForwardBatch, out: Tensor
    ) -> None:
        assert self._tile_rows is not None
        prefill_kernel[(self._spec.num_kv_heads, len(self._tile_rows))](
            query,
            query.stride(0),
            *self._keys_and_values(layer_cache, self._tuning.prefill),
            out,
            batch.block_tables,
            batch.block_tables.stride(0),
            batch.seq_lens,
            batch.query_start_loc,
            self._tile_rows,
            self._spec.scale * LOG2E,
            **self._shape,
            BLOCK_M=self._tuning.queries,
            **self._tuning.prefill.options,
            **self._options,
        )

    def _decode(self, query: Tensor, layer_cache: Tensor, batch: ForwardBatch, out: Tensor) -> None:
        spec, scratch, tuning = self._spec, self._scratch_for(batch.num_rows), self._tuning
        if self._shares(batch):
            self._attend_to_prefix(query, layer_cache, batch, scratch)
        most = batch.num_rows * spec.num_kv_heads * tuning.max_splits
        resident = num_multiprocessors(spec.device) * tuning.programs_per_sm
        decode_kernel[(min(most, resident),)](
            query,
            query.stride(0),
            *self._keys_and_values(layer_cache, tuning.decode),
            out,
            *scratch.partials,
            scratch.work,
            scratch.num_work,
            batch.block_tables,
            batch.block_tables.stride(0),
            spec.scale * LOG2E,
            **self._shape,
            BLOCK_G=max(16, triton.next_power_of_2(self._group)),
            SLOTS=self._slots,
            **tuning.decode.options,
            **self._options,
        )
        if batch.max_seq_len > tuning.min_split // 2:
            slots = self._slots if self._shares(batch) else tuning.max_splits
            combine_kernel[(batch.num_rows, spec.num_heads)](
                out,
                *scratch.partials,
                batch.seq_lens,
                batch.query_start_loc,
                self._shared(batch, scratch),
                HEADS=spec.num_heads,
                HEAD_DIM=spec.head_dim,
                BLOCK_D=self._shape["BLOCK_D"],
                SLOTS=self._slots,
                BLOCK_SLOTS=triton.next_power_of_2(slots),
                **self._cuts,
                num_warps=2,
                **self._options,
            )

    def _attend_to_prefix(
        self, query: Tensor, layer_cache: Tensor, batch: ForwardBatch, scratch: Scratch
    ) -> None:
        tuning = self._tuning
        num_tiles = triton.cdiv(batch.num_rows, self._tile_tokens)
        shape = {name: value for name, value in self._shape.items() if name != "WINDOW"}
        shared_prefix_kernel[(self._spec.num_kv_heads, tuning.prefix_splits, num_tiles)](
            query,
            query.stride(0),
            *self._keys_and_values(layer_cache, tuning.prefill),
            *scratch.partials,
            scratch.shared,
            batch.seq_lens,
            batch.query_start_loc,
            batch.num_rows,
            batch.block_tables,
            batch.block_tables.stride(0),
            self._spec.scale * LOG2E,
            **shape,
            MAX_SPLITS=tuning.max_splits,
            SLOTS=self._slots,
            BLOCK_M=tuning.queries,
            **tuning.prefill.options,
            **self._options,
        )

    def _scratch_for(self, num_rows: int) -> Scratch:
        """The smallest that is large enough, so that a large one serves smaller batches, too."""
        large_enough = [rows for rows in self._scratch if rows >= num_rows]
        if large_enough:
            return self._scratch[min(large_enough)]
        rows, device = triton.next_power_of_2(num_rows), self._spec.device
        parts = (rows, self._spec.num_heads, self._slots)
        num_records = rows * self._tuning.max_splits
        self._scratch[rows] = Scratch(
            work=torch.zeros(num_records, RECORD.value, dtype=torch.int32, device=device),
            num_work=torch.empty(1, dtype=torch.int32, device=device),
            shared=torch.zeros(2, dtype=torch.int32, device=device),
            partial_out=torch.empty(*parts, self._shape["BLOCK_D"], device=device),
            partial_max=torch.empty(parts, device=device),
            partial_sum=torch.empty(parts, device=device),
        )
        return self._scratch[rows]
