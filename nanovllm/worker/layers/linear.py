"""The linear layer of every model, with the seams for quantization and sharding.

Owns how checkpoint tensors map onto merged weights (`slots`, read by `weights`) and who multiplies
(`method`, set by a pass over the built model). Models only call it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """Where one checkpoint tensor goes.

    part: what it is ("q", "gate", "embedding" …), a key of `WeightNames`. target: a view into a
    parameter, of the checkpoint tensor's shape. shard_axis: the axis of the checkpoint tensor that
    tensor parallelism cuts, None if every rank takes it whole. scale: where the scale of each row
    goes if target holds quantized numbers.
    """

    part: str
    kind: Literal["weight", "bias"]
    layer: int | None
    target: Tensor
    shard_axis: int | None
    scale: Tensor | None = None  # [rows of target] fp32


class LinearMethod(Protocol):
    """How a linear layer multiplies; knows how it left `linear.weight`."""

    def apply(self, linear: "Linear", x: Tensor) -> Tensor:
        """x: [n, in_features]. Returns new memory, [n, out_features]."""


class Unquantized:
    """The weight as it is, [out_features, in_features]."""

    def apply(self, linear: "Linear", x: Tensor) -> Tensor:
        return F.linear(x, linear.weight, linear.bias)


UNQUANTIZED = Unquantized()


@dataclass(slots=True, eq=False)
class Linear:
    """y = x Wᵀ + b. `shards` name the checkpoint tensors stacked in W: part → output features.

    shard_axis: 0 if ranks hold different outputs (q/k/v, gate/up), 1 if different inputs (o, down).
    """

    weight: Tensor  # [out_features, in_features]
    bias: Tensor | None  # [out_features]
    shards: dict[str, int]
    shard_axis: Literal[0, 1]
    method: LinearMethod = UNQUANTIZED
    scale: Tensor | None = None  # [out_features] fp32, of weights that `method` keeps quantized

    @classmethod
    def empty(
        cls,
        in_features: int,
        shards: dict[str, int],
        *,
        bias: bool,
        shard_axis: Literal[0, 1],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        """A layer whose weights are yet to be loaded."""
        out_features = sum(shards.values())
        weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        return cls(weight, zeros, shards, shard_axis)

    def allocate(self, device: torch.device) -> None:
        """Give a layer that was built on the meta device memory; its weights are yet unset."""
        # Not by `empty_like`: the first use of it on the meta device imports all of sympy.
        self.weight = torch.empty(self.weight.shape, dtype=self.weight.dtype, device=device)
        if self.bias is not None:
            self.bias = torch.zeros(self.bias.shape, dtype=self.bias.dtype, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x)

    def slots(self, layer: int | None) -> Iterator[WeightSlot]:
        """One slot per checkpoint tensor, while rows of the weight are still rows in memory."""
        assert self.weight.layout is torch.strided
        start = 0
        for part, size in self.shards.items():
            weight = self.weight.narrow(0, start, size)
            scale = None if self.scale is None else self.scale.narrow(0, start, size)
            yield WeightSlot(part, "weight", layer, weight, self.shard_axis, scale)
            if self.bias is not None:
                # A bias is added once per output: cut with the outputs, else whole.
                axis = 0 if self.shard_axis == 0 else None
                yield WeightSlot(part, "bias", layer, self.bias.narrow(0, start, size), axis)
            start += size
