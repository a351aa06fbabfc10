"""FP8 (e4m3) linear layers: a scale per output channel, and one per token found as it comes.

A `LinearMethod`, chosen by `method_for`; fused kernels hand their own quantized tokens to
`multiply`. Numbers, whoever multiplies: y = (x_q · w_q) · x_scale · w_scale. Formats as in
Micikevicius et al., "FP8 formats for deep learning", 2022.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nanovllm.checkpoint.quantization import Scales, WeightFormat
from nanovllm.worker.layers.linear import Linear, WeightSlot
from nanovllm.worker.parallel import Cut

KIND = "fp8"  # by which kernels know these weights
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
LEAST_PEAK = 1e-12  # of a row: one of zeros has a scale, too
NATIVE_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
ALIGNMENT = 16  # of both sizes of a weight, for the tensor cores


class QuantizedRows(NamedTuple):
    """`values * scale` is what was meant."""

    values: Tensor  # [..., size] e4m3
    scale: Tensor  # [..., 1] fp32


def quantize_rows(x: Tensor) -> QuantizedRows:
    """Each row of the last axis scaled so that its peak becomes the largest number of e4m3."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_(min=LEAST_PEAK) / E4M3_MAX
    return QuantizedRows((wide / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3), scale)


@dataclass(frozen=True, slots=True)
class Fp8:
    """In plain torch, on any device: weights take half the memory, and no less time.

    `linear.weight` is e4m3, `linear.scale` [out_features] fp32. stored: which weights share a scale
    in the checkpoint; None: it holds none, and each row is quantized as it comes. is_static: it
    holds a scale for all tokens, too.
    """

    stored: Scales | None = None
    is_static: bool = False
    kind: ClassVar[str] = KIND

    def create(self, linear: Linear, device: torch.device) -> None:
        linear.weight = torch.empty(linear.weight.shape, dtype=E4M3, device=device)
        linear.scale = torch.ones(len(linear.weight), device=device)
        linear.allocate_bias(device)

    def slots(self, linear: Linear) -> Iterator[WeightSlot]:
        assert linear.scale is not None
        for part, cut, rows in linear.rows():
            weight, scale = linear.weight[rows], linear.scale[rows]
            piece = (cut, linear.inputs)
            if self.stored is None:
                put = partial(_put_quantized, weight, scale)
                yield WeightSlot(part, "weight", weight, piece, put=put)
            else:
                yield WeightSlot(part, "weight", weight, piece, dtype=E4M3)
                yield from scale_slots(self.stored, part, cut, scale, is_static=self.is_static)
            yield from linear.bias_slots(part, cut, rows)

    def tensors(self, linear: Linear) -> Iterator[Tensor]:
        assert linear.scale is not None
        yield from (linear.weight, linear.scale)

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        return self.multiply(linear, quantize_rows(x), x.dtype)

    def multiply(self, linear: Linear, tokens: QuantizedRows, dtype: torch.dtype) -> Tensor:
        """tokens: values [n, in_features]. Returns new memory in `dtype`, [n, out_features]."""
        assert linear.scale is not None
        # e4m3 is exact in bfloat16; products of float16 might leave its range.
        wide = torch.float32 if dtype == torch.float16 else dtype
        product = F.linear(tokens.values.to(wide), linear.weight.to(wide))
        result = product.float().mul_(tokens.scale).mul_(linear.scale)
        return (result if linear.bias is None else result.add_(linear.bias)).to(dtype)


class NativeFp8(Fp8):
    """By the tensor cores of Ada, Hopper and later, in bfloat16: up to twice as fast."""

    def multiply(self, linear: Linear, tokens: QuantizedRows, dtype: torch.dtype) -> Tensor:
        assert linear.scale is not None
        return torch._scaled_mm(
            tokens.values,
            linear.weight.t(),
            scale_a=tokens.scale,
            scale_b=linear.scale[None, :],
            bias=linear.bias,
            out_dtype=dtype,
            use_fast_accum=True,
        )


FP8, NATIVE_FP8 = Fp8(), NativeFp8()


def has_native_fp8(device: torch.device) -> bool:
    """Whether the device multiplies FP8 itself."""
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= NATIVE_CAPABILITY


def method_for(kept: WeightFormat, linear: Linear, device: torch.device) -> Fp8:
    """linear: without memory yet, in the precision it computes in."""
    can_multiply = (
        has_native_fp8(device)
        and linear.weight.dtype == torch.bfloat16
        and all(size % ALIGNMENT == 0 for size in linear.weight.shape)
    )
    method = NativeFp8 if can_multiply else Fp8
    if not kept.is_stored:
        return method()
    return method(kept.scales, is_static=kept.tokens == "static")


def scale_slots(
    stored: Scales, part: str, cut: Cut, scale: Tensor, *, is_static: bool
) -> Iterator[WeightSlot]:
    """Of the weights of one part, scale [outputs]; and of its tokens, where a checkpoint has one.

    That is read and not used: a scale for each token, found as it comes, is never worse.
    """
    note = f"weights quantized per {stored}"
    if stored == "tensor":
        yield WeightSlot(part, "weight_scale", scale, (), note=note)
    else:
        piece = cut, Cut.all_of(1)
        yield WeightSlot(part, "weight_scale", scale[:, None], piece, note=note)
    if is_static:
        yield WeightSlot(part, "input_scale", scale.new_empty(0), (), put=_drop)


def _drop(values: Tensor, rows: slice) -> None:
    pass


def _put_quantized(weight: Tensor, scale: Tensor, values: Tensor, rows: slice) -> None:
    """On the device of the weight."""
    quantized = quantize_rows(values.to(weight.device))
    weight[rows].copy_(quantized.values)
    scale[rows].copy_(quantized.scale.squeeze(-1))
