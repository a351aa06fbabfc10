"""Paged attention in Triton (`base.AttentionBackend`): the kernels' tuning, scratch and launches.

`prepare` lists on the device what the step's kernels will do, so it and `forward` never ask the
host anything and can be captured. Grids depend on host integers of the batch alone; programs
without work end at once.
"""

import math
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as LaidOutDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.worker.attention.base import AttentionSpec, Rotary
from nanovllm.worker.attention.triton.attention_tuning import (
    Fitting,
    Long,
    Small,
    Tiling,
    Tuning,
    tuning_for,
)
from nanovllm.worker.attention.triton.decode_kernels import decode_kernel
from nanovllm.worker.attention.triton.decode_plan import (
    PLANNED_ROWS,
    TILE_RECORD,
    plan_kernel,
    small_plan_kernel,
    stream_plan_kernel,
)
from nanovllm.worker.attention.triton.long_kernel import (
    HALF,
    HEAD_DIM,
    TILE_LAYOUT,
    TILE_LINES,
    long_kernel,
)
from nanovllm.worker.attention.triton.prefill_kernels import prefill_kernel
from nanovllm.worker.attention.triton.prefix_kernel import shared_prefix_kernel
from nanovllm.worker.attention.triton.scratch import Scratch, allocate_scratch
from nanovllm.worker.attention.triton.small_step_kernel import small_step_kernel
from nanovllm.worker.attention.triton.stream_k_kernels import combine_kernel, stream_kernel
from nanovllm.worker.forward_batch import ForwardBatch, SharedPrefix
from nanovllm.worker.kernels.base import QKNorm
from nanovllm.worker.kernels.triton.launch import (
    arrival_counters,
    launch_options,
    num_multiprocessors,
    unusable,
)

LOG2E = 1.4426950408889634
MAX_HEAD_DIM = 512


class TritonAttention:
    """One per model: layers call it one after the other and share its scratch.

    The cache must hold finite numbers everywhere (it starts as zeros): keys beyond a row's end are
    read and then weighted with zero. Where a decoding row is cut up, and so its last bits, depends
    on the lengths of all that decode in the step, and where a chunk's context is, on the step's
    tokens; the same step always gives the same bits.
    """

    is_capturable = True

    def __init__(self, spec: AttentionSpec, tuning: Tuning | None = None) -> None:
        reason = self.unsupported(spec)
        assert reason is None, reason
        assert spec.scale > 0
        self.shares_prefix = spec.sliding_window is None
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
            "SOFTCAP": spec.softcap or 0.0,
        }
        # Never freed: captured graphs hold addresses in here.
        self._scratch: dict[int, Scratch] = {}
        self._tile_rows: Tensor | None = None  # [number of query tiles] int32
        rows = [one.most_rows(self._sms_per_head) for one in self._tuning.few]
        tokens = [] if self._tuning.small is None else [self._tuning.small.max_tokens]
        self.most_at_once = max(rows + tokens, default=0)
        self._small_work: tuple[Tensor, Tensor] | None = None  # as `small_plan_kernel` leaves it

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
        if (small := self._small(batch)) is not None:
            self._plan_small(batch, small)
            return
        if batch.num_decode_rows:
            self._plan(batch)
        if batch.max_query_len > 1:
            self._prepare_chunks(batch)

    def _prepare_chunks(self, batch: ForwardBatch) -> None:
        """For `_prefill`."""
        integers = partial(torch.arange, device=self._spec.device, dtype=torch.int32)
        starts = batch.query_start_loc[:-1] // self._tile_tokens + integers(batch.num_rows)
        tiles = integers(batch.num_tokens // self._tile_tokens + batch.num_rows)
        self._tile_rows = torch.searchsorted(starts, tiles, right=True, out_int32=True) - 1

    def forward(
        self,
        qkv: Tensor,
        rotary: Rotary,
        layer_cache: Tensor,
        batch: ForwardBatch,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Rows with one token are cut up over their keys, the others tiled over their queries."""
        assert layer_cache[0].is_contiguous() and batch.block_tables.stride(1) == 1
        if (small := self._small(batch)) is not None:
            return self._attend_small(qkv, rotary, layer_cache, batch, sinks, small)
        fitting = self._fitting(batch)
        if fitting is not None:
            assert qkv.stride(1) == 1
            out = self._output(qkv)
            self._decode(qkv, rotary, layer_cache, batch, out, fitting, sinks)
            return out
        if batch.max_query_len > 1:
            out = self._prefill(qkv, rotary, layer_cache, batch, sinks)
        else:
            rotary.apply(qkv, batch, layer_cache)
            out = self._output(qkv)
        query = qkv.view(len(qkv), -1, self._spec.head_dim)[:, : self._spec.num_heads]
        if batch.num_decode_rows:
            if batch.prefix is not None:
                self._attend_to_prefix(query, layer_cache, batch, batch.prefix)
            self._stream(query, layer_cache, batch, out, sinks)
        return out

    def _output(self, query: Tensor) -> Tensor:
        shape = len(query), self._spec.num_heads, self._spec.head_dim
        return torch.empty(shape, dtype=query.dtype, device=query.device)

    def _num_programs(self, programs_per_sm: int) -> int:
        return num_multiprocessors(self._spec.device) * programs_per_sm

    def _fitting(self, batch: ForwardBatch) -> Fitting | None:
        """How one kernel does it all, if all rows fit."""
        if batch.max_query_len > 1 or batch.prefix is not None or batch.reads_new:
            return None
        fits = (
            one for one in self._tuning.few if batch.num_rows <= one.most_rows(self._sms_per_head)
        )
        return next(fits, None)

    def _small(self, batch: ForwardBatch) -> Small | None:
        """How one kernel does it all for few tokens, prompts' among them, if it does."""
        small = self._tuning.small
        if small is None or batch.max_query_len == 1 or batch.num_tokens > small.max_tokens:
            return None
        if batch.prefix is not None or batch.reads_new:
            return None
        most_tiles = small.tiles_per_sm * self._sms_per_head
        return small if self._num_small_tiles(batch, small) <= most_tiles else None

    def _num_small_tiles(self, batch: ForwardBatch, small: Small) -> int:
        """Tiles of queries, at most."""
        return batch.num_tokens // (small.lines // self._group) + batch.num_rows

    def _plan_small(self, batch: ForwardBatch, small: Small) -> None:
        """List what `small_step_kernel` will do."""
        num_tiles, keys = self._num_small_tiles(batch, small), small.tiling.keys
        most = int(small.cut_per_sm * self._sms_per_head)
        integers = partial(torch.empty, dtype=torch.int32, device=self._spec.device)
        self._small_work = integers(max(most, num_tiles), TILE_RECORD.value), integers(1)
        small_plan_kernel[(triton.cdiv(num_tiles, PLANNED_ROWS.value),)](
            batch.seq_lens,
            batch.query_start_loc,
            *self._small_work,
            batch.num_rows,
            num_tiles,
            batch.num_rows.bit_length(),
            most,
            QUERIES=small.lines // self._group,
            LEAST=triton.cdiv(small.least, keys) * keys,
            WINDOW=self._shape["WINDOW"],
            MAX_SPLITS=self._tuning.max_splits,
            BLOCK_N=keys,
            BLOCK_TILES=triton.next_power_of_2(num_tiles),
        )

    def _attend_small(
        self,
        qkv: Tensor,
        rotary: Rotary,
        layer_cache: Tensor,
        batch: ForwardBatch,
        sinks: Tensor | None,
        small: Small,
    ) -> Tensor:
        """All in one kernel. qkv: as the product left it."""
        spec, norm, out = self._spec, rotary.qk_norm, self._output(qkv)
        assert qkv.stride(1) == 1 and self._small_work is not None
        work, num_work = self._small_work
        parts, block_d = len(work) * spec.num_kv_heads, self._shape["BLOCK_D"]
        tiling = small.tiling
        small_step_kernel[(parts,)](
            qkv,
            qkv.stride(0),
            layer_cache,
            layer_cache.stride(0),
            out,
            torch.empty(parts, small.lines, block_d + 2, device=spec.device),
            arrival_counters(spec.device),
            work,
            num_work,
            batch.block_tables,
            batch.block_tables.stride(0),
            spec.scale * LOG2E,
            rotary.cos_sin,
            *_weights_and_eps(norm),
            sinks,
            **self._shape,
            SINKS=sinks is not None,
            NORM=norm is not None,
            BLOCK_M=small.lines,
            BLOCK_N=tiling.keys,
            OWN=small.own,
            AT_ONCE=max(1, min(4, 8192 // (small.lines * block_d))),
            num_stages=tiling.stages,
            num_warps=tiling.warps,
            **self._options,
        )
        return out

    @property
    def _sms_per_head(self) -> float:
        return self._num_programs(1) / self._spec.num_kv_heads

    @property
    def _num_ranges(self) -> int:
        """Into which the tiles of many rows are cut, each for a program per KV head."""
        num_programs = self._num_programs(self._tuning.programs_per_sm)
        return max(1, num_programs // self._spec.num_kv_heads)

    def _plan(self, batch: ForwardBatch) -> None:
        """List what `decode_kernel` or `stream_kernel` will do."""
        scratch, tuning = self._scratch_for(batch.num_rows), self._tuning
        grid = (triton.cdiv(batch.num_rows, PLANNED_ROWS.value),)
        shape: dict[str, Any] = {
            "WINDOW": self._shape["WINDOW"],
            "MAX_SPLITS": tuning.max_splits,
            "BLOCK_ROWS": triton.next_power_of_2(batch.num_rows),
        }
        fitting = self._fitting(batch)
        if fitting is not None:
            plan_kernel[grid](
                batch.seq_lens,
                batch.query_start_loc,
                scratch.work,
                scratch.num_work,
                batch.num_rows,
                fitting.most_splits(batch.num_rows, self._sms_per_head),
                **shape,
                BLOCK_N=fitting.tiling.keys,
            )
            return
        stream_plan_kernel[grid](
            batch.seq_lens,
            batch.query_start_loc,
            None if batch.prefix is None else batch.prefix.num_keys,
            *scratch.stream,
            batch.num_rows,
            self._num_ranges,
            **shape,
            SHARED=batch.prefix is not None,
            LEAST=triton.cdiv(tuning.min_range, tuning.decode.keys),
            BLOCK_N=tuning.decode.keys,
        )

    @property
    def _tile_tokens(self) -> int:
        return self._tuning.queries // self._group

    def _long(self, num_tokens: int) -> Long | None:
        """How `long_kernel` attends for a step of so many tokens, if it does."""
        long = self._tuning.long
        return None if long is None or num_tokens < long.min_tokens else long

    @property
    def _block_group(self) -> int:
        """Lines of a tile of queries: tensor cores take 16."""
        lines: int = triton.next_power_of_2(self._group)
        return max(16, lines)

    @property
    def _slots(self) -> int:
        return self._tuning.max_splits + self._tuning.prefix_splits

    def _keys_and_values(self, layer_cache: Tensor, tiling: Tiling) -> list[Any]:
        """Keys and values as the kernels take them: tensors, or descriptors for the TMA."""
        if not tiling.tma:
            return list(layer_cache)
        box = [tiling.keys, self._spec.head_dim]
        slots = layer_cache.view(2, -1, self._spec.num_kv_heads * self._spec.head_dim)
        return [TensorDescriptor.from_tensor(half, box) for half in slots]

    def _prefill(
        self,
        qkv: Tensor,
        rotary: Rotary,
        layer_cache: Tensor,
        batch: ForwardBatch,
        sinks: Tensor | None,
    ) -> Tensor:
        """Rotate and cache, and attend for rows with several tokens; those of the others are left
        to be written. The kernel rotates the queries, which it has to load anyway."""
        assert self._tile_rows is not None
        if (long := self._long(batch.num_tokens)) is not None:
            return self._attend_long(qkv, rotary, layer_cache, batch, sinks, long)
        num_tiles = len(self._tile_rows)
        pieces = self._most_pieces(num_tiles)
        # Whoever shares a tile's context with others must find its queries rotated.
        num_query_lanes = self._spec.num_heads * self._spec.head_dim
        rotary.apply(qkv[:, 0 if pieces > 1 else num_query_lanes :], batch, layer_cache)
        out, tiling, norm = self._output(qkv), self._tuning.prefill, rotary.qk_norm
        parts = num_tiles * self._spec.num_kv_heads * pieces if pieces > 1 else 0
        own = None
        if self._tuning.copies_own:
            own = TensorDescriptor.from_tensor(qkv, [tiling.keys, self._spec.head_dim])
        prefill_kernel[(self._spec.num_kv_heads, num_tiles, pieces)](
            qkv,
            qkv.stride(0),
            own,
            *self._keys_and_values(layer_cache, tiling),
            out,
            batch.block_tables,
            batch.block_tables.stride(0),
            batch.seq_lens,
            batch.query_start_loc,
            self._tile_rows,
            self._spec.scale * LOG2E,
            rotary.cos_sin,
            None if norm is None else norm.q_weight,
            0.0 if norm is None else norm.eps,
            sinks,
            torch.empty(
                parts, self._tuning.queries, self._shape["BLOCK_D"] + 2, device=self._spec.device
            ),
            arrival_counters(self._spec.device),
            batch.num_rows,
            self._num_programs(self._tuning.piece_programs_per_sm),
            **self._shape,
            BLOCK_M=self._tuning.queries,
            OWN_TMA=own is not None,
            NORM=norm is not None,
            SINKS=sinks is not None,
            PIECES=pieces,
            LEAST=self._tuning.min_piece,
            **tiling.options,
            **self._options,
        )
        return out

    def _attend_long(
        self,
        qkv: Tensor,
        rotary: Rotary,
        layer_cache: Tensor,
        batch: ForwardBatch,
        sinks: Tensor | None,
        long: Long,
    ) -> Tensor:
        """As `_prefill`."""
        assert self._tile_rows is not None and self._tuning.queries == TILE_LINES
        spec, norm, out = self._spec, rotary.qk_norm, self._output(qkv)
        rotary.apply(qkv[:, spec.num_heads * spec.head_dim :], batch, layer_cache)
        page = math.gcd(spec.block_size, long.keys)
        slots = layer_cache.view(2, -1, spec.num_kv_heads * spec.head_dim)
        long_kernel[(spec.num_kv_heads, len(self._tile_rows))](
            qkv,
            qkv.stride(0),
            LaidOutDescriptor.from_tensor(qkv, [long.keys, HEAD_DIM.value], TILE_LAYOUT.value),
            *(
                LaidOutDescriptor.from_tensor(half, [page, HALF.value], TILE_LAYOUT.value)
                for half in slots
            ),
            out,
            batch.block_tables,
            batch.block_tables.stride(0),
            batch.seq_lens,
            batch.query_start_loc,
            self._tile_rows,
            spec.scale * LOG2E,
            rotary.cos_sin,
            None if norm is None else norm.q_weight,
            0.0 if norm is None else norm.eps,
            sinks,
            KV_HEADS=spec.num_kv_heads,
            GROUP=self._group,
            BLOCK_SIZE=spec.block_size,
            PAGE=page,
            BLOCK_N=long.keys,
            STAGES=long.stages,
            NORM=norm is not None,
            SINKS=sinks is not None,
            num_warps=4,
            **self._options,
        )
        return out

    def _most_pieces(self, num_tiles: int) -> int:
        """Into which the context of a step's query tiles may be cut, if they are so few at most."""
        pieces, room = 1, 4 * self._num_programs(self._tuning.piece_programs_per_sm)
        while 2 * pieces * num_tiles * self._spec.num_kv_heads <= room:
            pieces *= 2
        return min(pieces, self._tuning.max_pieces)

    def _decode(
        self,
        qkv: Tensor,
        rotary: Rotary,
        layer_cache: Tensor,
        batch: ForwardBatch,
        out: Tensor,
        fitting: Fitting,
        sinks: Tensor | None,
    ) -> None:
        """A few rows: all in one kernel. qkv: as the product left it."""
        spec, scratch, tuning = self._spec, self._scratch_for(batch.num_rows), self._tuning
        norm, most = rotary.qk_norm, fitting.most_splits(batch.num_rows, self._sms_per_head)
        num_splits = min(batch.num_rows * tuning.max_splits, most)
        tiling = fitting.tiling
        decode_kernel[(num_splits * spec.num_kv_heads,)](
            qkv,
            qkv.stride(0),
            *self._keys_and_values(layer_cache, tiling),
            out,
            *scratch.partials,
            scratch.arrivals,
            scratch.work,
            scratch.num_work,
            batch.block_tables,
            batch.block_tables.stride(0),
            spec.scale * LOG2E,
            layer_cache,
            layer_cache.stride(0),
            rotary.cos_sin,
            *_weights_and_eps(norm),
            sinks,
            **self._shape,
            BLOCK_G=self._block_group,
            MAX_SPLITS=tuning.max_splits,
            SLOTS=self._slots,
            NORM=norm is not None,
            SINKS=sinks is not None,
            **tiling.options,
            **self._options,
        )

    def _stream(
        self,
        query: Tensor,
        layer_cache: Tensor,
        batch: ForwardBatch,
        out: Tensor,
        sinks: Tensor | None,
    ) -> None:
        """Many rows. query: rotated, [num_tokens, num_heads, head_dim]."""
        spec, tuning = self._spec, self._tuning
        scratch, prefix = self._scratch_for(batch.num_rows), batch.prefix
        shared_keys = None if prefix is None else prefix.num_keys
        num_ranges = min(batch.num_rows * tuning.max_splits, self._num_ranges)
        stream_kernel[(num_ranges * spec.num_kv_heads,)](
            query,
            query.stride(0),
            *self._keys_and_values(layer_cache, tuning.decode),
            out,
            *scratch.partials,
            *scratch.stream,
            shared_keys,
            batch.block_tables,
            batch.block_tables.stride(0),
            spec.scale * LOG2E,
            sinks,
            **self._shape,
            BLOCK_G=self._block_group,
            SLOTS=self._slots,
            SINKS=sinks is not None,
            SHARED=prefix is not None,
            **tuning.decode.options,
            **self._options,
        )
        combine_kernel[(batch.num_rows, spec.num_kv_heads)](
            out,
            *scratch.partials,
            scratch.lines,
            scratch.totals,
            shared_keys,
            sinks,
            KV_HEADS=spec.num_kv_heads,
            GROUP=self._group,
            HEAD_DIM=spec.head_dim,
            BLOCK_D=self._shape["BLOCK_D"],
            MAX_SPLITS=tuning.max_splits,
            SLOTS=self._slots,
            SHARED=prefix is not None,
            SINKS=sinks is not None,
            num_warps=2,
            **self._options,
        )

    def _attend_to_prefix(
        self, query: Tensor, layer_cache: Tensor, batch: ForwardBatch, prefix: SharedPrefix
    ) -> None:
        tuning = self._tuning
        num_tiles = triton.cdiv(batch.num_rows, self._tile_tokens)
        shape = {name: value for name, value in self._shape.items() if name != "WINDOW"}
        shared_prefix_kernel[(self._spec.num_kv_heads, tuning.prefix_splits, num_tiles)](
            query,
            query.stride(0),
            *self._keys_and_values(layer_cache, tuning.prefill),
            *self._scratch_for(batch.num_rows).partials,
            prefix.num_keys,
            prefix.leader,
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
        rows = triton.next_power_of_2(num_rows)
        self._scratch[rows] = allocate_scratch(
            self._spec, self._tuning, num_rows=rows, num_ranges=self._num_ranges
        )
        return self._scratch[rows]


def _weights_and_eps(norm: QKNorm | None) -> tuple[Tensor | None, Tensor | None, float]:
    """As kernels take norms of queries and keys, that of queries first."""
    return (None, None, 0.0) if norm is None else (norm.q_weight, norm.k_weight, norm.eps)
