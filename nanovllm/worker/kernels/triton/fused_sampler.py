"""One fused sampler for all rows of a batch, greedy or not, that never asks the host anything.

The runner calls `sample_tokens` with logits already edited and penalized. It means what
`sampling.distribution` means: temperature, min-p, top-k, top-p, then a race of segments and one of
the winner's tokens, with the same Philox numbers. Only what is nearly equal may differ: thresholds
cut logits, not rounded probabilities, and sums round differently in their last bits.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.worker.kernels.triton.launch import launch_options
from nanovllm.worker.parallel import SEGMENT  # its largest logit and mass are one pass

SEGMENTS_PER_PROGRAM = 32
SEGMENTS_PER_LOOK = 64
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def segments_kernel(
    logits,  # [n, vocab_size] of any float type
    logits_stride,
    rows,  # [n] of any integer type
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
    warmth = tl.load(temperature + tl.load(rows + entry).to(tl.int64) * column_stride)
    store_segments(x, warmth, maxima, masses, entry, segments, num_segments)


@triton.jit
def store_segments(x, warmth, maxima, masses, entry, segments, num_segments):
    """The maximum and the mass of each segment of an entry. x: [num, SEGMENT] fp32, their logits,
    -inf beyond the vocabulary."""
    largest = tl.max(x, 1)
    weights = tl.exp2((x - tl.maximum(largest, -1e30)[:, None]) * sharpness_of(warmth))
    place = entry * num_segments + segments
    tl.store(maxima + place, largest, segments < num_segments)
    tl.store(masses + place, tl.sum(weights, 1), segments < num_segments)


@triton.jit
def sharpness_of(temperature):
    """Factor from logits to powers of two. Greedy rows, temperature 0, have no use for it."""
    return LOG2E / tl.where(temperature > 0, temperature, 1.0)


@triton.jit
def order_key(x):
    """fp32 to int64 with the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def value_of_key(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _narrow(low, high, first, second, third):
    """Next bounds of a search by quarters, given which of the three keys between still do."""
    step = (high - low + 3) // 4
    num_passed = first.to(tl.int64) + second.to(tl.int64) + third.to(tl.int64)
    failed = tl.minimum(low + (num_passed + 1) * step, high)
    new_high = tl.where(num_passed < 3, failed - 1, high)
    return tl.minimum(low + num_passed * step, high), new_high


@triton.jit
def _quarters(low, high):
    """The three values that cut the keys low … high in four."""
    step = (high - low + 3) // 4
    first, second = tl.minimum(low + step, high), tl.minimum(low + 2 * step, high)
    return value_of_key(first), value_of_key(second), value_of_key(tl.minimum(low + 3 * step, high))


@triton.jit
def _largest_maximum(maxima, count, lowest, largest):
    """The count-th largest of the segments' maxima; the lowest if there are fewer."""
    low, high = order_key(lowest), order_key(largest)
    while low < high:
        first, second, third = _quarters(low, high)
        # Three counts of at most 2^20 in one sum.
        passed = (maxima >= first).to(tl.int64) + ((maxima >= second).to(tl.int64) << 20)
        counts = tl.sum(passed + ((maxima >= third).to(tl.int64) << 40), 0)
        low, high = _narrow(
            low, high,
            (counts & 0xFFFFF) >= count,
            ((counts >> 20) & 0xFFFFF) >= count,
            (counts >> 40) >= count,
        )  # fmt: skip
    return value_of_key(low)


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
def _masses_from(x, row_logits, chosen, num_chosen, first, second, third, largest, sharpness,
                 vocab_size, SEGMENT: tl.constexpr, LOOK: tl.constexpr,
                 COUNT: tl.constexpr):  # fmt: skip
    """The mass of those logits of the chosen segments that reach each floor, or their number.

    x: the first look, which mostly is the only one; it stays in registers.
    """
    weights = _weights(x, largest, sharpness, COUNT)
    first_mass = tl.where(x >= first, weights, 0.0)
    second_mass = tl.where(x >= second, weights, 0.0)
    third_mass = tl.where(x >= third, weights, 0.0)
    for start in range(LOOK, num_chosen, LOOK):
        more = _look(row_logits, chosen, start, num_chosen, vocab_size, SEGMENT, LOOK)
        weights = _weights(more, largest, sharpness, COUNT)
        first_mass += tl.where(more >= first, weights, 0.0)
        second_mass += tl.where(more >= second, weights, 0.0)
        third_mass += tl.where(more >= third, weights, 0.0)
    return tl.sum(first_mass), tl.sum(second_mass), tl.sum(third_mass)


@triton.jit
def _weights(x, largest, sharpness, COUNT: tl.constexpr):
    weights = tl.where(x > float("-inf"), 1.0, 0.0)
    if not COUNT:
        weights = tl.exp2((x - largest) * sharpness)
    return weights


@triton.jit
def _floor(x, row_logits, chosen, num_chosen, needed, lowest, largest, sharpness, vocab_size,
           SEGMENT: tl.constexpr, LOOK: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    """The largest value that logits of mass (or number) `needed` reach; `lowest` if none is.

    A search by quarters in the order of floating-point numbers: at most 16 looks.
    """
    low, high = order_key(lowest), order_key(largest)
    while low < high:
        first, second, third = _quarters(low, high)
        first_mass, second_mass, third_mass = _masses_from(
            x, row_logits, chosen, num_chosen, first, second, third, largest, sharpness,
            vocab_size, SEGMENT, LOOK, COUNT,
        )  # fmt: skip
        low, high = _narrow(
            low, high, first_mass >= needed, second_mass >= needed, third_mass >= needed
        )
    return value_of_key(low)


@triton.jit
def _choose_segments(row_logits, chosen, maxima, segments, present, floor, wanted, needed,
                     sharpness, vocab_size,
                     SEGMENT: tl.constexpr, LOOK: tl.constexpr):  # fmt: skip
    """List the segments with the `wanted` largest maxima, or more until they hold mass `needed`.

    Returns a value that no listed segment's maximum is below, and the length of the list.
    """
    largest = tl.max(maxima, 0)
    lowest = tl.min(tl.where(present, maxima, largest), 0)
    num_segments = tl.sum(present.to(tl.int32), 0)
    bound = floor
    num_chosen = 0
    enough = False
    while not enough:
        bound = float("-inf")
        if wanted < num_segments:
            bound = _largest_maximum(maxima, wanted, lowest, largest)
        bound = tl.maximum(bound, floor)
        candidate = present & (maxima >= bound)
        ends = tl.cumsum(candidate.to(tl.int32), 0)
        tl.debug_barrier()  # the list may be rewritten: all have read it
        tl.store(chosen + ends - 1, segments, candidate)
        tl.debug_barrier()
        num_chosen = tl.max(ends, 0)
        enough = (needed <= 0) | (bound <= floor)
        if not enough:
            x = _look(row_logits, chosen, 0, num_chosen, vocab_size, SEGMENT, LOOK)
            mass, _, _ = _masses_from(x, row_logits, chosen, num_chosen, bound, bound, bound,
                                      largest, sharpness, vocab_size,
                                      SEGMENT, LOOK, False)  # fmt: skip
            enough = mass >= needed
        wanted = wanted * 8
    return bound, num_chosen


@triton.jit
def _truncate(row_logits, chosen, chosen_masses, maxima, masses, segments, present,
              top_k, top_p, min_p, temperature, vocab_size,
              SEGMENT: tl.constexpr, LOOK: tl.constexpr):  # fmt: skip
    """Returns the floor that kept logits reach; lists the segments that have some, and their mass.

    What is kept lies in the segments of the largest maxima: usually few, and only they are read.
    """
    largest = tl.max(maxima, 0)
    sharpness = sharpness_of(temperature)
    span = tl.log2(tl.maximum(min_p, 1e-37)) / sharpness
    floor = tl.where(min_p > 0, largest + span, float("-inf"))
    # The k-th largest logit is not below the k-th largest maximum; of a nucleus one can but guess.
    wanted = tl.where(top_k > 0, top_k, tl.where(top_p < 1, LOOK, 2**30))
    needed = tl.where(top_k > 0, 0.0, tl.sum(masses, 0) * top_p)
    bound, num_chosen = _choose_segments(row_logits, chosen, maxima, segments, present, floor,
                                         wanted, needed, sharpness, vocab_size,
                                         SEGMENT, LOOK)  # fmt: skip
    x = _look(row_logits, chosen, 0, num_chosen, vocab_size, SEGMENT, LOOK)
    if top_k > 0:
        kth = _floor(x, row_logits, chosen, num_chosen, top_k, bound, largest, sharpness,
                     vocab_size, SEGMENT, LOOK, True)  # fmt: skip
        floor = tl.maximum(floor, kth)
    if top_p < 1:
        whole = tl.sum(masses, 0)
        if (top_k > 0) | (min_p > 0):
            whole, _, _ = _masses_from(x, row_logits, chosen, num_chosen, floor, floor, floor,
                                       largest, sharpness, vocab_size,
                                       SEGMENT, LOOK, False)  # fmt: skip
        floor = _floor(x, row_logits, chosen, num_chosen, whole * top_p, tl.maximum(floor, bound),
                       largest, sharpness, vocab_size, SEGMENT, LOOK, False)  # fmt: skip
    for start in range(0, num_chosen, LOOK):
        x = _look(row_logits, chosen, start, num_chosen, vocab_size, SEGMENT, LOOK)
        weights = tl.where(x >= floor, tl.exp2((x - largest) * sharpness), 0.0)
        looked = start + tl.arange(0, LOOK)
        tl.store(chosen_masses + looked, tl.sum(weights, 1), looked < num_chosen)
    tl.debug_barrier()
    return floor, num_chosen


@triton.jit
def arrival_times(seed, position, index):
    """Minus the log of numbers `index` of `sampling.philox.uniforms`: exponential, fp32."""
    zeros = tl.zeros_like(index).to(tl.uint32)
    low = zeros + (position & 0xFFFFFFFF).to(tl.uint32)
    high = zeros + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, (index // 2).to(tl.uint32), zeros)
    first, second = tl.where(index % 2 == 0, a, c), tl.where(index % 2 == 0, b, d)
    bits = (first.to(tl.int64) << 20) | (second.to(tl.int64) >> 12)
    uniform = (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16
    return (-tl.log(uniform)).to(tl.float32)


@triton.jit
def pick_winner(mass, seed, position, index):
    """Where the racer is that comes first; the first place if none has any mass, or all are NaN."""
    times = arrival_times(seed, position, index)
    return tl.argmax(tl.where(mass > 0, mass / times, 0.0), 0)


@triton.jit
def entry_of(rows, positions, temperature, column_stride):
    """What this program samples for: entry, row, position of the new token, and temperature."""
    entry = tl.program_id(0).to(tl.int64)
    row, position = tl.load(rows + entry).to(tl.int64), tl.load(positions + entry).to(tl.int64)
    return entry, row, position, tl.load(temperature + row * column_stride)


@triton.jit
def load_segment(row_logits, segment, vocab_size, SEGMENT: tl.constexpr):
    """The tokens of one segment, and their logits in fp32: -inf beyond the vocabulary."""
    tokens = segment * SEGMENT + tl.arange(0, SEGMENT)
    x = tl.load(row_logits + tokens, tokens < vocab_size, other=float("-inf")).to(tl.float32)
    return tokens, x


@triton.jit
def _draw(row_logits, largest, mass, segments, floor, sharpness, seed, position, vocab_size,
          SEGMENT: tl.constexpr):  # fmt: skip
    """As `sampling.distribution.draw`. mass: of kept logits in each of `segments`, 0 for none."""
    place = pick_winner(mass, seed, position, SEGMENT + segments)
    segment = tl.max(tl.where(tl.arange(0, segments.shape[0]) == place, segments, 0), 0)
    _, x = load_segment(row_logits, segment, vocab_size, SEGMENT)
    weights = tl.where(x >= floor, tl.exp2((x - largest) * sharpness), 0.0)
    return segment * SEGMENT + pick_winner(weights, seed, position, tl.arange(0, SEGMENT))


@triton.jit
def pick_largest(row_logits, peaks, segments, num_segments, vocab_size, SEGMENT: tl.constexpr):
    """The first of the largest logits."""
    largest = tl.max(peaks, 0)
    segment = tl.min(tl.where(peaks == largest, segments, num_segments - 1), 0)
    tokens, x = load_segment(row_logits, segment, vocab_size, SEGMENT)
    return tl.min(tl.where(x == largest, tokens, vocab_size - 1), 0)


@triton.jit
def _choose_kernel(
    logits, logits_stride, rows,
    positions,  # [n] of any integer type
    temperature,
    top_k,  # [num_rows] int32; this and the next two like temperature
    top_p, min_p, column_stride,
    seeds,  # [num_rows] int64, stride seed_stride
    seed_stride, maxima, masses,
    chosen,  # [n, num_segments] int32, scratch
    chosen_masses,  # [n, num_segments] fp32, scratch
    token_ids,  # [n] int64, out
    lines,  # [n] int32: where in token_ids each goes, -1: nowhere; or None: one after the other
    known,  # [num_rows, …] int32, stride known_stride, or None: tokens go there at their positions
    known_stride, vocab_size, num_segments,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, LOOK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per row chooses its token."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    line = tl.program_id(0).to(tl.int64)
    if lines is not None:
        line = tl.load(lines + line).to(tl.int64)
    if line < 0:
        return
    entry, row, position, warmth = entry_of(rows, positions, temperature, column_stride)
    row_logits = logits + entry * logits_stride
    segments = tl.arange(0, BLOCK)
    present = segments < num_segments
    place = entry * num_segments
    peaks = tl.load(maxima + place + segments, present, other=float("-inf"))
    if warmth <= 0:
        token = pick_largest(row_logits, peaks, segments, num_segments, vocab_size, SEGMENT)
    else:
        mass = tl.load(masses + place + segments, present, other=0.0)
        mass *= tl.exp2((peaks - tl.max(peaks, 0)) * sharpness_of(warmth))
        floor = float("-inf")
        listed = segments
        k = tl.load(top_k + row * column_stride)
        p = tl.load(top_p + row * column_stride)
        least = tl.load(min_p + row * column_stride)
        if (k > 0) | (p < 1) | (least > 0):
            floor, num_chosen = _truncate(
                row_logits, chosen + place, chosen_masses + place, peaks, mass, segments,
                present, k, p, least, warmth, vocab_size, SEGMENT, LOOK,
            )  # fmt: skip
            real = segments < num_chosen
            listed = tl.load(chosen + place + segments, real, other=0)
            mass = tl.load(chosen_masses + place + segments, real, other=0.0)
        seed = tl.load(seeds + row * seed_stride)
        token = _draw(row_logits, tl.max(peaks, 0), mass, listed, floor, sharpness_of(warmth),
                      seed, position, vocab_size, SEGMENT)  # fmt: skip
    tl.store(token_ids + line, token.to(tl.int64))
    if known is not None:
        tl.store(known + row * known_stride + position, token.to(tl.int32))


def measure_segments(
    logits: Tensor, rows: Tensor, temperature: Tensor, maxima: Tensor, masses: Tensor
) -> None:
    """The largest logit of each segment of each line, and its mass. maxima, masses: [n,
    num_segments] fp32, out."""
    (n, vocab_size), num_segments = logits.shape, maxima.shape[1]
    assert logits.stride(1) == 1
    segments_kernel[(n, triton.cdiv(num_segments, SEGMENTS_PER_PROGRAM))](
        logits, logits.stride(0), rows, temperature, temperature.stride(0), maxima, masses,
        vocab_size, num_segments,
        SEGMENT=SEGMENT, NUM=SEGMENTS_PER_PROGRAM, num_warps=4, **launch_options(logits.device),
    )  # fmt: skip


def sample_tokens(
    logits: Tensor,
    *,
    rows: Tensor,
    positions: Tensor,
    columns: Mapping[str, Tensor],
    seeds: Tensor,
    known: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Choose one token for each line of `logits` ([n, vocab_size], any float type). Returns [n].

    rows: [n] integers, each line's entry in columns and seeds; positions: [n] integers. columns:
    temperature (0: greedy), top_p and min_p fp32, top_k int32 (0: off), of one stride. known:
    [num_rows, …] int32, where each row's token is written at its position, if given. out: [n or
    more] int64, to be written and returned in place of new memory.
    """
    n, vocab_size = logits.shape
    segments = torch.empty(2, n, triton.cdiv(vocab_size, SEGMENT), device=logits.device)
    measure_segments(logits, rows, columns["temperature"], *segments)
    if out is None:
        out = torch.empty(n, dtype=torch.int64, device=logits.device)
    choose_tokens(
        logits,
        segments,
        (rows, positions),
        columns=columns,
        seeds=seeds,
        known=known,
        out=(out, None),
    )
    return out


def choose_tokens(
    logits: Tensor,
    segments: Tensor,
    targets: tuple[Tensor, Tensor],
    *,
    columns: Mapping[str, Tensor],
    seeds: Tensor,
    known: Tensor | None,
    out: tuple[Tensor, Tensor | None],
) -> None:
    """As `sample_tokens`, of logits whose segments have been measured.

    segments: [2, n, num_segments] fp32, their largest logits and masses. targets: rows and
    positions. out: ids of more lines ([…] int64), and which of them these are ([n] int32; -1: there
    is nobody to choose for; None: one after the other).
    """
    (n, vocab_size), num_segments = logits.shape, segments.shape[2]
    chosen_masses = torch.empty_like(segments[0])
    chosen = torch.empty_like(chosen_masses, dtype=torch.int32)
    names = ("temperature", "top_k", "top_p", "min_p")
    temperature, top_k, top_p, min_p = (columns[name] for name in names)
    stride = temperature.stride(0)
    assert all(columns[name].stride(0) == stride for name in names)
    _choose_kernel[(n,)](
        logits, logits.stride(0), *targets, temperature, top_k, top_p, min_p, stride,
        seeds, seeds.stride(0), *segments, chosen, chosen_masses, *out,
        known, 0 if known is None else known.stride(0), vocab_size, num_segments,
        SEGMENT=SEGMENT, BLOCK=triton.next_power_of_2(num_segments), LOOK=SEGMENTS_PER_LOOK,
        num_warps=16, **launch_options(logits.device),
    )  # fmt: skip
