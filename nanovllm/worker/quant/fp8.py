"""FP8 (e4m3) linear layers; `scaled_rows` says what their scales mean.

Chosen by `method_for`; fused kernels hand their own quantized tokens to `multiply`. Formats as in
Micikevicius et al., "FP8 formats for deep learning", 2022.
"""

from typing import ClassVar

import torch
from torch import Tensor

from nanovllm.checkpoint.quantization import WeightFormat
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.quant.scaled_rows import LEAST_PEAK, QuantizedRows, ScaledRows

KIND = "fp8"  # by which kernels know these weights
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
NATIVE_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
ALIGNMENT = 16  # of both sizes of a weight, for the tensor cores


def quantize_rows(x: Tensor) -> QuantizedRows:
    """Each row of the last axis scaled so that its peak becomes the largest number of e4m3."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_(min=LEAST_PEAK) / E4M3_MAX
    return QuantizedRows((wide / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3), scale)


class Fp8(ScaledRows):
    """In plain torch, on any device: weights take half the memory, and no less time."""

    kind: ClassVar[str] = KIND
    dtype: ClassVar[torch.dtype] = E4M3
    quantize = staticmethod(quantize_rows)


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
    return (NativeFp8 if can_multiply else Fp8).of(kept)
