"""INT8 linear layers: a scale per output channel, and one per token found as it comes.

A `LinearMethod`, chosen by `method_for`. y = (x_q · w_q) · x_scale · w_scale, as in Dettmers et
al., "LLM.int8()", 2022.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nanovllm.checkpoint.quantization import WeightFormat
from nanovllm.worker.layers.linear import Linear, WeightSlot
from nanovllm.worker.quant.fp8 import LEAST_PEAK, scale_slots

KIND = "int8"
MAX_CODE = 127
MIN_TOKENS, ALIGNMENT = 17, 8  # of `torch._int_mm` on a GPU


@dataclass(frozen=True, slots=True)
class Int8:
    """`linear.weight` is int8, `linear.scale` [out_features] fp32."""

    kept: WeightFormat
    kind: ClassVar[str] = KIND

    def create(self, linear: Linear, device: torch.device) -> None:
        linear.weight = torch.empty(linear.weight.shape, dtype=torch.int8, device=device)
        linear.scale = torch.ones(len(linear.weight), device=device)
        linear.allocate_bias(device)

    def slots(self, linear: Linear) -> Iterator[WeightSlot]:
        assert linear.scale is not None
        for part, cut, rows in linear.rows():
            weight, scale = linear.weight[rows], linear.scale[rows]
            piece = cut, linear.inputs
            if self.kept.is_stored:
                is_static = self.kept.tokens == "static"
                yield WeightSlot(part, "weight", weight, piece, dtype=torch.int8)
                yield from scale_slots(self.kept.scales, part, cut, scale, is_static=is_static)
            else:
                put = partial(_put_quantized, weight, scale)
                yield WeightSlot(part, "weight", weight, piece, put=put)
            yield from linear.bias_slots(part, cut, rows)

    def tensors(self, linear: Linear) -> Iterator[Tensor]:
        assert linear.scale is not None
        yield from (linear.weight, linear.scale)

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        assert linear.scale is not None
        codes, scale = quantize_rows(x)
        product = _product(codes, linear.weight, x.dtype)
        result = product.float().mul_(scale).mul_(linear.scale)
        return (result if linear.bias is None else result.add_(linear.bias)).to(x.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [n, size] and scales [n, 1] fp32, by which the peak of each row becomes 127."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_(min=LEAST_PEAK) / MAX_CODE
    return (wide / scale).round_().clamp_(-MAX_CODE, MAX_CODE).to(torch.int8), scale


def _product(codes: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """By the integer units of a GPU where they take such shapes; else in a type that holds all
    codes."""
    sizes = weight.shape
    is_whole = codes.is_cuda and all(size % ALIGNMENT == 0 for size in sizes)
    if is_whole and len(codes) >= MIN_TOKENS:
        return torch._int_mm(codes, weight.t())
    # Products of float16 might leave its range.
    wide = torch.float32 if dtype == torch.float16 else dtype
    return F.linear(codes.to(wide), weight.to(wide))


def _put_quantized(weight: Tensor, scale: Tensor, values: Tensor, rows: slice) -> None:
    """On the device of the weight."""
    codes, found = quantize_rows(values.to(weight.device))
    weight[rows].copy_(codes)
    scale[rows].copy_(found.squeeze(-1))
