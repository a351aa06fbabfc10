"""One fused sampler for all rows of a batch, greedy or not, that never asks the host anything.

The runner calls `sample_tokens` with logits already edited and penalized. It means what
`sampling.distribution` means: temperature, min-p, top-k, top-p, then an inverse CDF in token order
with one Philox number per (seed, position). Only what is nearly equal may differ: thresholds cut
logits, not rounded probabilities, and cumulative sums round differently in their last bits.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.worker.kernels.triton_launch import launch_options

SEGMENT = 128  # tokens whose largest logit and mass are known after one pass
SEGMENTS_PER_PROGRAM = 32
SEGMENTS_PER_LOOK = 64
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _segments_kernel(
    logits,  # [n, vocab_size] of any float type
    logits_stride,
    rows,  # [n] int64
    temperature,  # [num_rows], stride column_stride
    column_stride,
    maxima,  # [n, num_segments] fp32, out
    masses,  # [n, num_segments] fp32, out: sum of exp((logit - maximum) / temperature)
    vocab_size,
    num_segments,
    SEGMENT: tl.constexpr,
    NUM: tl.constexpr,
    PDL: tl.constexpr,
):
    """The one pass over all logits: NUM segments of one row a program."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    entry = tl.program_id(0).to(tl.int64)
    segments = tl.program_id(1) * NUM + tl.arange(0, NUM)
    tokens = segments[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    x = tl.load(logits + entry * logits_stride + tokens, tokens < vocab_size, other=float("-inf"))
    x = x.to(tl.float32)
    warmth = tl.load(temperature + tl.load(rows + entry) * column_stride)
    largest = tl.max(x, 1)
    weights = tl.exp2((x - tl.maximum(largest, -1e30)[:, None]) * _sharpness(warmth))
    place = entry * num_segments + segments
    tl.store(maxima + place, largest, segments < num_segments)
    tl.store(masses + place, tl.sum(weights, 1), segments < num_segments)


@triton.jit
def _sharpness(temperature):
    """Factor from logits to powers of two. Greedy rows, temperature 0, have no use for it."""
    return LOG2E / tl.where(temperature > 0, temperature, 1.0)


@triton.jit
def _key(x):
    """fp32 to int64 with the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _value(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _floor_of_maxima(maxima, weights, needed, low, high):
    """The largest value in [low, high] such that segments whose maximum reaches it weigh `needed`.

    `low` if none does. Bisection on the order of floating-point numbers: at most 32 steps.
    """
    low_key, high_key = _key(low), _key(high)
    while low_key < high_key:
        middle = low_key + (high_key - low_key + 1) // 2
        if tl.sum(tl.where(maxima >= _value(middle), weights, 0.0), 0) >= needed:
            low_key = middle
        else:
            high_key = middle - 1
    return _value(low_key)


@triton.jit
def _mass_from(row_logits, chosen, num_chosen, floor, largest, sharpness, vocab_size,
               SEGMENT: tl.constexpr, LOOK: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    """How many logits of the chosen segments reach `floor`, or their mass."""
    mass = 0.0
    for start in range(0, num_chosen, LOOK):
        x = _look(row_logits, chosen, start, num_chosen, vocab_size, SEGMENT, LOOK)
        weights = 1.0
        if not COUNT:
            weights = tl.exp2((x - largest) * sharpness)
        mass += tl.sum(tl.where(x >= floor, weights, 0.0))
    return mass


@triton.jit
def _look(row_logits, chosen, start, num_chosen, vocab_size,
          SEGMENT: tl.constexpr, LOOK: tl.constexpr):  # fmt: skip
    """Logits of LOOK of the chosen segments, [LOOK, SEGMENT]; -inf where there are none."""
    places = start + tl.arange(0, LOOK)
    segments = tl.load(chosen + places, places < num_chosen, other=0)
    tokens = segments[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    real = (places < num_chosen)[:, None] & (tokens < vocab_size)
    return tl.load(row_logits + tokens, real, other=float("-inf")).to(tl.float32)


@triton.jit
def _floor(row_logits, chosen, num_chosen, needed, low, high, sharpness, vocab_size,
           SEGMENT: tl.constexpr, LOOK: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    """The largest value in [low, high] that logits of mass (or number) `needed` reach."""
    low_key, high_key = _key(low), _key(high)
    while low_key < high_key:
        middle = low_key + (high_key - low_key + 1) // 2
        mass = _mass_from(row_logits, chosen, num_chosen, _value(middle), high, sharpness,
                          vocab_size, SEGMENT, LOOK, COUNT)  # fmt: skip
        if mass >= needed:
            low_key = middle
        else:
            high_key = middle - 1
    return _value(low_key)


@triton.jit
def _truncate(row_logits, chosen, chosen_masses, maxima, masses, segments, present,
              top_k, top_p, min_p, temperature, vocab_size,
              SEGMENT: tl.constexpr, LOOK: tl.constexpr):  # fmt: skip
    """Returns the floor that kept logits reach; lists the segments that have some, and their mass.

    What is kept lies in segments whose maximum reaches a lower bound of the floor: usually few, and
    only they are read again.
    """
    largest = tl.max(maxima, 0)
    sharpness = _sharpness(temperature)
    lowest = tl.min(tl.where(present, maxima, largest), 0)
    span = tl.log2(tl.maximum(min_p, 1e-37)) / sharpness
    floor = tl.where(min_p > 0, largest + span, float("-inf"))
    bound = float("-inf")
    if top_k > 0:
        bound = _floor_of_maxima(maxima, tl.where(present, 1.0, 0.0), top_k, lowest, largest)
        bound = tl.where(top_k > tl.sum(present.to(tl.int32)), float("-inf"), bound)
    elif top_p < 1:
        # Every segment has its maximum, at least: if those suffice, the floor is not lower.
        peaks = tl.exp2((maxima - largest) * sharpness)
        needed = tl.sum(masses, 0) * top_p
        bound = _floor_of_maxima(maxima, peaks, needed, lowest, largest)
        bound = tl.where(tl.sum(peaks, 0) < needed, float("-inf"), bound)
    bound = tl.maximum(bound, floor)
    candidate = present & (maxima >= bound)
    places = tl.cumsum(candidate.to(tl.int32), 0) - 1
    num_chosen = tl.sum(candidate.to(tl.int32), 0)
    tl.store(chosen + places, segments, candidate)
    tl.debug_barrier()
    if top_k > 0:
        kth = _floor(row_logits, chosen, num_chosen, top_k, bound, largest, sharpness,
                     vocab_size, SEGMENT, LOOK, True)  # fmt: skip
        floor = tl.maximum(floor, kth)
    if top_p < 1:
        whole = _mass_from(row_logits, chosen, num_chosen, floor, largest, sharpness,
                           vocab_size, SEGMENT, LOOK, False)  # fmt: skip
        if (top_k <= 0) & (min_p <= 0):
            whole = tl.sum(masses, 0)
        floor = _floor(row_logits, chosen, num_chosen, whole * top_p, tl.maximum(floor, bound),
                       largest, sharpness, vocab_size, SEGMENT, LOOK, False)  # fmt: skip
    for start in range(0, num_chosen, LOOK):
        x = _look(row_logits, chosen, start, num_chosen, vocab_size, SEGMENT, LOOK)
        weights = tl.where(x >= floor, tl.exp2((x - largest) * sharpness), 0.0)
        looked = start + tl.arange(0, LOOK)
        tl.store(chosen_masses + looked, tl.sum(weights, 1), looked < num_chosen)
    tl.debug_barrier()
    return floor, num_chosen


@triton.jit
def _uniform(seed, position):
    """As `sampling.philox.uniforms`: 52 bits and a half of Philox4x32-10, fp64 in (0, 1)."""
    low, high = position & 0xFFFFFFFF, (position >> 32) & 0xFFFFFFFF
    first, second, _, _ = tl.philox(seed, low.to(tl.uint32), high.to(tl.uint32), 0, 0)
    bits = (first.to(tl.int64) << 20) | (second.to(tl.int64) >> 12)
    return (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16


@triton.jit
def _choose_kernel(
    logits,
    logits_stride,
    rows,
    positions,  # [n] int64
    temperature,
    top_k,  # [num_rows] int32; this and the next two like temperature
    top_p,
    min_p,
    column_stride,
    seeds,  # [num_rows] int64, stride seed_stride
    seed_stride,
    maxima,
    masses,
    chosen,  # [n, num_segments] int32, scratch
    chosen_masses,  # [n, num_segments] fp32, scratch
    token_ids,  # [n] int64, out
    vocab_size,
    num_segments,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOK: tl.constexpr,
    TRUNCATE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per row finds the segment, then the token."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + entry)
    warmth = tl.load(temperature + row * column_stride)
    sharpness = _sharpness(warmth)
    row_logits = logits + entry * logits_stride
    segments = tl.arange(0, BLOCK)
    present = segments < num_segments
    place = entry * num_segments
    peaks = tl.load(maxima + place + segments, present, other=float("-inf"))
    largest = tl.max(peaks, 0)
    inside = tl.arange(0, SEGMENT)
    if warmth <= 0:
        segment = tl.min(tl.where(peaks == largest, segments, num_segments - 1), 0)
        tokens = segment * SEGMENT + inside
        x = tl.load(row_logits + tokens, tokens < vocab_size, other=float("-inf")).to(tl.float32)
        token = tl.min(tl.where(x == largest, tokens, vocab_size - 1), 0)
    else:
        mass = tl.load(masses + place + segments, present, other=0.0)
        mass *= tl.exp2((peaks - largest) * sharpness)
        floor = float("-inf")
        truncated = False
        if TRUNCATE:
            k = tl.load(top_k + row * column_stride)
            p = tl.load(top_p + row * column_stride)
            least = tl.load(min_p + row * column_stride)
            truncated = (k > 0) | (p < 1) | (least > 0)
            if truncated:
                floor, num_chosen = _truncate(
                    row_logits, chosen + place, chosen_masses + place, peaks, mass, segments,
                    present, k, p, least, warmth, vocab_size, SEGMENT, LOOK,
                )  # fmt: skip
                mass = tl.load(chosen_masses + place + segments, segments < num_chosen, other=0.0)
        ends = tl.cumsum(mass.to(tl.float64), 0)
        uniform = _uniform(tl.load(seeds + row * seed_stride), tl.load(positions + entry))
        # Sums round: the target must stay under the last segment's end, and below in the segment.
        target = uniform * tl.max(ends, 0)
        index = tl.sum((ends <= target).to(tl.int32), 0)
        index = tl.minimum(index, tl.max(tl.where(mass > 0, segments, 0), 0))
        target -= tl.sum(tl.where(segments < index, mass.to(tl.float64), 0.0), 0)
        segment = index
        if truncated:
            segment = tl.load(chosen + place + index)
        tokens = segment * SEGMENT + inside
        x = tl.load(row_logits + tokens, tokens < vocab_size, other=float("-inf")).to(tl.float32)
        weights = tl.where(x >= floor, tl.exp2((x - largest) * sharpness), 0.0)
        ends = tl.cumsum(weights.to(tl.float64), 0)
        offset = tl.sum((ends <= target).to(tl.int32), 0)
        token = segment * SEGMENT + tl.minimum(offset, tl.max(tl.where(weights > 0, inside, 0), 0))
    tl.store(token_ids + entry, token.to(tl.int64))


def sample_tokens(
    logits: Tensor,
    *,
    rows: Tensor,
    positions: Tensor,
    columns: Mapping[str, Tensor],
    seeds: Tensor,
    truncates: bool,
) -> Tensor:
    """Choose one token for each line of `logits` ([n, vocab_size], any float type). Returns [n].

    rows: [n] int64, each line's entry in columns and seeds; positions: [n] int64. columns:
    temperature (0: greedy), top_p and min_p fp32, top_k int32 (0: off), of one stride. truncates:
    whether any row asks for top-k, top-p or min-p, as the host knows.
    """
    n, vocab_size = logits.shape
    assert logits.stride(1) == 1
    num_segments = triton.cdiv(vocab_size, SEGMENT)
    shape, device = (n, num_segments), logits.device
    maxima, masses, chosen_masses = torch.empty(3, *shape, device=device)
    chosen = torch.empty(shape if truncates else (1, 1), dtype=torch.int32, device=device)
    token_ids = torch.empty(n, dtype=torch.int64, device=device)
    names = ("temperature", "top_k", "top_p", "min_p")
    temperature, top_k, top_p, min_p = (columns[name] for name in names)
    stride = temperature.stride(0)
    assert all(columns[name].stride(0) == stride for name in names)
    options = launch_options(device)
    _segments_kernel[(n, triton.cdiv(num_segments, SEGMENTS_PER_PROGRAM))](
        logits, logits.stride(0), rows, temperature, stride, maxima, masses,
        vocab_size, num_segments,
        SEGMENT=SEGMENT, NUM=SEGMENTS_PER_PROGRAM, num_warps=4, **options,
    )  # fmt: skip
    _choose_kernel[(n,)](
        logits, logits.stride(0), rows, positions, temperature, top_k, top_p, min_p, stride,
        seeds, seeds.stride(0), maxima, masses, chosen, chosen_masses, token_ids,
        vocab_size, num_segments,
        SEGMENT=SEGMENT, BLOCK=triton.next_power_of_2(num_segments), LOOK=SEGMENTS_PER_LOOK,
        TRUNCATE=truncates, num_warps=8, **options,
    )  # fmt: skip
    return token_ids
