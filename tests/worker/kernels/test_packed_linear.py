"""Triton's products with packed weights against float64 of what the weights mean."""

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.checkpoint.quantization import (
    GGUF_FORMATS,
    Scheme,
    WeightFormat,
    choose_scheme,
    scheme_for,
)
from nanovllm.checkpoint.spec import Activation
from nanovllm.worker.kernels.base import Residual
from nanovllm.worker.kernels.torch.layer_kernels import TorchKernels
from nanovllm.worker.kernels.triton import products
from nanovllm.worker.kernels.triton.layer_kernels import TritonKernels
from nanovllm.worker.kernels.triton.packed_linear import (
    PackedTile,
    can_multiply,
    fewest_unpacked,
    has_fixed_lanes,
    packed_add,
    packed_linear,
    unpacked,
)
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.quant.packed import Packed, PackedWeight, pack_nibbles
from nanovllm.worker.quant.rounding import Rounded
from tests.worker.attention.decoding import Driver
from tests.worker.kernels.gating import ACTIVATIONS
from tests.worker.kernels.test_skinny_linear import rms_normed
from tests.worker.kernels.triton_device import DEVICE
from tests.worker.quant.layouts import FORMATS, write
from tests.worker.quant.test_gguf_blocks import keep, random_tensor
from tests.worker.test_weights import as_gguf, wider

KINDS = {
    "4 bits": {"bits": 4},
    "4 bits, zeros": {"bits": 4, "has_zeros": True},
    "4 bits, shifts": {"bits": 4, "shifts": True},
    "8 bits": {"bits": 8},
    "8 bits, zeros": {"bits": 8, "has_zeros": True},
    "8 bits, shifts": {"bits": 8, "shifts": True},
    "e4m3": {"bits": 8, "is_float": True},
}
GROUPS = [32, 64, 128, 0]
VECTOR_TILES = [PackedTile(8, 64, warps=4), PackedTile(4, 256, warps=4)]
MATRIX_TILES = [
    PackedTile(32, 64, warps=4, block_m=16),
    PackedTile(16, 128, warps=4, splits=2, block_m=16),
    PackedTile(64, 32, warps=4, splits=2, block_m=8),  # several tiles of a group
]
CASES = [(1, tile) for tile in VECTOR_TILES] + [(m, tile) for m in (2, 19) for tile in MATRIX_TILES]
# Triton's interpreter cuts off what bfloat16 has no room for, and multiplies no matrices of it.
HALVES = [torch.float16] if DEVICE.type == "cpu" else [torch.float16, torch.bfloat16]
TOLERANCE = 2e-6 if DEVICE.type == "cpu" else 1e-5


def packed(kind: str, group: int, shape: tuple[int, int], *, bias: bool = False) -> Linear:
    """A layer of random codes, scales and zeros."""
    fields = dict(KINDS[kind])
    shifts = fields.pop("shifts", False)
    kept = WeightFormat("packed", "group", group=group, **fields)  # type: ignore[arg-type]
    weight = PackedWeight.empty(kept, shape, torch.float32, DEVICE)
    if kept.bits == 4:
        weight.codes.copy_(pack_nibbles(torch.randint(0, 16, shape, device=DEVICE)))
    elif kept.is_float:
        weight.codes.copy_(torch.randn(shape, device=DEVICE) * 30)
    else:
        weight.codes.copy_(torch.randint(-128, 128, shape, device=DEVICE))
    weight.scale = torch.rand(weight.scale.shape, device=DEVICE).half() / 2**kept.bits
    if weight.zero is not None:
        weight.zero.copy_(torch.randint(0, 16, weight.zero.shape, device=DEVICE))
    if shifts:
        weight.shift = torch.randn(weight.scale.shape, device=DEVICE).half()
    method = Packed(kept, Rounded(), torch.float32, _weight=weight)
    biases = torch.randn(shape[0], device=DEVICE) if bias else None
    return Linear(torch.empty(shape, device="meta"), biases, {}, 0, method)


def weight_of(linear: Linear) -> PackedWeight:
    assert isinstance(linear.method, Packed)
    return linear.method.weight


def meaning(linear: Linear) -> Tensor:
    return weight_of(linear).dequantize().double()


def assert_near(out: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert out.shape == expected.shape
    assert (out - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_linear(kind: str, group: int, num_tokens: int) -> None:
    """By the tiles that are chosen for such a layer, of sizes that nothing divides."""
    linear = packed(kind, group, (45, 200), bias=True)
    x = torch.randn(num_tokens, 200, device=DEVICE)
    assert linear.bias is not None
    assert_near(packed_linear(x, linear), x.double() @ meaning(linear).T + linear.bias)


@pytest.mark.parametrize("kind", ["4 bits, zeros", "8 bits, shifts"])
@pytest.mark.parametrize(("num_tokens", "tile"), CASES)
def test_tiles(kind: str, num_tokens: int, tile: PackedTile) -> None:
    """With a residual; twice the same."""
    linear = packed(kind, 64, (40, 192), bias=True)
    x, residual = torch.randn(num_tokens, 232, device=DEVICE).split((192, 40), 1)
    x, residual = x.contiguous(), residual.contiguous()
    assert linear.bias is not None
    expected = x.double() @ meaning(linear).T + linear.bias + residual
    out = packed_add(x, linear, residual, tile=tile).hidden
    assert_near(out, expected)
    assert torch.equal(out, packed_add(x, linear, residual, tile=tile).hidden)


@pytest.mark.parametrize("num_tokens", [33, 70, 130])
def test_many_tokens(num_tokens: int) -> None:
    linear = packed("4 bits, zeros", 32, (72, 160))
    x = torch.randn(num_tokens, 160, device=DEVICE)
    assert_near(packed_linear(x, linear), x.double() @ meaning(linear).T)


@pytest.mark.parametrize("kind", ["4 bits, zeros", "8 bits"])
@pytest.mark.parametrize(("num_tokens", "tile"), CASES)
@pytest.mark.parametrize("gate_by", ACTIVATIONS)
def test_gated(kind: str, num_tokens: int, tile: PackedTile, gate_by: Activation) -> None:
    linear = packed(kind, 64, (80, 192), bias=True)
    x = torch.randn(num_tokens, 192, device=DEVICE)
    assert linear.bias is not None
    gate, up = (x.double() @ meaning(linear).T + linear.bias).chunk(2, dim=1)
    out = packed_linear(x, linear, gate=gate_by, tile=tile)
    assert_near(out, ACTIVATIONS[gate_by](gate) * up)


@pytest.mark.parametrize(("num_tokens", "tile"), CASES)
@pytest.mark.parametrize("gate_by", [None, *ACTIVATIONS])
def test_one_product_weighs_the_stream_for_the_next(
    num_tokens: int, tile: PackedTile, gate_by: Activation | None
) -> None:
    x, residual = torch.randn(num_tokens, 224, device=DEVICE).split((160, 64), 1)
    x, residual, factors = x.contiguous(), residual.contiguous(), torch.randn(64, device=DEVICE)
    into, out_of = packed("4 bits", 32, (64, 160)), packed("8 bits", 32, (80, 64))
    added = packed_add(x, into, residual, next_norm=factors, tile=tile)
    assert added.weighed is not None
    values, squares, _ = added.weighed
    torch.testing.assert_close(values, added.hidden * factors, rtol=0, atol=0)
    torch.testing.assert_close(squares.sum(1), added.hidden.square().sum(1))
    out = packed_linear(values, out_of, norm=(squares, 1e-6), gate=gate_by, tile=tile)
    hidden = residual.double() + x.double() @ meaning(into).T
    expected = rms_normed(hidden, factors.double(), 1e-6) @ meaning(out_of).T
    if gate_by is not None:
        gate, up = expected.chunk(2, dim=1)
        expected = ACTIVATIONS[gate_by](gate) * up
    assert_near(out, expected, 2 * TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_unpacked_is_what_torch_makes_of_it(kind: str, dtype: torch.dtype) -> None:
    for group, shape in ((32, (21, 200)), (128, (40, 640)), (0, (5, 48))):
        weight = packed(kind, group, shape).method.weight  # type: ignore[attr-defined]
        torch.testing.assert_close(
            unpacked(weight, dtype), weight.dequantize().to(dtype), rtol=0, atol=0
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_vectors_are_looked_up_in_packed_rows(kind: str, dtype: torch.dtype) -> None:
    """As of an embedding: ids in any order, some of them twice."""
    table = packed(kind, 32, (50, 330 if kind.startswith("8") else 320))
    table.weight = torch.empty(table.weight.shape, dtype=dtype, device="meta")
    for num_ids in (1, 7, 64):
        ids = torch.randint(0, 50, (num_ids,), device=DEVICE)
        expected = meaning(table)[ids].to(dtype)
        torch.testing.assert_close(TritonKernels().lookup(ids, table), expected, rtol=0, atol=0)
        torch.testing.assert_close(TorchKernels().lookup(ids, table), expected, rtol=0, atol=0)


def test_a_head_is_unpacked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many rows, as where log-probabilities of prompts are asked for."""
    monkeypatch.setattr(products, "MOST_UNPACKED", 192 * products.SEGMENT + 1)
    for bias in (False, True):
        head = packed("8 bits, shifts", 32, (300, 192), bias=bias)
        x = torch.randn(fewest_unpacked(weight_of(head)) + 3, 192, device=DEVICE)
        expected = x.double() @ meaning(head).T
        if head.bias is not None:
            expected += head.bias
        assert_near(TritonKernels().norm_linear(Residual(x), None, head), expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("num_tokens", [1, 6, 100])
def test_half_precision(dtype: torch.dtype, num_tokens: int) -> None:
    for kind in KINDS:
        linear = packed(kind, 64, (48, 256))
        x = torch.randn(num_tokens, 256, device=DEVICE).to(dtype)
        expected = x.double() @ meaning(linear).T
        assert_near(packed_linear(x, linear), expected, 6e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [32, 0])
@pytest.mark.parametrize(
    "tile",
    [
        PackedTile(8, 1024, warps=2),
        PackedTile(4, 512, warps=2, ahead=3),
        PackedTile(2, 256, warps=1),
        PackedTile(1, 256, warps=1, ahead=9),
    ],
)
def test_one_token_becomes_integers(kind: str, group: int, tile: PackedTile) -> None:
    """Of very different sizes within the token; what is no number stays so."""
    linear = packed(kind, group, (18, 640))
    x = torch.randn(1, 640, device=DEVICE)
    x = (x * torch.logspace(-3, 1, 640, device=DEVICE)[torch.randperm(640)]).half()
    expected = x.double() @ meaning(linear).T
    assert_near(packed_linear(x, linear, tile=tile), expected, 1e-3)
    gate, up = (expected / 256).chunk(2, dim=1)
    found = packed_linear(x / 256, linear, gate="silu", tile=tile)
    assert_near(found, ACTIVATIONS["silu"](gate) * up, 4e-3)
    x[0, 77] = torch.nan
    assert packed_linear(x, linear, tile=tile).isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "tile", [PackedTile(4, 128, warps=4, ahead=3), PackedTile(2, 256, warps=4)]
)
def test_threads_of_too_few_codes_multiply_floats(kind: str, tile: PackedTile) -> None:
    """As those of models with few inputs are: an instruction takes four codes of a thread."""
    linear = packed(kind, 32, (18, 640))
    assert not has_fixed_lanes(tile, weight_of(linear).bits)
    x = torch.randn(1, 640, device=DEVICE).half()
    expected = x.double() @ meaning(linear).T
    assert_near(packed_linear(x, linear, tile=tile), expected, 1e-3)


@pytest.mark.parametrize("name", GGUF_FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_blocks_of_gguf(name: str, num_tokens: int) -> None:
    linear = keep(GGUF_FORMATS[name], random_tensor(name, rows=20), device=DEVICE)
    x = torch.randn(num_tokens, 512, device=DEVICE)
    assert_near(packed_linear(x, linear), x.double() @ meaning(linear).T)
    weight = linear.method.weight  # type: ignore[attr-defined]
    assert can_multiply(weight)
    torch.testing.assert_close(
        unpacked(weight, torch.float32), weight.dequantize(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.skipif(DEVICE.type != "cpu", reason="kernels are compiled for a GPU, drivers use none")
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # a head of its own, and a tied one
@pytest.mark.parametrize("name", ["Q4_1", "Q8_0"])
def test_a_file_with_its_embedding_and_head_as_they_are_stored(
    name: str, family: str, tmp_path: Path
) -> None:
    (source := tmp_path / "plain").mkdir()
    kind = GGMLQuantizationType[name]
    checkpoint, _ = as_gguf(
        wider(family, source), tmp_path / "m.gguf", architecture=family, kind=kind
    )
    scheme = scheme_for(checkpoint, spec_from_config(checkpoint.config()), None, is_gpu=True)
    compare_kernels(checkpoint, scheme)


def test_groups_that_kernels_do_not_read() -> None:
    for group, can in ((16, False), (96, False), (32, True), (0, True)):
        weight = packed("4 bits", group, (8, 192)).method.weight  # type: ignore[attr-defined]
        assert can_multiply(weight) == can


LAYOUTS = ["awq 32", "gptq 4 ordered", "gptq 8 all inputs", "fp8 blocks 32", "awq 16"]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="kernels are compiled for a GPU, drivers use none")
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_model_of_packed_weights(name: str, tmp_path: Path) -> None:
    """With norms, gates and residuals in the products; groups of 16 are torch's."""
    (source := tmp_path / "plain").mkdir()
    write(wider("qwen2", source), tmp_path, *FORMATS[name])
    checkpoint = Checkpoint(tmp_path, "safetensors")
    compare_kernels(checkpoint, choose_scheme(None, checkpoint.config()))


def compare_kernels(checkpoint: Checkpoint, scheme: Scheme | None) -> None:
    """Steps of many tokens, of a few and of one, by torch and by Triton."""
    ids = torch.randint(3, 160, (80,), generator=torch.Generator().manual_seed(4)).tolist()
    logits = []
    for kernels in (TorchKernels(), TritonKernels()):
        driver = Driver.load(checkpoint, scheme=scheme, kernels=kernels)
        steps = [driver.run({"one": ids[:70]}), driver.run({"one": ids[70:74], "two": ids[:2]})]
        steps.append(driver.run({"one": ids[74:75]}))
        logits.append(torch.cat([values for step in steps for values in step.values()]))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
