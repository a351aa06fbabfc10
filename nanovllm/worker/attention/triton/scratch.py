"""Device memory in which the attention kernels of one step leave things for each other."""

from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor

from nanovllm.worker.attention.base import AttentionSpec
from nanovllm.worker.attention.triton.attention_tuning import Tuning
from nanovllm.worker.attention.triton.decode_plan import LINE, RANGE, RECORD


@dataclass(frozen=True, slots=True)
class Scratch:
    """For steps of up to a number of rows."""

    work: Tensor  # [rows * max_splits, RECORD] int32
    num_work: Tensor  # [1] int32
    lines: Tensor  # [rows, LINE] int32
    ranges: Tensor  # [most ranges, RANGE] int32
    totals: Tensor  # [3] int32
    arrivals: Tensor  # [rows, num_kv_heads] int32, zero between kernels
    partial_out: Tensor  # [rows, num_heads, slots, padded head_dim] fp32
    partial_max: Tensor  # [rows, num_heads, slots] fp32
    partial_sum: Tensor  # likewise

    @property
    def partials(self) -> tuple[Tensor, Tensor, Tensor]:
        """What splits of a row leave for the one that joins them."""
        return self.partial_out, self.partial_max, self.partial_sum

    @property
    def stream(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `stream_plan_kernel` lists."""
        return self.lines, self.ranges, self.totals


def allocate_scratch(
    spec: AttentionSpec, tuning: Tuning, *, num_rows: int, num_ranges: int
) -> Scratch:
    """num_ranges: into which the tiles of many rows are cut at most."""
    slots = tuning.max_splits + tuning.prefix_splits
    parts = (num_rows, spec.num_heads, slots)
    integers = partial(torch.zeros, dtype=torch.int32, device=spec.device)
    block_d = triton.next_power_of_2(spec.head_dim)
    return Scratch(
        work=integers(num_rows * tuning.max_splits, RECORD.value),
        num_work=integers(1),
        lines=integers(num_rows, LINE.value),
        ranges=integers(num_ranges, RANGE.value),
        totals=integers(3),
        arrivals=integers(num_rows, spec.num_kv_heads),
        partial_out=torch.empty(*parts, block_d, device=spec.device),
        partial_max=torch.empty(parts, device=spec.device),
        partial_sum=torch.empty(parts, device=spec.device),
    )
