"""Mixtures of experts in Triton against plain torch: routers, and the products of those chosen."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.checkpoint.spec import ClampedSwiGLU, MoE, Router
from nanovllm.worker.kernels.torch.layer_kernels import TorchKernels
from nanovllm.worker.kernels.triton.expert_routing import (
    block_counter,
    most_blocks,
    route,
    sort_by_expert,
)
from nanovllm.worker.kernels.triton.expert_tuning import tiles_for
from nanovllm.worker.kernels.triton.layer_kernels import TritonKernels
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.layers.moe import Experts, choose
from nanovllm.worker.quant import mxfp4
from nanovllm.worker.quant.fp8 import E4M3, FP8, quantize_rows
from tests.worker.kernels.triton_device import DEVICE

# The interpreter multiplies no bfloat16.
HALVES = [torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
HIDDEN, INNER = 72, 40  # no powers of two, and less than a tile
ROUTERS = {
    "softmax": Router(),
    "renormalized": Router(renormalizes=True),
    "scaled": Router(scale=2.5),
    "sigmoid": Router(scores="sigmoid", corrects=True, renormalizes=True, scale=1.5),
    "factors": Router(renormalizes=True, norms=True),
    "groups": Router(scores="sigmoid", corrects=True, num_groups=3, top_groups=2),
}


def spec_of(router: Router, **differences: Any) -> MoE:
    fields = {"num_experts": 12, "top_k": 3, "intermediate_size": INNER, **differences}
    return MoE(router=router, **fields)


def random_stack(num_rows: int, num_inputs: int, dtype: torch.dtype, *, bias: bool) -> Linear:
    weight = torch.randn(num_rows, num_inputs) * num_inputs**-0.5
    added = (torch.randn(num_rows) * 0.3).to(DEVICE, dtype) if bias else None
    return Linear(weight.to(DEVICE, dtype), added, {}, 0)


def make_experts(spec: MoE, dtype: torch.dtype = torch.float32, hidden: int = HIDDEN) -> Experts:
    """Random ones, stacked, on the device; those of `each` are views."""
    inner, count = spec.intermediate_size, spec.num_experts
    stacks = (
        random_stack(count * 2 * inner, hidden, dtype, bias=spec.bias),
        random_stack(count * hidden, inner, dtype, bias=spec.bias),
    )
    correction = torch.randn(count, device=DEVICE) * 0.2 if spec.router.corrects else None
    factors = torch.rand(count, device=DEVICE) + 0.5 if spec.router.norms else None
    return Experts(spec, views(stacks, count), stacks, correction, factors)


def views(stacks: tuple[Linear, Linear], count: int) -> list[tuple[Linear, Linear]]:
    """Of each expert."""
    both = []
    for stack in stacks:
        biases = [None] * count if stack.bias is None else stack.bias.chunk(count)
        weights = stack.weight.chunk(count)
        both.append([Linear(*one, {}, 0) for one in zip(weights, biases, strict=True)])
    return list(zip(*both, strict=True))


def widened(experts: Experts) -> Experts:
    """The same in float32."""
    assert experts.stacked is not None
    first, second = (
        Linear(stack.weight.float(), None if stack.bias is None else stack.bias.float(), {}, 0)
        for stack in experts.stacked
    )
    each = views((first, second), experts.spec.num_experts)
    return Experts(experts.spec, each, correction=experts.correction, factors=experts.factors)


def inputs(
    spec: MoE, num_tokens: int, dtype: torch.dtype = torch.float32, size: int = HIDDEN
) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(num_tokens, size).to(DEVICE, dtype)
    return hidden, torch.randn(num_tokens, spec.num_experts).to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert not block_counter(DEVICE).any(), "the next layer counts from zero"


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("num_tokens", [1, 5, 33])
def test_routers(name: str, num_tokens: int) -> None:
    spec = spec_of(ROUTERS[name])
    experts = make_experts(spec)
    _, logits = inputs(spec, num_tokens)
    found = route(logits, spec, experts.correction, experts.factors)
    weights, chosen = choose(logits, spec.router, spec.top_k, experts.correction, experts.factors)
    assert torch.equal(found.experts.long(), chosen)
    torch.testing.assert_close(found.weights, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of NaN - NaN
def test_equal_logits_choose_different_experts() -> None:
    spec = spec_of(Router(renormalizes=True))
    for value in (0.0, float("nan")):
        found = route(torch.full((2, 12), value, device=DEVICE), spec, None).experts
        assert ((found >= 0) & (found < 12)).all()
    assert route(torch.zeros(1, 12, device=DEVICE), spec, None).experts.unique().numel() == 3


@pytest.mark.parametrize(("num_tokens", "block_m"), [(2, 16), (7, 16), (64, 16), (700, 32)])
@pytest.mark.parametrize("spread", ["random", "one"])
def test_sorting(num_tokens: int, block_m: int, spread: str) -> None:
    """Every pair is in one block, with others of its expert only; blocks are as few as can be."""
    spec = spec_of(Router())
    logits = torch.randn(num_tokens, 12, device=DEVICE)
    if spread == "one":
        logits[:, 4] = 50.0
    routed = route(logits, spec, None)
    blocks = sort_by_expert(routed, 12, block_m)
    count = int(blocks.num_blocks)
    counts = torch.bincount(routed.experts.flatten().long(), minlength=12)
    assert count == int((counts / block_m).ceil().sum()) <= blocks.most_blocks
    found = []
    for block in range(count):
        pairs = blocks.pairs[block, : int(blocks.block_sizes[block])]
        assert (routed.experts.flatten()[pairs.long()] == blocks.block_experts[block]).all()
        found += pairs.tolist()
    assert sorted(found) == list(range(num_tokens * 3))
    with torch.inference_mode():  # as whoever made it may have been in
        blocks.num_blocks.zero_()


def test_most_blocks_is_a_bound() -> None:
    assert most_blocks(8, 128, 16) == 8  # each with an expert of its own
    assert most_blocks(1, 128, 16) == 1
    assert most_blocks(65536, 128, 128) == 512 + 127


@pytest.mark.parametrize(("has_room", "kib"), [(True, 200), (False, 99)])
@pytest.mark.parametrize("pairs", [1, 20, 60, 500])
@pytest.mark.parametrize("bits", [4, 16])
def test_tiles_fit_into_shared_memory(bits: int, pairs: int, has_room: bool, kib: int) -> None:
    """Those of 4 bits with a tile of what they become besides."""
    tiles = tiles_for(pairs, bits=bits, has_room=has_room)
    for tile, halves in zip(tiles, (2, 1), strict=True):
        width = halves * tile.block_n
        stage_bytes = tile.block_k * (2 * tile.block_m + width * bits // 8)
        wide_bytes = 2 * width * tile.block_k if bits == 4 else 0
        assert tile.stages * stage_bytes + wide_bytes <= kib * 1024


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 40, 131])
def test_products(num_tokens: int, activation: Any) -> None:
    """Few tokens leave most experts empty; many fill more than one block of each."""
    spec = spec_of(Router(renormalizes=True), activation=activation)
    experts = make_experts(spec)
    hidden, logits = inputs(spec, num_tokens)
    residual = torch.randn_like(hidden)
    expected = TorchKernels().experts(hidden, logits, experts)
    found = TritonKernels().experts(hidden, logits, experts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found = TritonKernels().experts(hidden, logits, experts, residual=residual)
    torch.testing.assert_close(found, expected + residual, rtol=1e-5, atol=1e-5)


CLAMPED = {"bias": True, "takes_turns": True, "clamped": ClampedSwiGLU(1.702, 0.8)}


@pytest.mark.parametrize("differences", [CLAMPED, {"bias": True}, {"takes_turns": True}])
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_biases_turns_and_clamps(num_tokens: int, differences: dict[str, Any]) -> None:
    spec = spec_of(Router(renormalizes=True), **differences)
    experts = make_experts(spec)
    hidden, logits = inputs(spec, num_tokens)
    expected = TorchKernels().experts(hidden, logits, experts)
    found = TritonKernels().experts(hidden, logits, experts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 7, 30, 70])
def test_mxfp4_weights(num_tokens: int) -> None:
    """As gpt-oss has them; 3 blocks of 32 inputs hang over a tile."""
    spec = spec_of(Router(renormalizes=True), intermediate_size=96, **CLAMPED)
    experts = make_experts(spec, hidden=96)
    assert experts.stacked is not None
    packed = [mxfp4.round_to_nearest(stack.weight) for stack in experts.stacked]
    for stack, (weight, scale) in zip(experts.stacked, packed, strict=True):
        stack.weight.copy_(mxfp4.dequantize(weight, scale, torch.float32))
    hidden, logits = inputs(spec, num_tokens, size=96)
    expected = TorchKernels().experts(hidden, logits, experts)
    for stack, (weight, scale) in zip(experts.stacked, packed, strict=True):
        stack.weight, stack.scale = weight, scale
    found = TritonKernels().experts(hidden, logits, experts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 50, 300])
def test_one_expert_takes_all(num_tokens: int) -> None:
    spec = spec_of(Router(), top_k=1)
    experts = make_experts(spec)
    hidden, logits = inputs(spec, num_tokens)
    logits[:, 5] = 60.0
    expected = TorchKernels().experts(hidden, logits, experts)
    found = TritonKernels().experts(hidden, logits, experts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def unset_is_nan() -> Iterator[None]:
    """New memory holds NaN, so that reading what nobody has written shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("differences", [{}, CLAMPED])
@pytest.mark.parametrize("num_tokens", [1, 2, 40])
@pytest.mark.usefixtures("unset_is_nan")
def test_experts_that_are_elsewhere(num_tokens: int, differences: dict[str, Any]) -> None:
    """What two ranks make of their own, 5 and 7 of 12, adds up to what one makes of all."""
    spec = spec_of(Router(renormalizes=True, norms=True), **differences)
    whole = make_experts(spec)
    hidden, logits = inputs(spec, num_tokens)
    expected = TorchKernels().experts(hidden, logits, whole)
    total = torch.zeros_like(expected)
    for first, end in ((0, 5), (5, 12)):
        own = some_of(whole, first, end)
        found = TritonKernels().experts(hidden, logits, own)
        torch.testing.assert_close(
            found, TorchKernels().experts(hidden, logits, own), rtol=1e-5, atol=1e-5
        )
        total += found
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("num_tokens", [1, 20])
@pytest.mark.usefixtures("unset_is_nan")
def test_all_experts_of_a_token_may_be_elsewhere(num_tokens: int) -> None:
    """They take no block: nothing is multiplied for them."""
    spec = spec_of(Router(renormalizes=True))
    own = some_of(make_experts(spec), 0, 4)
    hidden, logits = inputs(spec, num_tokens)
    logits[:, :4] = -50.0
    assert not TritonKernels().experts(hidden, logits, own).any()
    routed = route(logits, spec, None, own=own.own)
    assert (routed.experts == -1).all()
    assert not sort_by_expert(routed, 4, 16).num_blocks.any()


def some_of(whole: Experts, first: int, end: int) -> Experts:
    """Experts first to end - 1, as a rank has them that holds no others."""
    assert whole.stacked is not None
    count = whole.spec.num_experts

    def rows(stack: Linear) -> Linear:
        size = len(stack.weight) // count
        own = slice(first * size, end * size)
        bias = None if stack.bias is None else stack.bias[own].clone()
        return Linear(stack.weight[own].clone(), bias, {}, 0)

    gate_up, down = map(rows, whole.stacked)
    each = views((gate_up, down), end - first)
    return Experts(whole.spec, each, (gate_up, down), whole.correction, whole.factors, first)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("num_tokens", [1, 9, 70])
def test_half_precision(num_tokens: int, dtype: torch.dtype) -> None:
    spec = spec_of(Router(renormalizes=True))
    experts = make_experts(spec, dtype)
    wide = widened(experts)
    errors = torch.zeros(2)
    for _ in range(8 if num_tokens == 1 else 1):  # the error of a single token is much by chance
        hidden, logits = inputs(spec, num_tokens, dtype)
        exact = TorchKernels().experts(hidden.float(), logits.float(), wide)
        for index, kernels in enumerate((TorchKernels(), TritonKernels())):
            found = kernels.experts(hidden, logits, experts).float()
            errors[index] += (found - exact).square().sum().cpu()
    theirs, ours = errors.sqrt()
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("num_tokens", [1, 9, 70])
def test_fp8_weights(num_tokens: int) -> None:
    """Tokens stay as they are: only weights are e4m3, with a scale for each row."""
    spec = spec_of(Router(renormalizes=True))
    experts = make_experts(spec)
    assert experts.stacked is not None
    for stack in experts.stacked:
        rows = quantize_rows(stack.weight)
        stack.weight.copy_(rows.values.float() * rows.scale)
        stack.method, stack.scale = FP8, rows.scale[:, 0]
    hidden, logits = inputs(spec, num_tokens)
    expected = TorchKernels().experts(hidden, logits, widened(experts))
    for stack in experts.stacked:
        assert stack.scale is not None
        stack.weight = (stack.weight / stack.scale[:, None]).to(E4M3)
    found = TritonKernels().experts(hidden, logits, experts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
