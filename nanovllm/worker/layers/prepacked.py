"""Linear layers on CPUs: weights kept in oneDNN's own blocked layout.

`weights.load_weights` calls `prepack` once all weights are in. For the few tokens of a decode step
this reads memory at full speed, where `F.linear` (MKL in fp32) can take 2 to 3 times as long. The
two ops are those that `torch.compile` uses when it freezes a model for the CPU.
"""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from nanovllm.worker.layers.linear import Linear, Unquantized

# The layout depends on the batch size it is made for. This one is good from 1 token to thousands;
# the one made for a single token takes twice as long at 8.
NUM_TOKENS_HINT = 512


class Prepacked(Unquantized):
    """`linear.weight` is an opaque oneDNN tensor, of the shape and dtype it had before."""

    kind: ClassVar[str] = "onednn"

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        op = torch.ops.mkldnn._linear_pointwise
        result: Tensor = op(x, linear.weight, linear.bias, "none", [], "")
        return result


def can_prepack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN is there and multiplies in `dtype` on this CPU."""
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if device.type != "cpu" or not has_onednn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def prepack(linears: Iterable[Linear]) -> None:
    """Lay every weight out anew, one at a time, so that no more than one is held twice.

    A weight that something else holds too (a tied embedding) stays there as it was.
    """
    method = Prepacked()
    for linear in linears:
        linear.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight, NUM_TOKENS_HINT)
        linear.method = method
