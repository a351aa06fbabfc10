"""RMS norms as data: their weights, and where a checkpoint's go. `Kernels` do the arithmetic."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nanovllm.checkpoint.spec import Norm
from nanovllm.worker.layers.linear import WeightSlot


@dataclass(slots=True, eq=False)
class RMSNorm:
    """x / rms(x) * weight, in fp32 (Zhang & Sennrich 2019).

    A weight in the precision of x is multiplied after x has been rounded to it, as Llama does; one
    in fp32 before, as Gemma and OLMo do.
    """

    weight: Tensor  # [size]
    eps: float

    @classmethod
    def empty(cls, size: int, spec: Norm, *, dtype: torch.dtype, device: torch.device) -> "RMSNorm":
        """Weights of one, until others are loaded."""
        kept = torch.float32 if spec.adds_one or spec.rounds_last else dtype
        return cls(torch.ones(size, dtype=kept, device=device), spec.eps)

    def slot(self, part: str, layer: int | None, spec: Norm) -> WeightSlot:
        """spec: as it was built by."""
        put = partial(_put_plus_one, self.weight) if spec.adds_one else None
        return WeightSlot.of_whole(part, "weight", self.weight, layer, put=put)


def _put_plus_one(weight: Tensor, values: Tensor, rows: slice) -> None:
    weight[rows].copy_(values.float() + 1)
