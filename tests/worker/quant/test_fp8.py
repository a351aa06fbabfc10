"""FP8 products against the numbers they mean, in float64."""

import pytest
import torch
from torch import Tensor

from nanovllm.checkpoint.quantization import WeightFormat
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.quant import fp8
from nanovllm.worker.quant.fp8 import E4M3, FP8, NATIVE_FP8, Fp8, NativeFp8, quantize_rows
from nanovllm.worker.quant.scaled_rows import QuantizedRows

CPU = torch.device("cpu")
SIZES = torch.logspace(-4, 2, 32)[:, None]  # of rows


def meant(rows: QuantizedRows) -> Tensor:
    return rows.values.double() * rows.scale.double()


def random_linear(dtype: torch.dtype, *, bias: bool) -> tuple[Linear, Tensor]:
    """Quantized, and the matrix it means."""
    rows = quantize_rows(torch.randn(32, 48) * SIZES)
    biases = torch.randn(32, dtype=dtype) if bias else None
    return Linear(rows.values, biases, {}, 0, FP8, rows.scale[:, 0]), meant(rows)


def test_rows_keep_three_bits_whatever_their_size() -> None:
    x = torch.randn(32, 480) * SIZES
    rows = quantize_rows(x)
    assert rows.values.dtype == E4M3 and rows.scale.shape == (32, 1)
    assert (rows.values.float().abs().amax(-1) == fp8.E4M3_MAX).all()
    peaks = x.abs().amax(-1, keepdim=True)
    # Half a unit in the last place; below 2**-6 of 448 numbers are 2**-9 apart.
    bound = (x.abs() * 2**-4).maximum(peaks / fp8.E4M3_MAX * 2**-10)
    assert ((meant(rows) - x).abs() <= bound * 1.001).all()


def test_rows_of_zeros_and_of_tiny_numbers() -> None:
    rows = quantize_rows(torch.tensor([[0.0, 0.0], [1e-30, -1e-38]]))
    assert (rows.values.float() == 0).all() and rows.scale.isfinite().all()
    assert (rows.scale > 0).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_product(dtype: torch.dtype, bias: bool) -> None:
    linear, weight = random_linear(dtype, bias=bias)
    x = torch.randn(5, 48).to(dtype)
    expected = meant(quantize_rows(x)) @ weight.T
    if linear.bias is not None:
        expected += linear.bias.double()
    out = linear(x)
    assert out.dtype == dtype and out.shape == (5, 32)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert (out - expected).norm() <= tolerance * expected.norm()


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch multiplies FP8 by rows on a CPU since 2.12"
)
@pytest.mark.parametrize("bias", [False, True])
def test_native_product_means_the_same(bias: bool) -> None:
    """torch multiplies so on a CPU as well, only not faster."""
    linear, _ = random_linear(torch.bfloat16, bias=bias)
    x = torch.randn(5, 48).bfloat16()
    plain, native = FP8.apply(linear, x).float(), NATIVE_FP8.apply(linear, x).float()
    assert (native - plain).norm() <= 8e-3 * plain.norm()


@pytest.mark.parametrize(
    ("dtype", "size", "is_native"),
    [
        (torch.bfloat16, 48, True),
        (torch.bfloat16, 40, False),
        (torch.float16, 48, False),
        (torch.float32, 48, False),
    ],
)
def test_native_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int, is_native: bool
) -> None:
    assert not fp8.has_native_fp8(CPU)
    monkeypatch.setattr(fp8, "has_native_fp8", lambda device: True)
    linear = Linear.empty(
        size, {"o": 32}, bias=True, shard_axis=1, dtype=dtype, device=torch.device("meta")
    )
    linear.method = fp8.method_for(WeightFormat("fp8"), linear, CPU)
    linear.method.create(linear, CPU)
    assert linear.method == (NativeFp8(is_copied=True) if is_native else FP8)
    assert type(linear.method) is (NativeFp8 if is_native else Fp8)
    assert linear.weight.device == CPU and linear.weight.dtype == E4M3
    assert linear.scale is not None and linear.scale.shape == (32,)
    assert linear.bias is not None and linear.bias.dtype == dtype
    assert (linear.bias == 0).all()


@pytest.mark.parametrize("part", ["down", "expert_down"])
@pytest.mark.parametrize("num_outputs", [4096, 8192])
def test_which_layers_are_copied(
    monkeypatch: pytest.MonkeyPatch, part: str, num_outputs: int
) -> None:
    """Small ones, and none of experts, which are many."""
    monkeypatch.setattr(fp8, "has_native_fp8", lambda device: True)
    linear = Linear.empty(
        1024, {part: num_outputs}, bias=False, shard_axis=1, dtype=torch.bfloat16,
        device=torch.device("meta"),
    )  # fmt: skip
    method = fp8.method_for(WeightFormat("fp8"), linear, CPU)
    is_copied = part == "down" and num_outputs == 4096
    assert method == NativeFp8(is_copied=is_copied)


def test_a_copy_means_the_weights_whichever_comes_last() -> None:
    linear = Linear.empty(
        48, {"gate": 16, "up": 32}, bias=False, shard_axis=0, dtype=torch.bfloat16,
        device=torch.device("meta"),
    )  # fmt: skip
    linear.method = NativeFp8("channel", is_copied=True)
    linear.method.create(linear, CPU)
    rows = quantize_rows(torch.randn(48, 48) * SIZES.repeat(2, 1)[:48])
    values = {"gate": slice(0, 16), "up": slice(16, 48)}
    for slot in reversed(list(linear.method.slots(linear))):
        tensor = rows.values if slot.kind == "weight" else rows.scale
        slot.write(tensor[values[slot.part]])
    assert linear.copy is not None
    assert torch.equal(linear.copy.weight, meant(rows).bfloat16())
