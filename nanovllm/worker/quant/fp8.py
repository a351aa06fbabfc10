"""FP8 (e4m3) linear layers; `scaled_rows` says what their scales mean.

Chosen by `method_for`; fused kernels hand their own quantized tokens to `multiply`. Formats as in
Micikevicius et al., "FP8 formats for deep learning", 2022.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from nanovllm.checkpoint.quantization import WeightFormat, is_copied
from nanovllm.worker.layers.linear import UNQUANTIZED, Linear, WeightSlot
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


class QuantizedGroups(NamedTuple):
    """Rows whose numbers share a scale in groups, each of as many as the next."""

    values: Tensor  # [n, size], e4m3
    scale: Tensor  # [num_groups, n] fp32


class Fp8(ScaledRows):
    """In plain torch, on any device: weights take half the memory, and no less time."""

    kind: ClassVar[str] = KIND
    dtype: ClassVar[torch.dtype] = E4M3
    quantize = staticmethod(quantize_rows)


@dataclass(frozen=True, slots=True)
class NativeFp8(Fp8):
    """By the tensor cores of Ada, Hopper and later, in bfloat16: up to twice as fast.

    is_copied: weights are kept in bfloat16, too, dequantized (`Linear.copy`). Of a small layer, a
    few tokens take the time that kernels need to follow each other and not that of reading, and
    tokens that need not be quantized take the least.
    """

    is_copied: bool = False

    def create(self, linear: Linear, device: torch.device) -> None:
        dtype = linear.weight.dtype
        super(NativeFp8, self).create(linear, device)
        if self.is_copied:
            weight = torch.empty(linear.weight.shape, dtype=dtype, device=device)
            linear.copy = replace(linear, weight=weight, scale=None, method=UNQUANTIZED)

    def slots(self, linear: Linear) -> Iterator[WeightSlot]:
        rows_of = {part: rows for part, _, rows in linear.rows()}
        for slot in super(NativeFp8, self).slots(linear):
            if linear.copy is not None and slot.kind in ("weight", "weight_scale"):
                put = partial(_put_both, slot, linear, rows_of[slot.part])
                slot = replace(slot, put=put)
            yield slot

    def tensors(self, linear: Linear) -> Iterator[Tensor]:
        yield from super(NativeFp8, self).tensors(linear)
        if linear.copy is not None:
            yield linear.copy.weight

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


def _put_both(slot: WeightSlot, linear: Linear, part: slice, values: Tensor, rows: slice) -> None:
    """Weights of a part, or their scales, as `slot` has them, and what they mean in the copy.

    Which of the two comes last makes it right.
    """
    slot.write(values, rows)
    assert linear.copy is not None and linear.scale is not None
    weight, scale = linear.weight[part][rows], linear.scale[part][rows]
    linear.copy.weight[part][rows] = weight.float() * scale[:, None]


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
    if not can_multiply:
        return Fp8.of(kept)
    copied = is_copied(kept, linear.parts, linear.weight.numel())
    return replace(NativeFp8.of(kept), is_copied=copied)
