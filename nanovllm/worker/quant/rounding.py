"""Weights rounded to the nearest as they are read: what `quantization` asks for at load.

A `packed.Layout`, chosen by `select`. Groups whose number of inputs does not divide a layer's width
become smaller ones.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from msgspec.structs import replace
from torch import Tensor

from nanovllm.checkpoint.quantization import WeightFormat
from nanovllm.worker.layers.linear import Linear, WeightSlot
from nanovllm.worker.parallel import Cut
from nanovllm.worker.pieces import pieces, within
from nanovllm.worker.quant.packed import Packed, PackedWeight

SMALL_GROUP = 32
LEAST_SCALE = 2.0**-24  # in float16, too, it is not zero
E4M3_MAX = 448.0


def fitting(kept: WeightFormat, inputs: int) -> WeightFormat:
    """With groups that divide so many inputs, if there are such."""
    fits = not kept.group or inputs % kept.group == 0
    return kept if fits else replace(kept, group=min(SMALL_GROUP, kept.group))


class Rounded:
    """Of the plain `weight`."""

    def slots(
        self, method: Packed, linear: Linear, part: str, cut: Cut, rows: slice
    ) -> Iterator[WeightSlot]:
        put = partial(_put, method, part, rows.start)
        piece = cut, linear.inputs
        yield WeightSlot(part, "weight", linear.weight[rows], piece, put=put)


def _put(method: Packed, part: str, first: int, values: Tensor, rows: slice) -> None:
    """values: of some outputs of the part, which begins at the layer's output `first`."""
    weight, start = method.weight, first + (rows.start or 0)
    for piece in pieces(*values.shape):
        target = within(slice(start, start + len(values)), piece)
        own = values[piece].to(weight.codes.device)
        codes, scale, zero = round_to_nearest(own, weight, method.dtype)
        weight.set_scale(target, scale)
        if zero is not None:
            weight.set_zero(target, zero)
        method.put_codes(part, target, codes)


def round_to_nearest(
    values: Tensor, like: PackedWeight, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zeros of values [outputs, inputs], as `PackedWeight.set_…` take them.

    Groups span from their least to their greatest number if there are zeros, else from the largest
    magnitude's opposite to it. dtype: of scales, whose own rounding the codes make up for.
    """
    padding = -like.inputs % like.group
    padded = F.pad(values.float(), (0, padding))
    grouped = padded.view(len(values), -1, like.group)
    most = 2**like.bits - 1
    if like.zero is not None:
        low = grouped.amin(-1, keepdim=True).clamp_(max=0.0)
        high = grouped.amax(-1, keepdim=True).clamp_(min=0.0)
        scale = ((high - low) / most).to(dtype).float().clamp_(min=LEAST_SCALE)
        offset = 0 if like.bits == 4 else 128
        zero = (-low / scale).round_().clamp_(0, most)
        codes = (grouped / scale + zero).round_().clamp_(0, most) - offset
        zeros = (zero - offset).squeeze(-1).to(like.zero.dtype)
    else:
        peak = grouped.abs().amax(-1, keepdim=True)
        is_float = like.codes.is_floating_point()
        limit = E4M3_MAX if is_float else most // 2
        scale = (peak / limit).to(dtype).float().clamp_(min=LEAST_SCALE)
        codes, zeros = (grouped / scale).clamp_(-limit, limit), None
        codes = codes if is_float else codes.round_() + (8 if like.bits == 4 else 0)
    codes = codes.flatten(1)[:, : like.inputs].to(like.codes.dtype)
    return codes, scale.squeeze(-1).to(dtype), zeros
