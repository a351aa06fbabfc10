"""How GGUF files hold weights: blocks of codes with their scales, made into packed weights.

A `packed.Layout`, chosen by `select` for GPUs. Names and bytes of block types are those of
llama.cpp's `ggml-common.h`; numbers are exactly those that the `gguf` package dequantizes to.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nanovllm.checkpoint.gguf import GGUFTensor
from nanovllm.checkpoint.quantization import GGUF_FORMATS, SUPER_GROUP, WeightFormat
from nanovllm.worker.layers.linear import Linear, WeightSlot
from nanovllm.worker.parallel import Cut
from nanovllm.worker.pieces import pieces, within
from nanovllm.worker.quant.packed import MIDDLE, Packed

# What the codes of IQ4_NL stand for.
IQ4_NL = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows of one tensor, as `PackedWeight` has them."""

    codes: Tensor  # [rows, columns]: uint8 of 4 bits, or int8
    scale: Tensor  # [rows, groups], integers if they are nested
    shift: Tensor | None = None
    super_scale: Tensor | None = None  # [rows, super groups]
    super_shift: Tensor | None = None


class Gguf:
    """Of `weight`, in any of `GGUF_FORMATS`."""

    def slots(
        self, method: Packed, linear: Linear, part: str, cut: Cut, rows: slice
    ) -> Iterator[WeightSlot]:
        keep = partial(_keep, method, part, rows)
        piece = cut, linear.inputs
        yield WeightSlot(part, "weight", linear.weight[rows], piece, keep=keep)


def _keep(method: Packed, part: str, rows: slice, tensor: GGUFTensor) -> None:
    for piece in pieces(*tensor.shape):
        raw = torch.from_numpy(np.array(tensor.raw[piece]))
        _keep_rows(method, part, within(rows, piece), raw, name=tensor.type.name)


def _keep_rows(method: Packed, part: str, rows: slice, raw: Tensor, *, name: str) -> None:
    """raw: [some rows, bytes]; name: their type's."""
    kept, weight = method.kept, method.weight
    blocks = fitted(READERS[name](raw.to(weight.codes.device)), GGUF_FORMATS[name], kept)
    for numbers in (blocks.scale, blocks.shift, blocks.super_scale, blocks.super_shift):
        if numbers is not None and not numbers.isfinite().all():
            raise ValueError("is damaged: it holds scales that are no numbers: fetch it again")
    method.put_codes(part, rows, blocks.codes)
    if blocks.super_scale is not None:
        weight.set_nested(rows, blocks.scale, blocks.shift)
        weight.set_super(rows, blocks.super_scale, blocks.super_shift)
    else:
        weight.set_scale(rows, blocks.scale)
        weight.set_shift(rows, blocks.shift)


def fitted(blocks: Blocks, stored: WeightFormat, kept: WeightFormat) -> Blocks:
    """The same numbers in a format that holds more: of layers whose parts are stored otherwise."""
    if stored.is_nested and not kept.is_nested:
        blocks = _flattened(blocks, stored.group)
    scale, shift = blocks.scale, blocks.shift
    if kept.has_shifts and shift is None:
        is_offset = stored.bits == 4
        shift = -MIDDLE * scale.float() if is_offset else torch.zeros_like(scale)
    codes = blocks.codes
    if kept.bits > stored.bits:
        offset = 0 if kept.has_shifts else MIDDLE
        codes = codes.to(torch.int8) - offset
    times = stored.group // kept.group
    scale = scale.repeat_interleave(times, 1)
    shift = None if shift is None else shift.repeat_interleave(times, 1)
    return replace(blocks, codes=codes, scale=scale, shift=shift)


def _flattened(blocks: Blocks, group: int) -> Blocks:
    """Scales and shifts as numbers of their own, in fp32."""

    def wide(each: Tensor | None, whole: Tensor | None) -> Tensor | None:
        if each is None or whole is None:
            return None
        return each.float() * whole.float().repeat_interleave(SUPER_GROUP // group, 1)

    scale = wide(blocks.scale, blocks.super_scale)
    assert scale is not None
    return Blocks(blocks.codes, scale, wide(blocks.shift, blocks.super_shift))


# ---- types. raw: [rows, bytes]


def _fields(raw: Tensor, *sizes: int) -> list[Tensor]:
    """Each block's fields, [rows, blocks, size] uint8 each."""
    blocks = raw.view(len(raw), -1, sum(sizes))
    return [field.contiguous() for field in torch.split(blocks, list(sizes), 2)]


def _half(field: Tensor) -> Tensor:
    """[rows, blocks] float16."""
    return field.view(torch.float16)[:, :, 0]


def _nibbles(field: Tensor, size: int) -> Tensor:
    """Of runs of `size` bytes first the lower halves, then the upper ones: [rows, blocks, n]."""
    runs = field.view(*field.shape[:2], -1, 1, size)
    return torch.cat((runs & 15, runs >> 4), 3).flatten(2)


def _fifth_bits(field: Tensor) -> Tensor:
    """[rows, blocks, 32] of 4 bytes: 16, where the bit is set."""
    shifts = torch.arange(8, dtype=torch.uint8, device=field.device)
    return (field[..., None] >> shifts & 1).flatten(2) << 4


def _q4_0(raw: Tensor) -> Blocks:
    scale, codes = _fields(raw, 2, 16)
    return Blocks(_nibbles(codes, 16).flatten(1), _half(scale))


def _q4_1(raw: Tensor) -> Blocks:
    scale, shift, codes = _fields(raw, 2, 2, 16)
    return Blocks(_nibbles(codes, 16).flatten(1), _half(scale), _half(shift))


def _q5_0(raw: Tensor) -> Blocks:
    scale, high, low = _fields(raw, 2, 4, 16)
    codes = (_nibbles(low, 16) | _fifth_bits(high)).to(torch.int8) - 16
    return Blocks(codes.flatten(1), _half(scale))


def _q5_1(raw: Tensor) -> Blocks:
    scale, shift, high, low = _fields(raw, 2, 2, 4, 16)
    codes = (_nibbles(low, 16) | _fifth_bits(high)).to(torch.int8)
    return Blocks(codes.flatten(1), _half(scale), _half(shift))


def _q8_0(raw: Tensor) -> Blocks:
    scale, codes = _fields(raw, 2, 32)
    return Blocks(codes.view(torch.int8).flatten(1), _half(scale))


def _iq4_nl(raw: Tensor) -> Blocks:
    scale, codes = _fields(raw, 2, 16)
    table = torch.tensor(IQ4_NL, dtype=torch.int8, device=raw.device)
    return Blocks(table[_nibbles(codes, 16).flatten(1).int()], _half(scale))


def _six_bits(field: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and mins of eight groups, of 12 bytes: [rows, groups] int8 each."""
    low, mins, both = torch.split(field, 4, 2)
    scale = torch.cat((low & 63, both & 15 | low >> 2 & 48), 2)
    shift = torch.cat((mins & 63, both >> 4 | mins >> 2 & 48), 2)
    return scale.flatten(1).to(torch.int8), shift.flatten(1).to(torch.int8)


def _q4_k(raw: Tensor) -> Blocks:
    whole, least, scales, codes = _fields(raw, 2, 2, 12, 128)
    return Blocks(_nibbles(codes, 32).flatten(1), *_six_bits(scales), _half(whole), -_half(least))


def _q5_k(raw: Tensor) -> Blocks:
    whole, least, scales, high, low = _fields(raw, 2, 2, 12, 32, 128)
    shifts = torch.arange(8, dtype=torch.uint8, device=raw.device)[:, None]
    fifth = (high[:, :, None] >> shifts & 1).flatten(2) << 4
    codes = (_nibbles(low, 32) | fifth).to(torch.int8)
    return Blocks(codes.flatten(1), *_six_bits(scales), _half(whole), -_half(least))


def _q6_k(raw: Tensor) -> Blocks:
    low, high, scales, whole = _fields(raw, 128, 64, 16, 2)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=raw.device)[:, None]
    upper = (high.view(*high.shape[:2], 2, 1, 32) >> shifts & 3).flatten(2) << 4
    codes = (_nibbles(low, 64) | upper).to(torch.int8) - 32
    scale = scales.view(torch.int8).flatten(1)
    return Blocks(codes.flatten(1), scale, None, _half(whole))


READERS: dict[str, Callable[[Tensor], Blocks]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "IQ4_NL": _iq4_nl,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
