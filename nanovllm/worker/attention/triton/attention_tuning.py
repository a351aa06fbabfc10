"""Tiles and cuts of the attention kernels, as measured; `backend` launches by them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from nanovllm.worker.attention.base import AttentionSpec
from nanovllm.worker.kernels.triton.launch import has_tensor_memory_accelerator, is_hopper


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
class Fitting:
    """How rows decode whose (row, KV head) pairs, each a program, all fit on the device at once.

    One fused kernel does it all. Rows are cut up as long as that makes no more than `cut_per_sm`
    programs, where it comes near that many: fewer than fit, so that the product behind them finds
    room to fetch its weights. max_rows: None, as many as fit.
    """

    tiling: Tiling
    programs_per_sm: int
    cut_per_sm: int = 4
    max_rows: int | None = None

    def most_rows(self, sms_per_head: float) -> int:
        """That fit. sms_per_head: multiprocessors for each KV head."""
        most = int(self.programs_per_sm * sms_per_head)
        return most if self.max_rows is None else min(most, self.max_rows)

    def most_splits(self, num_rows: int, sms_per_head: float) -> int:
        """Of all rows together; rows of one length then keep most of the device busy."""
        few, most = (int(n * sms_per_head) for n in (self.cut_per_sm, self.programs_per_sm))
        return few if few // num_rows * num_rows >= 0.75 * few else max(num_rows, most)


@dataclass(frozen=True, slots=True)
class Small:
    """How one kernel does it all for a step of up to `max_tokens` tokens, prompts among them.

    lines: queries times grouped heads in a tile, 16 or more; own: keys of this step that are
    rotated at a time; tiles_per_sm: tiles of queries there may be, each with its KV head a program.
    Contexts are cut into pieces of `least` keys or more, as long as that makes no more than
    `cut_per_sm` programs.
    """

    tiling: Tiling
    own: int
    cut_per_sm: int
    least: int = 128
    lines: int = 16
    tiles_per_sm: int = 6
    max_tokens: int = 160


@dataclass(frozen=True, slots=True)
class Long:
    """How `long_kernel` runs on Hopper: keys per tile, buffers of them, and of how many tokens a
    step must be; fewer do better where contexts are cut into pieces."""

    keys: int = 128
    stages: int = 2
    min_tokens: int = 1024


@dataclass(frozen=True, slots=True)
class Tuning:
    """How rows are cut up, and the tiles of the kernels."""

    decode: Tiling
    prefill: Tiling
    queries: int  # times grouped heads, in one tile of the prefill and prefix kernels
    copies_own: bool = False  # the copy engine fetches a step's own keys in prefill
    few: tuple[Fitting, ...] = ()  # the first that fits
    small: Small | None = None
    long: Long | None = None
    programs_per_sm: int = 6  # that share the tiles of many decoding rows
    min_range: int = 128  # keys, for one of them
    max_splits: int = 32  # of one row, however long
    prefix_splits: int = 16  # of the keys that rows share
    # The context of few query tiles is cut as well, for so many programs together.
    piece_programs_per_sm: int = 2
    min_piece: int = 512  # keys
    max_pieces: int = 8


def tuning_for(spec: AttentionSpec) -> Tuning:
    """Measured on an H100 and an H200 with head_dim 128, on an H200 how few rows decode with 256
    (benchmarks/gpu_kernels.py)."""
    head_bytes = spec.head_dim * spec.cache_dtype.itemsize
    can_copy = (
        has_tensor_memory_accelerator(spec.device)
        and spec.head_dim == triton.next_power_of_2(spec.head_dim)
        and head_bytes >= 16
        and spec.num_kv_heads * head_bytes % 16 == 0
    )
    if spec.head_dim > 256:  # by what fits in shared memory and registers, not measured
        prefill = Tiling(keys=16, stages=2, warps=8, tma=False)
        decode = Tiling(keys=16, stages=2, warps=4, tma=False)
        return Tuning(decode, prefill, queries=64)
    if spec.head_dim > 128:
        prefill = Tiling(keys=32, stages=3, warps=8, tma=False)
        decode = Tiling(keys=32, stages=3, warps=4, tma=False)
        fused = Tiling(keys=32, stages=2, warps=4, tma=False)
        # Two of 64 keys ask for 128 KiB of shared memory, which few devices have.
        has_room = is_hopper(spec.device) and spec.dtype == spec.cache_dtype != torch.float32
        fittings = [Fitting(fused, programs_per_sm=2, cut_per_sm=2)]
        if has_room:
            several = replace(fittings[0], tiling=replace(fused, keys=64))
            fittings = [replace(fittings[0], max_rows=4), several]
        return Tuning(decode, prefill, queries=128, copies_own=can_copy, few=tuple(fittings))
    # Two stages, so that the tiles of two programs fit in a multiprocessor's shared memory, too.
    prefill = Tiling(
        keys=64,
        stages=2,
        warps=8,
        tma=can_copy and spec.block_size % 64 == 0,
        max_registers=128,
    )
    # As many programs as have room for their registers; to widen keys from FP8 takes more of them.
    widens = spec.cache_dtype != spec.dtype
    streaming = Tiling(keys=64, stages=2, warps=2, tma=False)
    fused = streaming if widens else Tiling(keys=32, stages=2, warps=2, tma=False)
    few: tuple[Fitting, ...] = (Fitting(fused, programs_per_sm=4 if widens else 6),)
    group = spec.num_heads // spec.num_kv_heads
    if not widens and group <= 4:
        # As many as registers leave room for are best for more rows: those of unequal lengths can
        # then be cut where there are nearly as many as programs.
        few = (replace(few[0], max_rows=4), replace(few[0], cut_per_sm=6 if group <= 2 else 5))
    return Tuning(
        streaming,
        prefill,
        queries=128,
        copies_own=can_copy,
        few=few,
        small=small_tuning(
            num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim
        ),
        long=Long() if can_attend_long(spec) else None,
        programs_per_sm=4,
    )


def small_tuning(*, num_heads: int, num_kv_heads: int, head_dim: int) -> Small | None:
    """Measured on an H200 with the heads of SmolLM2-135M and Qwen3-0.6B."""
    if num_heads // num_kv_heads > 8:  # a tile would have a single query
        return None
    if head_dim <= 64:
        return Small(Tiling(keys=64, stages=1, warps=8, tma=False), own=32, cut_per_sm=2)
    return Small(Tiling(keys=32, stages=1, warps=4, tma=False), own=16, cut_per_sm=2)


def can_attend_long(spec: AttentionSpec) -> bool:
    """Whether `long_kernel` has a form for these layers, and instructions of its own."""
    is_plain = spec.sliding_window is None and spec.softcap is None
    is_half = spec.dtype in (torch.bfloat16, torch.float16) and spec.cache_dtype == spec.dtype
    fits = spec.head_dim == 128 and spec.num_heads // spec.num_kv_heads <= 64
    return is_plain and is_half and fits and spec.block_size % 16 == 0 and is_hopper(spec.device)
