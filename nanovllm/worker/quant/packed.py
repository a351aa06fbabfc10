"""Weights of 4 and 8 bits with a scale for each group of inputs, in the one form all are kept in.

`Packed` is the `LinearMethod`; files of formats convert to its layout while they load (`Layout`).
weight = (code - zero) * scale + shift, computed in fp32; tokens are multiplied as they are. Triton
kernels read the same memory. GGUF's scales and shifts may be integers times that of a super group.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nanovllm.checkpoint.quantization import SUPER_GROUP, WeightFormat
from nanovllm.worker.layers.linear import Linear, WeightSlot
from nanovllm.worker.parallel import Cut
from nanovllm.worker.pieces import pieces, within

KIND = "packed"  # by which kernels know these weights
UNIT = 32  # inputs of 4 bits that are laid out together: the halves of 16 bytes, as in GGUF
HALF = UNIT // 2
MIDDLE = 8  # the zero of 4-bit codes that have none of their own
PIECE_VALUES = 2**24  # of a weight that are unpacked at a time


def pack_nibbles(codes: Tensor) -> Tensor:
    """codes: [rows, columns] of 0 to 15. Returns uint8 [rows, bytes]: of 32 codes the first 16 in
    the lower halves of 16 bytes, the others in the upper ones."""
    padded = F.pad(codes.to(torch.uint8), (0, -codes.shape[1] % UNIT))
    low, high = padded.view(len(codes), -1, 2, HALF).unbind(2)
    return (low | high << 4).flatten(1)


def unpack_nibbles(packed: Tensor, num_columns: int) -> Tensor:
    """The opposite of `pack_nibbles`: uint8 [rows, num_columns]."""
    units = packed.view(len(packed), -1, 1, HALF)
    return torch.cat((units & 15, units >> 4), 2).flatten(1)[:, :num_columns]


@dataclass(slots=True)
class PackedWeight:
    """A matrix [outputs, inputs].

    codes: of 4 bits uint8 (`pack_nibbles`), else int8 or e4m3 [outputs, inputs]. group: inputs that
    share a scale. zero: of the codes' type, 4-bit ones unpacked; None: 0, of 4 bits 8.
    """

    codes: Tensor
    scale: Tensor  # [outputs, groups], floating
    zero: Tensor | None  # [outputs, groups]
    group: int
    inputs: int
    shift: Tensor | None = None  # [outputs, groups], floating
    super_scale: Tensor | None = None  # [outputs, super groups], of scales that are integers
    super_shift: Tensor | None = None  # the same of shifts
    has_scales: bool = False  # some have been loaded

    @classmethod
    def empty(
        cls, kept: WeightFormat, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> "PackedWeight":
        """dtype: of scales, unless their file has a wider one."""
        outputs, inputs = shape
        group = kept.group or inputs
        grid = outputs, -(-inputs // group)
        width = -(-inputs // UNIT) * HALF if kept.bits == 4 else inputs
        codes_dtype = torch.uint8 if kept.bits == 4 else torch.int8
        zero = torch.zeros(grid, dtype=codes_dtype, device=device) if kept.has_zeros else None
        if kept.is_float:
            codes_dtype = torch.float8_e4m3fn
        codes = torch.zeros((outputs, width), dtype=codes_dtype, device=device)
        scale = torch.ones(grid, dtype=torch.int8 if kept.is_nested else dtype, device=device)
        weight = cls(codes, scale, zero, group, inputs)
        if kept.has_shifts:
            narrow = torch.int8 if kept.is_nested else torch.float16
            weight.shift = torch.zeros(grid, dtype=narrow, device=device)
        if kept.is_nested:
            wide = outputs, -(-inputs // SUPER_GROUP)
            weight.super_scale = torch.ones(wide, dtype=torch.float16, device=device)
            weight.super_shift = torch.zeros_like(weight.super_scale) if kept.has_shifts else None
        return weight

    @property
    def bits(self) -> int:
        return 4 if self.codes.dtype == torch.uint8 else 8

    def rows(self, rows: slice | Tensor) -> "PackedWeight":
        """Some outputs: a view, or a copy of those that are listed."""
        tensors = {
            name: None if tensor is None else tensor[rows] for name, tensor in self._named().items()
        }
        return replace(self, **tensors)  # type: ignore[arg-type]

    def tensors(self) -> Iterator[Tensor]:
        yield from (tensor for tensor in self._named().values() if tensor is not None)

    def _named(self) -> dict[str, Tensor | None]:
        return {
            "codes": self.codes,
            "scale": self.scale,
            "zero": self.zero,
            "shift": self.shift,
            "super_scale": self.super_scale,
            "super_shift": self.super_shift,
        }

    def set_scale(self, rows: slice, scale: Tensor) -> None:
        """scale: [some outputs, groups]. All are kept in the type that they come in, or in one that
        loses nothing if they come in several."""
        kept = self.scale.dtype if self.has_scales else scale.dtype
        self.scale = _with_rows(self.scale.to(kept), rows, scale)
        self.has_scales = True

    def set_shift(self, rows: slice, shift: Tensor | None) -> None:
        """shift: as scale; None: there is none."""
        if shift is not None:
            assert self.shift is not None
            self.shift = _with_rows(self.shift, rows, shift)

    def set_nested(self, rows: slice, scale: Tensor, shift: Tensor | None) -> None:
        """Of scales and shifts that are integers, [some outputs, groups] int8, what `super_` ones
        are multiplied by."""
        self.scale[rows].copy_(scale)
        if shift is not None:
            assert self.shift is not None
            self.shift[rows].copy_(shift)

    def set_super(self, rows: slice, scale: Tensor, shift: Tensor | None) -> None:
        """What integer scales and shifts are multiplied by, [some outputs, super groups] fp16."""
        assert self.super_scale is not None
        self.super_scale[rows].copy_(scale)
        if shift is not None:
            assert self.super_shift is not None
            self.super_shift[rows].copy_(shift)

    def set_zero(self, rows: slice, zero: Tensor) -> None:
        """zero: [some outputs, groups]."""
        assert self.zero is not None
        self.zero[rows].copy_(zero)

    def dequantize(self) -> Tensor:
        """The matrix in fp32, exact but for the last rounding."""
        codes = self.codes
        wide = (unpack_nibbles(codes, self.inputs) if self.bits == 4 else codes).float()
        padded = F.pad(wide, (0, -self.inputs % self.group))
        grouped = padded.view(len(codes), -1, self.group)
        if self.zero is not None:
            grouped = grouped - self.zero.float()[:, :, None]
        elif self.bits == 4 and self.shift is None:
            grouped = grouped - MIDDLE
        grouped = grouped * self._wide(self.scale, self.super_scale)
        if self.shift is not None:
            grouped = grouped + self._wide(self.shift, self.super_shift)
        return grouped.flatten(1)[:, : self.inputs]

    def _wide(self, each: Tensor, whole: Tensor | None) -> Tensor:
        """Of each group, [outputs, groups, 1] fp32. whole: of super groups."""
        found = each.float()
        if whole is not None:
            count = SUPER_GROUP // self.group
            found = found * whole.float().repeat_interleave(count, 1)[:, : found.shape[1]]
        return found[:, :, None]


def _with_rows(target: Tensor, rows: slice, values: Tensor) -> Tensor:
    """With some rows set; in a wider type if need be."""
    target = target.to(torch.promote_types(target.dtype, values.dtype))
    target[rows].copy_(values)
    return target


class Layout(Protocol):
    """How some files hold packed weights."""

    def slots(
        self, method: "Packed", linear: Linear, part: str, cut: Cut, rows: slice
    ) -> Iterator[WeightSlot]:
        """Of one part, whose outputs are `rows` of the layer's."""


@dataclass(slots=True)
class Packed:
    """The method of one layer; `linear.weight` has a shape and no memory.

    order: [inputs] int64, which input meets which column; None: each its own. It is that of all
    parts, `orders`.
    """

    kept: WeightFormat
    layout: Layout
    dtype: torch.dtype  # of scales as they are made
    order: Tensor | None = None
    orders: dict[str, Tensor] = field(default_factory=dict)
    kind: ClassVar[str] = KIND
    _weight: PackedWeight | None = None

    @property
    def weight(self) -> PackedWeight:
        assert self._weight is not None, "memory is there once a layer is created"
        return self._weight

    def create(self, linear: Linear, device: torch.device) -> None:
        outputs, inputs = linear.weight.shape
        self._weight = PackedWeight.empty(self.kept, (outputs, inputs), self.dtype, device)
        linear.weight = torch.empty(linear.weight.shape, dtype=linear.weight.dtype, device="meta")
        linear.allocate_bias(device)

    def slots(self, linear: Linear) -> Iterator[WeightSlot]:
        for part, cut, rows in linear.rows():
            yield from self.layout.slots(self, linear, part, cut, rows)
            yield from linear.bias_slots(part, cut, rows)

    def tensors(self, linear: Linear) -> Iterator[Tensor]:
        yield from self.weight.tensors()

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        weight, outputs = self.weight, len(linear.weight)
        x = self.ordered(x)
        out = x.new_empty(len(x), outputs)
        for rows in pieces(outputs, weight.inputs, most_values=PIECE_VALUES):
            bias = None if linear.bias is None else linear.bias[rows]
            out[:, rows] = F.linear(x, weight.rows(rows).dequantize().to(x.dtype), bias)
        return out

    def lookup(self, linear: Linear, places: Tensor) -> Tensor:
        return self.weight.rows(places).dequantize().to(linear.weight.dtype)

    def ordered(self, x: Tensor) -> Tensor:
        """Inputs as the columns of the weight have them."""
        return x if self.order is None else x.index_select(1, self.order)

    # ---- for layouts, while weights are loaded

    def put_codes(self, part: str, rows: slice, codes: Tensor) -> None:
        """codes: [some outputs, inputs] in the order of the file; of 4 bits 0 to 15."""
        if part in self.orders:
            codes = codes[:, self.orders[part]]
        target = self.weight.codes[rows]
        target.copy_(pack_nibbles(codes) if self.weight.bits == 4 else codes)

    def put_order(self, part: str, rows: slice, group_of: Tensor) -> None:
        """group_of: [inputs], the group of each.

        Raises `ValueError` if groups are not of one size, or other parts of the layer have others.
        """
        weight = self.weight
        group_of = group_of.to(weight.codes.device).long()
        order = group_of.argsort(stable=True)
        straight = torch.arange(weight.inputs, device=order.device)
        if not torch.equal(group_of[order], straight // weight.group):
            raise ValueError(f"does not put {weight.group} inputs into each group: fetch it again")
        if any(not torch.equal(order, other) for other in self.orders.values()):
            raise ValueError("orders inputs otherwise than the layers that it is multiplied with")
        if not torch.equal(order, straight):
            if not self.kept.is_reordered:
                raise ValueError("orders inputs, of which its config does not tell (desc_act)")
            for piece in pieces(rows.stop - rows.start, weight.inputs):
                codes = weight.codes[own := within(rows, piece)]
                columns = unpack_nibbles(codes, weight.inputs) if weight.bits == 4 else codes
                self.put_codes(part, own, columns[:, order])
            self.order = order
        self.orders[part] = order


def per(cut: Cut, count: int, what: str) -> Cut:
    """The piece of an axis that has one place for `count` of those that `cut` is of.

    Raises `ValueError` if a rank's piece would begin or end within one.
    """
    end = cut.start + cut.size
    if cut.start % count or (end % count and end != cut.whole):
        raise ValueError(
            f"tensor_parallel_size: {cut.whole} {what} are kept in groups of {count}, which ranks "
            f"cannot share: use a smaller one"
        )
    return Cut(cut.start // count, -(-cut.size // count), -(-cut.whole // count))


def unpack_words(words: Tensor, bits: int, axis: int, size: int) -> Tensor:
    """Codes of int32 words, the lowest bits first, along an axis of `size` codes; uint8."""
    shape = [1] * (words.dim() + 1)
    shape[axis + 1] = 32 // bits
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device).view(shape)
    codes: Tensor = words.unsqueeze(axis + 1) >> shifts & (2**bits - 1)
    return codes.flatten(axis, axis + 1).narrow(axis, 0, size).to(torch.uint8)


def signed(codes: Tensor, bits: int) -> Tensor:
    """Codes of 8 bits as they are kept, int8; of 4 bits unchanged."""
    return codes if bits == 4 else (codes ^ 128).view(torch.int8)
