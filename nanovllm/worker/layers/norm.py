"""RMS norms as data: their weights, and where a checkpoint's go. `Kernels` do the arithmetic."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nanovllm.checkpoint.spec import Norm
from nanovllm.worker.layers.linear import WeightSlot
from nanovllm.worker.parallel import Cut


@dataclass(slots=True, eq=False)
class RMSNorm:
    """x / rms(x) * weight, in fp32 (Zhang & Sennrich 2019).

    A weight in the precision of x is multiplied after x has been rounded to it, as Llama does; one
    in fp32 before, as Gemma and OLMo do.
    """

    weight: Tensor  # [size]
    eps: float
    centers: bool = False  # then it is a layer norm: the mean is taken off first

    @classmethod
    def empty(cls, size: int, spec: Norm, *, dtype: torch.dtype, device: torch.device) -> "RMSNorm":
        """Weights of one, until others are loaded."""
        kept = torch.float32 if spec.adds_one or spec.rounds_last else dtype
        return cls(torch.ones(size, dtype=kept, device=device), spec.eps, spec.centers)

    def scale(self, hidden: Tensor, mean_squares: Tensor) -> Tensor:
        """What the norm makes of a piece of what it is taken of. hidden: [n, size];
        mean_squares: [n, 1] fp32, of the whole."""
        normed = hidden.float() * torch.rsqrt(mean_squares + self.eps)
        if self.weight.dtype == hidden.dtype:
            return normed.to(hidden.dtype).mul_(self.weight)
        return normed.mul_(self.weight).to(hidden.dtype)

    def slot(
        self, part: str, layer: int | None, spec: Norm, *, cut: Cut | None = None
    ) -> WeightSlot:
        """spec: as it was built by. cut: which of the weights a rank holds; None: all."""
        put = partial(_put_plus_one, self.weight) if spec.adds_one else None
        piece = cut or Cut.all_of(len(self.weight))
        return WeightSlot(part, "weight", self.weight, (piece,), layer, put=put)


def _put_plus_one(weight: Tensor, values: Tensor, rows: slice) -> None:
    weight[rows].copy_(values.float() + 1)
