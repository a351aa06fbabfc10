"""The fused sampler of ranks that each hold a slice of the vocabulary (`sampling.slices`).

The runner calls `sample_slices` for rows that truncate nothing. Three numbers a row go from rank to
rank instead of all logits, and all ranks write the same ids. Nothing here asks the host anything.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.worker.kernels.triton.fused_sampler import (
    arrival_times,
    entry_of,
    load_segment,
    measure_segments,
    pick_largest,
    pick_winner,
    sharpness_of,
)
from nanovllm.worker.kernels.triton.launch import launch_options
from nanovllm.worker.layers.vocabulary import Vocabulary
from nanovllm.worker.parallel import SEGMENT
from nanovllm.worker.sampling.slices import NUM_WORDS


@triton.jit
def _candidates_kernel(
    logits, logits_stride, rows, positions,  # as in `segments_kernel`, and [n] integers
    temperature, column_stride,
    seeds,  # [num_rows] int64, stride seed_stride
    seed_stride, maxima, masses,
    found,  # [n, WORDS] fp32, out
    first_segment, num_ids, num_segments,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `sampling.slices.candidates`, a program per row."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    entry, row, position, warmth = entry_of(rows, positions, temperature, column_stride)
    row_logits = logits + entry * logits_stride
    segments = tl.arange(0, BLOCK)
    present = segments < num_segments
    place = entry * num_segments + segments
    peaks = tl.load(maxima + place, present, other=float("-inf"))
    largest = tl.max(peaks, 0)
    base = tl.maximum(largest, -1e30)  # a slice may hold nothing but -inf
    speed = 0.0
    if warmth <= 0:
        token = pick_largest(row_logits, peaks, segments, num_segments, num_ids, SEGMENT)
    else:
        sharpness = sharpness_of(warmth)
        seed = tl.load(seeds + row * seed_stride)
        mass = tl.load(masses + place, present, other=0.0) * tl.exp2((peaks - base) * sharpness)
        times = arrival_times(seed, position, SEGMENT + first_segment + segments)
        speeds = tl.where(mass > 0, mass / times, 0.0)
        speed = tl.max(speeds, 0)
        segment = tl.argmax(speeds, 0)
        _, x = load_segment(row_logits, segment, num_ids, SEGMENT)
        weights = tl.exp2((x - base) * sharpness)
        inside = pick_winner(weights, seed, position, tl.arange(0, SEGMENT))
        token = segment * SEGMENT + inside
    mine = found + entry * WORDS
    tl.store(mine, largest)
    tl.store(mine + 1, speed)
    tl.store(mine + 2, (first_segment * SEGMENT + token).to(tl.float32))  # exact below 2^24


@triton.jit
def _join_kernel(
    parts,  # [SIZE, n, WORDS] fp32
    rows, positions, temperature, column_stride,
    token_ids,  # [n] int64, out
    known,  # [num_rows, …] int32, stride known_stride: tokens go there at their positions
    known_stride, n,
    SIZE: tl.constexpr, LANES: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `sampling.slices.join`, a program per row."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    entry, row, position, warmth = entry_of(rows, positions, temperature, column_stride)
    lanes = tl.arange(0, LANES)
    present = lanes < SIZE
    theirs = parts + (lanes * n + entry) * WORDS
    peaks = tl.load(theirs, present, other=float("-inf"))
    score = peaks
    if warmth > 0:
        away = (peaks - tl.max(peaks, 0)) * sharpness_of(warmth)
        score = tl.load(theirs + 1, present, other=0.0) * tl.exp2(away)
        score = tl.where(present, score, -1.0)
    token = tl.load(theirs + 2, present, other=0.0)
    best = tl.min(tl.where(score == tl.max(score, 0), lanes, SIZE - 1), 0)
    token = tl.sum(tl.where(lanes == best, token, 0.0), 0)
    tl.store(token_ids + entry, token.to(tl.int64))
    tl.store(known + row * known_stride + position, token.to(tl.int32))


def sample_slices(
    logits: Tensor,
    *,
    vocabulary: Vocabulary,
    targets: tuple[Tensor, Tensor],
    columns: Mapping[str, Tensor],
    seeds: Tensor,
    known: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """As `fused_sampler.sample_tokens` of rows that truncate nothing; every rank calls it.

    logits: [n, ids of this rank] of any float type. targets: rows and positions. Returns [n] int64,
    the same on all ranks.
    """
    rows, positions = targets
    parallel, temperature = vocabulary.parallel, columns["temperature"]
    n, device, stride = len(logits), logits.device, temperature.stride(0)
    options = launch_options(device)
    parts = torch.zeros(parallel.size, n, NUM_WORDS, device=device)
    mine = parts[parallel.rank]
    if vocabulary.cut.size:
        _find_candidates(logits, vocabulary, mine, rows, positions, temperature, seeds)
    else:
        mine[:, 0] = -torch.inf
    parts = parallel.reduce(parts)  # to which the others add zeros, exactly
    token_ids = torch.empty(n, dtype=torch.int64, device=device) if out is None else out
    _join_kernel[(n,)](
        parts, rows, positions, temperature, stride, token_ids, known, known.stride(0), n,
        SIZE=parallel.size, LANES=triton.next_power_of_2(parallel.size), WORDS=NUM_WORDS,
        num_warps=1, **options,
    )  # fmt: skip
    return token_ids


def _find_candidates(
    logits: Tensor,
    vocabulary: Vocabulary,
    found: Tensor,
    rows: Tensor,
    positions: Tensor,
    temperature: Tensor,
    seeds: Tensor,
) -> None:
    """found: [n, NUM_WORDS], contiguous, out."""
    n, num_ids = logits.shape
    num_segments, stride = triton.cdiv(num_ids, SEGMENT), temperature.stride(0)
    maxima, masses = torch.empty(2, n, num_segments, device=logits.device)
    measure_segments(logits, rows, temperature, maxima, masses)
    _candidates_kernel[(n,)](
        logits, logits.stride(0), rows, positions, temperature, stride, seeds, seeds.stride(0),
        maxima, masses, found, vocabulary.cut.start // SEGMENT, num_ids, num_segments,
        SEGMENT=SEGMENT, BLOCK=triton.next_power_of_2(num_segments), WORDS=NUM_WORDS,
        num_warps=16, **launch_options(logits.device),
    )  # fmt: skip
