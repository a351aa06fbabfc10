"""FP8 (e4m3) linear layers: a scale per output channel, and one per token found as it comes.

`select` sets these methods; `weights` quantizes with `quantize_rows`; fused kernels hand their own
quantized tokens to `multiply`. Numbers, whoever multiplies: y = (x_q · w_q) · x_scale · w_scale.
Formats as in Micikevicius et al., "FP8 formats for deep learning", 2022.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nanovllm.worker.layers.linear import Linear

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


class Fp8:
    """In plain torch, on any device: weights take half the memory, and no less time.

    `linear.weight` is e4m3, `linear.scale` [out_features] fp32.
    """

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


def quantize(linear: Linear, device: torch.device) -> None:
    """Give a layer built on the meta device room for FP8 weights and their scales."""
    can_multiply = (
        has_native_fp8(device)
        and linear.weight.dtype == torch.bfloat16
        and all(size % ALIGNMENT == 0 for size in linear.weight.shape)
    )
    linear.method = NATIVE_FP8 if can_multiply else FP8
    linear.weight = linear.weight.to(E4M3)
    linear.scale = torch.ones(len(linear.weight), device=device)
    linear.allocate(device)
