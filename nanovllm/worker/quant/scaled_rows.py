"""What FP8 and INT8 linear layers share: a scale per output channel, and one per token as it comes.

`fp8` and `int8` say which numbers are kept, and who multiplies by them. Whoever multiplies:
y = (x_q · w_q) · x_scale · w_scale.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nanovllm.checkpoint.quantization import Scales, WeightFormat
from nanovllm.worker.layers.linear import Linear, WeightSlot
from nanovllm.worker.parallel import Cut
from nanovllm.worker.pieces import pieces

LEAST_PEAK = 1e-12  # of a row: one of zeros has a scale, too


class QuantizedRows(NamedTuple):
    """`values * scale` is what was meant."""

    values: Tensor  # [..., size], of the numbers that are kept
    scale: Tensor  # [..., 1] fp32


@dataclass(frozen=True, slots=True)
class ScaledRows(ABC):
    """A `LinearMethod`: `linear.weight` is of `dtype`, `linear.scale` [out_features] fp32.

    stored: which weights share a scale in the checkpoint; None: it holds none, and each row is
    quantized as it comes. is_static: it holds a scale for all tokens, too.
    """

    stored: Scales | None = None
    is_static: bool = False
    kind: ClassVar[str]
    dtype: ClassVar[torch.dtype]

    @classmethod
    def of(cls, kept: WeightFormat) -> Self:
        """For weights that a checkpoint holds so, or that are quantized as they come."""
        return cls(kept.scales, kept.tokens == "static") if kept.is_stored else cls()

    @staticmethod
    @abstractmethod
    def quantize(x: Tensor) -> QuantizedRows:
        """Each row of the last axis, scaled so that its peak becomes the largest number."""

    def create(self, linear: Linear, device: torch.device) -> None:
        linear.weight = torch.empty(linear.weight.shape, dtype=self.dtype, device=device)
        linear.scale = torch.ones(len(linear.weight), device=device)
        linear.allocate_bias(device)

    def slots(self, linear: Linear) -> Iterator[WeightSlot]:
        assert linear.scale is not None
        for part, cut, rows in linear.rows():
            weight, scale = linear.weight[rows], linear.scale[rows]
            piece = cut, linear.inputs
            if self.stored is None:
                put = partial(self._put_quantized, weight, scale)
                yield WeightSlot(part, "weight", weight, piece, put=put)
            else:
                yield WeightSlot(part, "weight", weight, piece, dtype=self.dtype)
                yield from _scale_slots(self.stored, part, cut, scale)
                if self.is_static:  # read and not used: a scale for each token is never worse
                    yield WeightSlot(part, "input_scale", scale.new_empty(0), (), put=_drop)
            yield from linear.bias_slots(part, cut, rows)

    def tensors(self, linear: Linear) -> Iterator[Tensor]:
        assert linear.scale is not None
        yield from (linear.weight, linear.scale)

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        return self.multiply(linear, self.quantize(x), x.dtype)

    def multiply(self, linear: Linear, tokens: QuantizedRows, dtype: torch.dtype) -> Tensor:
        """tokens: values [n, in_features]. Returns new memory in `dtype`, [n, out_features]."""
        assert linear.scale is not None
        product = self._product(tokens.values, linear.weight, dtype)
        result = product.float().mul_(tokens.scale).mul_(linear.scale)
        return (result if linear.bias is None else result.add_(linear.bias)).to(dtype)

    def _product(self, values: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """In a type that holds all numbers: bfloat16 does; of float16, products might leave it."""
        wide = torch.float32 if dtype == torch.float16 else dtype
        return F.linear(values.to(wide), weight.to(wide))

    def _put_quantized(self, weight: Tensor, scale: Tensor, values: Tensor, rows: slice) -> None:
        """On the device of the weight."""
        weight, scale = weight[rows], scale[rows]
        for piece in pieces(*values.shape):
            quantized = self.quantize(values[piece].to(weight.device))
            weight[piece].copy_(quantized.values)
            scale[piece].copy_(quantized.scale.squeeze(-1))


def _scale_slots(stored: Scales, part: str, cut: Cut, scale: Tensor) -> Iterator[WeightSlot]:
    """Of the weights of one part, scale [outputs]."""
    note = f"weights quantized per {stored}"
    if stored == "tensor":
        yield WeightSlot(part, "weight_scale", scale, (), note=note)
    else:
        piece = cut, Cut.all_of(1)
        yield WeightSlot(part, "weight_scale", scale[:, None], piece, note=note)


def _drop(values: Tensor, rows: slice) -> None:
    pass
