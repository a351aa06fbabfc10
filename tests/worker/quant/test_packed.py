"""The layout of packed weights and torch's products with them, against float64."""

import pytest
import torch
from torch import Tensor

from nanovllm.checkpoint.quantization import WeightFormat
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.parallel import Cut
from nanovllm.worker.quant import packed
from nanovllm.worker.quant.packed import (
    PackedWeight,
    pack_nibbles,
    per,
    unpack_nibbles,
    unpack_words,
)
from nanovllm.worker.quant.rounding import round_to_nearest
from nanovllm.worker.quant.select import method_for

CPU = torch.device("cpu")
KINDS = [(4, True, False), (4, False, False), (8, True, False), (8, False, False), (8, False, True)]
FORMATS = {
    f"{bits} bits, {group or 'all'}{', zeros' if zeros else ''}{', e4m3' if is_float else ''}": (
        WeightFormat("packed", "group", bits, group, has_zeros=zeros, is_float=is_float)
    )
    for bits, zeros, is_float in KINDS
    for group in (0, 16, 32, 64, 128, 192)
}


def packed_linear(
    kept: WeightFormat, shape: tuple[int, int], *, dtype: torch.dtype, bias: bool = False
) -> tuple[Linear, Tensor]:
    """Rounded from random numbers in its own groups; and those numbers."""
    outputs, inputs = shape
    linear = Linear.empty(
        inputs, {"o": outputs}, bias=bias, shard_axis=1, dtype=dtype, device=torch.device("meta")
    )
    method = packed.Packed(kept, method_for(kept, linear, CPU).layout, dtype)  # type: ignore[attr-defined]
    linear.method = method
    method.create(linear, CPU)
    values = torch.randn(shape) * torch.logspace(-2, 1, outputs)[:, None]
    (slot,) = [slot for slot in linear.slots(0) if slot.kind == "weight"]
    slot.write(values)
    if linear.bias is not None:
        linear.bias.normal_()
    return linear, values


def test_nibbles_lie_as_in_gguf() -> None:
    codes = torch.randint(0, 16, (3, 75))
    found = pack_nibbles(codes)
    assert found.shape == (3, 48) and found.dtype == torch.uint8
    assert torch.equal(found[:, 0] & 15, codes[:, 0])
    assert torch.equal(found[:, 0] >> 4, codes[:, 16])
    assert torch.equal(found[:, 17] & 15, codes[:, 33])
    assert torch.equal(unpack_nibbles(found, 75), codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_words(bits: int, axis: int) -> None:
    word = torch.tensor([[-0x12345678]], dtype=torch.int32)
    codes = unpack_words(word, bits, axis, 32 // bits)
    mask = 2**bits - 1
    expected = [(-0x12345678 & 0xFFFFFFFF) >> shift & mask for shift in range(0, 32, bits)]
    assert codes.flatten().tolist() == expected and codes.shape[axis] == 32 // bits


@pytest.mark.parametrize("kept", FORMATS.values(), ids=FORMATS)
def test_rounding_is_to_the_nearest(kept: WeightFormat) -> None:
    linear, values = packed_linear(kept, (24, 200), dtype=torch.float32)
    weight = linear.method.weight  # type: ignore[attr-defined]
    steps = weight.scale.repeat_interleave(weight.group, 1)[:, :200]
    if kept.is_float:  # three bits behind the first, or the least number's half
        steps = (values.abs() * 2**-3).maximum(steps * 2**-9)
    assert ((weight.dequantize() - values).abs() <= 0.5001 * steps).all()


def test_rounding_makes_up_for_scales_that_are_rounded() -> None:
    """And whole groups of zeros, or of numbers of one sign, mean what they meant."""
    for kept in (FORMATS["4 bits, 32, zeros"], FORMATS["8 bits, 32"]):
        like = PackedWeight.empty(kept, (3, 64), torch.bfloat16, CPU)
        values = torch.stack((torch.zeros(64), torch.full((64,), 3.0), -torch.rand(64) - 9))
        codes, scale, zero = round_to_nearest(values, like, torch.bfloat16)
        like.set_scale(slice(None), scale)
        like.codes.copy_(pack_nibbles(codes) if kept.bits == 4 else codes)
        if zero is not None:
            like.set_zero(slice(None), zero)
        steps = like.scale.float().repeat_interleave(32, 1)
        assert ((like.dequantize() - values).abs() <= 0.51 * steps).all()
        assert (like.dequantize()[0] == 0).all()


@pytest.mark.parametrize("kept", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products(kept: WeightFormat, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, with a bias, and of widths and heights that nothing divides."""
    monkeypatch.setattr(packed, "PIECE_VALUES", 2000)
    for num_tokens, shape in ((1, (24, 384)), (7, (21, 200)), (3, (5, 48))):
        linear, _ = packed_linear(kept, shape, dtype=dtype, bias=True)
        x = torch.randn(num_tokens, shape[1]).to(dtype)
        weight = linear.method.weight.dequantize().double()  # type: ignore[attr-defined]
        assert linear.bias is not None
        expected = x.double() @ weight.T + linear.bias.double()
        out = linear(x)
        assert out.dtype == dtype and out.shape == expected.shape
        # Weights are rounded to the type of tokens, and so is the result.
        rounding = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11 * 2}
        bound = x.double().abs() @ weight.abs().T + linear.bias.double().abs()
        assert ((out - expected).abs() <= 1.1 * rounding[dtype] * bound).all()


def test_scales_are_kept_in_the_type_of_their_file_or_a_wider_one() -> None:
    weight = PackedWeight.empty(FORMATS["4 bits, 32"], (4, 64), torch.float32, CPU)
    first, second = torch.rand(2, 2).half(), torch.rand(2, 2).bfloat16()
    weight.set_scale(slice(0, 2), first)
    assert weight.scale.dtype == torch.float16
    weight.set_scale(slice(2, 4), second)
    assert weight.scale.dtype == torch.float32
    assert torch.equal(weight.scale, torch.cat((first.float(), second.float())))


def test_weights_take_the_bytes_that_are_planned() -> None:
    for kept in FORMATS.values():
        if kept.group and not kept.is_float:
            weight = PackedWeight.empty(kept, (64, 384), torch.bfloat16, CPU)
            num_bytes = sum(tensor.nbytes for tensor in weight.tensors())
            assert num_bytes == kept.bytes_per_weight * 64 * 384


def test_pieces_of_packed_axes() -> None:
    assert per(Cut(64, 64, 128), 32, "inputs") == Cut(2, 2, 4)
    assert per(Cut(64, 36, 100), 32, "inputs") == Cut(2, 2, 4)  # the last is not whole
    for cut in (Cut(16, 64, 128), Cut(0, 48, 128)):
        with pytest.raises(ValueError, match=r"tensor_parallel_size: 128 inputs .*groups of 32"):
            per(cut, 32, "inputs")
