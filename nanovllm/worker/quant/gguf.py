"""Linear layers that multiply weights as GGUF files store them, by the native kernels of CPUs.

`models.native` gives layers this method where the kernels are there. Tokens are rounded to 8 bits
with a scale for each 32 values, or, many at once on a CPU with AMX, to bfloat16.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from nanovllm.checkpoint.gguf import GGUFTensor
from nanovllm.checkpoint.quantization import Scheme, WeightFormat
from nanovllm.worker.kernels.native import library as native
from nanovllm.worker.kernels.native.packed import Packed, can_pack, pack_bfloat16, pack_gguf
from nanovllm.worker.layers.linear import Linear, WeightSlot
from nanovllm.worker.pieces import pieces
from nanovllm.worker.quant.packed import UNIT, PackedWeight

Q4_0, Q4_1, Q8_0 = 2, 3, 8  # types as GGUF numbers them


class PackedLinear:
    """The parts of one layer's weight, each as it is stored; `linear.weight` has no memory."""

    kind: ClassVar[str] = "packed"

    def __init__(self, parts: dict[str, Packed] | None = None) -> None:
        self.parts = {} if parts is None else parts
        self._bias: Tensor | None = None
        self._described: native.Linear | None = None

    def create(self, linear: Linear, device: torch.device) -> None:
        linear.weight = without_memory(linear.weight)
        linear.allocate_bias(device)

    def slots(self, linear: Linear) -> Iterator[WeightSlot]:
        for part, cut, rows in linear.rows():
            put, keep = partial(_put, self.parts, part), partial(_keep, self.parts, part)
            target, piece = linear.weight[rows], (cut, linear.inputs)
            yield WeightSlot(part, "weight", target, piece, put=put, keep=keep)
            yield from linear.bias_slots(part, cut, rows)

    def tensors(self, linear: Linear) -> Iterator[Tensor]:
        """None: whoever lays weights out counts them (`num_bytes`)."""
        yield from ()

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        described, wide = self.describe(linear), x.float().contiguous()
        out = torch.empty(len(x), described.rows)
        native.library().nv_linear(ctypes.byref(described), wide.data_ptr(), len(x), out.data_ptr())
        return out.to(x.dtype)

    def describe(self, linear: Linear) -> native.Linear:
        """For calls into the library, once all parts are there; valid as long as this method."""
        if self._described is None:
            matrices = [self.parts[part].matrix for part in linear.parts]
            rows = sum(matrix.rows for matrix in matrices)
            self._bias = None if linear.bias is None else linear.bias.float()
            bias = None if self._bias is None else self._bias.data_ptr()
            self._described = native.Linear(tuple(matrices), len(matrices), rows, bias)
        return self._described


def _put(parts: dict[str, Packed], part: str, values: Tensor, rows: slice) -> None:
    parts[part] = pack_bfloat16(values.bfloat16())  # the whole of it


def _keep(parts: dict[str, Packed], part: str, tensor: GGUFTensor) -> None:
    parts[part] = pack_tensor(tensor)


def pack_tensor(tensor: GGUFTensor) -> Packed:
    """As stored, or in bfloat16 if there are no products for its type."""
    columns = tensor.shape[-1]
    if can_pack(int(tensor.type), columns) and tensor.type.name != "BF16":
        return pack_gguf(tensor.raw, int(tensor.type), columns=columns, name=tensor.name)
    plain = torch.empty(tensor.shape, dtype=torch.bfloat16)
    for piece in pieces(*tensor.shape):
        some = replace(tensor, raw=tensor.raw[piece], shape=(piece.stop - piece.start, columns))
        plain[piece] = torch.from_numpy(some.dequantize())
    return pack_bfloat16(plain)


def keep_as_stored(linear: Linear, device: torch.device) -> None:
    """Have a layer take its weights as they are stored."""
    linear.method = PackedLinear()
    linear.method.create(linear, device)


def pack_linear(linear: Linear) -> None:
    """Lay out the loaded bfloat16 weight of a layer for the native products, part by part."""
    parts = {part: pack_bfloat16(linear.weight[rows]) for part, _, rows in linear.rows()}
    linear.method = PackedLinear(parts)
    linear.weight = without_memory(linear.weight)


def reads_packed(scheme: Scheme) -> bool:
    """Whether all weights that are kept so have a shape that a type of GGUF has, too."""
    return all(_has_type(rule.format) for rule in scheme.rules)


def _has_type(kept: WeightFormat | None) -> bool:
    if kept is None:
        return True
    if kept.method != "packed" or kept.is_float or kept.is_reordered:
        return False
    return kept.group % UNIT == 0 and (kept.bits == 4 or not kept.has_zeros)


def lay_out_packed(linear: Linear, weight: PackedWeight) -> None:
    """Have native products read a loaded layer's packed weight (one that `reads_packed`).

    As Q4_0 and Q8_0 it is the same but for scales that float16 rounds; Q4_1 adds a rounded
    -zero * scale.
    """
    parts = {}
    for part, _, rows in linear.rows():
        raw, kind = _as_blocks(weight.rows(rows))
        parts[part] = pack_gguf(raw.numpy(), kind, columns=weight.inputs, name=part)
    linear.method = PackedLinear(parts)


def _as_blocks(weight: PackedWeight) -> tuple[Tensor, int]:
    """Rows of blocks as GGUF stores them, uint8, and their type."""
    outputs, num_blocks = len(weight.codes), weight.inputs // UNIT
    times = weight.group // UNIT

    def halves(each: Tensor) -> Tensor:
        spread = each.repeat_interleave(times, 1)[:, :num_blocks, None]
        return spread.half().contiguous().view(torch.uint8)

    scale = weight.scale.float()
    fields = [halves(scale)]
    kind = Q8_0 if weight.bits == 8 else Q4_0
    if weight.zero is not None:
        kind = Q4_1
        fields.append(halves(-weight.zero.float() * scale))
    fields.append(weight.codes.view(torch.uint8).view(outputs, num_blocks, -1))
    return torch.cat(fields, 2).flatten(1), kind


def without_memory(weight: Tensor) -> Tensor:
    """One of its shape that holds nothing."""
    return torch.empty(weight.shape, dtype=weight.dtype, device="meta")
