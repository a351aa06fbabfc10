"""INT8 linear layers; `scaled_rows` says what their scales mean. Chosen by `select.method_for`.

As in Dettmers et al., "LLM.int8()", 2022.
"""

from typing import ClassVar

import torch
from torch import Tensor

from nanovllm.worker.quant.scaled_rows import LEAST_PEAK, QuantizedRows, ScaledRows

KIND = "int8"
MAX_CODE = 127
MIN_TOKENS, ALIGNMENT = 17, 8  # of `torch._int_mm` on a GPU


def quantize_rows(x: Tensor) -> QuantizedRows:
    """Each row of the last axis scaled so that its peak becomes 127."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_(min=LEAST_PEAK) / MAX_CODE
    codes = (wide / scale).round_().clamp_(-MAX_CODE, MAX_CODE).to(torch.int8)
    return QuantizedRows(codes, scale)


class Int8(ScaledRows):
    """By the integer units of a GPU where they take such shapes, else in plain torch."""

    kind: ClassVar[str] = KIND
    dtype: ClassVar[torch.dtype] = torch.int8
    quantize = staticmethod(quantize_rows)

    def _product(self, values: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        is_whole = values.is_cuda and all(size % ALIGNMENT == 0 for size in weight.shape)
        if is_whole and len(values) >= MIN_TOKENS:
            return torch._int_mm(values, weight.t())
        return super()._product(values, weight, dtype)
