"""Which experts tokens go to, and tokens sorted by expert: what `experts` multiplies by.

Nothing here is known to the host: grids and buffers are as large as the worst case, and what is
not used is skipped on the device. `layers.moe.choose` is the oracle.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.checkpoint.spec import MoE
from nanovllm.worker.kernels.triton.launch import launch_options
from nanovllm.worker.layers import moe
from nanovllm.worker.parallel import Cut

LEAST_SUM = tl.constexpr(moe.LEAST_SUM)
SORT_BLOCK = 2048  # pairs that a program looks at at a time


class Routed(NamedTuple):
    """A pair is a token and one of its experts: number token * top_k + place.

    experts: numbered among those that are here; -1: it is elsewhere.
    """

    weights: Tensor  # [num_tokens, top_k] fp32
    experts: Tensor  # [num_tokens, top_k] int32


class Sorted(NamedTuple):
    """Pairs in blocks of one expert each, in no certain order of experts."""

    pairs: Tensor  # [blocks, block_m] int32
    block_experts: Tensor  # [blocks] int32
    block_sizes: Tensor  # [blocks] int32: how many of its pairs are there
    num_blocks: Tensor  # [1] int32; whoever reads all of this last makes it 0 again
    block_m: int

    @property
    def most_blocks(self) -> int:
        return len(self.block_experts)


@triton.jit
def _best_groups(keys, lanes, real, num_experts, NUM_GROUPS: tl.constexpr,
                 TOP_GROUPS: tl.constexpr):  # fmt: skip
    """Keys of experts whose group is not among those whose two best add up to the most are lost."""
    group_of = lanes // (num_experts // NUM_GROUPS)
    GROUPS: tl.constexpr = triton.next_power_of_2(NUM_GROUPS)  # noqa: N806
    groups = tl.arange(0, GROUPS)
    sums = tl.full([GROUPS], float("-inf"), tl.float32)
    for group in tl.static_range(NUM_GROUPS):
        own = tl.where((group_of == group) & real, keys, float("-inf"))
        best = tl.argmax(own, 0)
        others = tl.where(lanes == best, float("-inf"), own)
        sums = tl.where(groups == group, tl.max(own, 0) + tl.max(others, 0), sums)
    kept = lanes < 0
    for _ in tl.static_range(TOP_GROUPS):
        best = tl.argmax(sums, 0)
        kept = kept | (group_of == best)
        sums = tl.where(groups == best, float("-inf"), sums)
    return tl.where(kept, keys, float("-inf"))


@triton.jit
def _route_kernel(
    logits,  # [num_tokens, num_experts]
    correction, factors,  # [num_experts] fp32, or None
    weights,  # [num_tokens, TOP_K] fp32
    experts,  # [num_tokens, TOP_K] int32
    num_experts, first, num_own, weight_scale,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, SIGMOID: tl.constexpr, RENORMALIZES: tl.constexpr,
    NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program per token."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    real = lanes < num_experts
    x = tl.load(logits + token * num_experts + lanes, real, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = 1 / (1 + tl.exp(-x))
    else:
        scores = tl.exp(x - tl.max(x, 0))
        scores = scores / tl.sum(scores, 0)
    keys = scores
    if correction is not None:
        keys += tl.load(correction + lanes, real, other=0.0)
    keys = tl.where(real, keys, float("-inf"))
    if NUM_GROUPS > 1:
        keys = _best_groups(keys, lanes, real, num_experts, NUM_GROUPS, TOP_GROUPS)
    PLACES: tl.constexpr = triton.next_power_of_2(TOP_K)  # noqa: N806
    places = tl.arange(0, PLACES)
    chosen = tl.zeros([PLACES], tl.int32)
    chosen_scores = tl.zeros([PLACES], tl.float32)
    for place in tl.static_range(TOP_K):
        # Where all numbers are NaN, any expert will do, but it has to be one.
        best = tl.minimum(tl.argmax(keys, 0), num_experts - 1)
        score = tl.sum(tl.where(lanes == best, scores, 0.0), 0)
        chosen = tl.where(places == place, best, chosen)
        chosen_scores = tl.where(places == place, score, chosen_scores)
        keys = tl.where(lanes == best, float("-inf"), keys)
    if RENORMALIZES:
        chosen_scores = chosen_scores / tl.maximum(tl.sum(chosen_scores, 0), LEAST_SUM)
    there = token * TOP_K + places
    if factors is not None:
        chosen_scores *= tl.load(factors + chosen, places < TOP_K, other=0.0)
    own = chosen - first
    own = tl.where((own >= 0) & (own < num_own), own, -1)
    tl.store(experts + there, own, places < TOP_K)
    tl.store(weights + there, chosen_scores * weight_scale, places < TOP_K)


@triton.jit(do_not_specialize=["num_pairs"])
def _sort_kernel(
    experts,  # [num_pairs] int32
    pairs, block_experts, block_sizes, num_blocks,  # of `Sorted`
    num_pairs,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program per expert: counts its pairs, takes as many blocks, and fills them."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    count = 0
    for start in range(0, num_pairs, BLOCK):
        found = tl.load(experts + start + lanes, start + lanes < num_pairs, other=-1)
        count += tl.sum((found == expert).to(tl.int32), 0)
    if count > 0:
        needed = (count + BLOCK_M - 1) // BLOCK_M
        first = tl.atomic_add(num_blocks, needed, sem="relaxed")
        for start in range(0, needed, BLOCK):
            blocks = start + lanes
            tl.store(block_experts + first + blocks, expert, blocks < needed)
            sizes = tl.minimum(count - blocks * BLOCK_M, BLOCK_M)
            tl.store(block_sizes + first + blocks, sizes, blocks < needed)
        seen = 0
        for start in range(0, num_pairs, BLOCK):
            found = tl.load(experts + start + lanes, start + lanes < num_pairs, other=-1)
            own = (found == expert).to(tl.int32)
            places = first * BLOCK_M + seen + tl.cumsum(own, 0) - 1
            tl.store(pairs + places, start + lanes, own > 0)
            seen += tl.sum(own, 0)


def route(
    logits: Tensor,
    spec: MoE,
    correction: Tensor | None,
    factors: Tensor | None = None,
    own: Cut | None = None,
) -> Routed:
    """logits: [num_tokens, num_experts]; correction, factors and own: as of `Experts`. None: all
    experts are here."""
    own = own or Cut.all_of(spec.num_experts)
    num_tokens, router = len(logits), spec.router
    assert logits.is_contiguous() and logits.shape[1] == spec.num_experts
    shape = num_tokens, spec.top_k
    routed = Routed(
        logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)
    )
    _route_kernel[(num_tokens,)](
        logits, correction, factors, *routed, spec.num_experts, own.start, own.size, router.scale,
        TOP_K=spec.top_k, BLOCK=triton.next_power_of_2(spec.num_experts),
        SIGMOID=router.scores == "sigmoid", RENORMALIZES=router.renormalizes,
        NUM_GROUPS=router.num_groups, TOP_GROUPS=router.top_groups,
        num_warps=1, **launch_options(logits.device),
    )  # fmt: skip
    return routed


def most_blocks(num_pairs: int, num_experts: int, block_m: int) -> int:
    """How many blocks there can be, however pairs are spread over experts."""
    num_hit = min(num_experts, num_pairs)
    return (num_pairs + num_hit * (block_m - 1)) // block_m


def sort_by_expert(routed: Routed, num_experts: int, block_m: int) -> Sorted:
    """Blocks of `block_m` pairs that go to the same expert. num_experts: that are here."""
    experts, num_pairs = routed.experts, routed.experts.numel()
    most = most_blocks(num_pairs, num_experts, block_m)
    blocks = Sorted(
        experts.new_empty(most, block_m),
        experts.new_empty(most),
        experts.new_empty(most),
        block_counter(experts.device),
        block_m,
    )
    block = min(SORT_BLOCK, triton.next_power_of_2(num_pairs))
    _sort_kernel[(num_experts,)](
        experts, *blocks[:4], num_pairs,
        BLOCK_M=block_m, BLOCK=block, num_warps=min(8, max(1, block // 128)),
        **launch_options(experts.device),
    )  # fmt: skip
    return blocks


@cache
def block_counter(device: torch.device) -> Tensor:
    """[1] int32, zero between the layers of a step, which share it."""
    return torch.zeros(1, dtype=torch.int32, device=device)
