"""How compressed-tensors holds packed weights: `pack-quantized`, and FP8 for plain tokens.

Chosen by `select`. Codes are offset to be positive and lie in int32 words, the first in the lowest
bits: weights along the inputs, zero points along the outputs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nanovllm.worker.layers.linear import Linear, WeightSlot
from nanovllm.worker.parallel import Cut
from nanovllm.worker.pieces import pieces, within
from nanovllm.worker.quant.packed import Packed, per, signed, unpack_words

E4M3 = torch.float8_e4m3fn


class PackQuantized:
    """`weight_packed` [outputs, words] with `weight_scale` [outputs, groups]."""

    def slots(
        self, method: Packed, linear: Linear, part: str, cut: Cut, rows: slice
    ) -> Iterator[WeightSlot]:
        kept, weight, inputs = method.kept, method.weight, linear.inputs
        count = 32 // kept.bits
        groups = per(inputs, kept.group, "inputs") if kept.group else Cut.all_of(1)
        nothing = linear.weight.new_empty(0)

        def put_codes(words: Tensor, _: slice) -> None:
            for piece in pieces(cut.size, inputs.size):
                own = words[piece].to(weight.codes.device)
                codes = unpack_words(own, kept.bits, 1, inputs.size)
                method.put_codes(part, within(rows, piece), signed(codes, kept.bits))

        def put_zero(words: Tensor, _: slice) -> None:
            codes = unpack_words(words.to(weight.codes.device), kept.bits, 0, cut.size)
            weight.set_zero(rows, signed(codes, kept.bits))

        def check_shape(shape: Tensor, _: slice) -> None:
            outputs, *rest = shape.tolist()
            if outputs < cut.whole or rest != [inputs.whole]:  # it may be that of several parts
                raise ValueError(
                    f"says {shape.tolist()}, its config {[cut.whole, inputs.whole]}: check that "
                    "the config belongs to it"
                )

        piece = cut, per(inputs, count, "inputs")
        target = linear.weight[rows]
        yield WeightSlot(
            part, "weight_packed", target, piece, dtype=torch.int32, note=str(kept), put=put_codes
        )
        yield scale_slot(method, linear, part, rows, kind="weight_scale", piece=(cut, groups))
        yield WeightSlot(
            part,
            "weight_shape",
            nothing,
            (Cut.all_of(2),),
            put=check_shape,
            dtype=torch.int64,
            outputs=None,
            is_optional=True,
        )
        if kept.has_zeros:
            piece = per(cut, count, "outputs"), groups
            kind = "weight_zero_point"
            yield WeightSlot(part, kind, nothing, piece, dtype=torch.int32, put=put_zero)
        if kept.is_reordered:
            yield order_slot(method, linear, part, rows, kind="weight_g_idx")


class Fp8Weights:
    """`weight` in e4m3 with a scale for each square block, under the name that `scale_kind` is; or
    for each output, or for all."""

    def __init__(self, scale_kind: str) -> None:
        self._scale_kind = scale_kind

    def slots(
        self, method: Packed, linear: Linear, part: str, cut: Cut, rows: slice
    ) -> Iterator[WeightSlot]:
        weight, kept = method.weight, method.kept
        nothing, note = linear.weight.new_empty(0), str(kept)

        def put_codes(codes: Tensor, _: slice) -> None:
            method.put_codes(part, rows, codes.to(weight.codes.device))

        def put_scale(scale: Tensor, _: slice) -> None:
            if kept.scales == "block":
                scale = scale.repeat_interleave(kept.group, 0)[: cut.size]
            weight.set_scale(rows, scale.expand(cut.size, weight.scale.shape[1]))

        piece: tuple[Cut, ...] = cut, linear.inputs
        yield WeightSlot(part, "weight", linear.weight[rows], piece, dtype=E4M3, put=put_codes)
        if kept.scales == "block":
            piece = per(cut, kept.group, "outputs"), per(linear.inputs, kept.group, "inputs")
        else:
            piece = () if kept.scales == "tensor" else (cut, Cut.all_of(1))
        yield WeightSlot(part, self._scale_kind, nothing, piece, note=note, put=put_scale)


def scale_slot(
    method: Packed,
    linear: Linear,
    part: str,
    rows: slice,
    *,
    kind: str,
    piece: tuple[Cut, Cut],
    is_turned: bool = False,
) -> WeightSlot:
    """Scales of groups. is_turned: outputs are their second axis."""

    def put(scale: Tensor, _: slice) -> None:
        scale = scale.t() if is_turned else scale
        if not scale.isfinite().all():
            raise ValueError("holds scales that are no numbers: fetch it again")
        method.weight.set_scale(rows, scale)

    nothing, note = linear.weight.new_empty(0), str(method.kept)
    outputs = 1 if is_turned else 0
    return WeightSlot(part, kind, nothing, piece, note=note, put=put, outputs=outputs)


def order_slot(method: Packed, linear: Linear, part: str, rows: slice, *, kind: str) -> WeightSlot:
    """Which group each input belongs to. Raises `ValueError` where ranks share out inputs that are
    grouped in an order of their own."""
    inputs, is_reordered = linear.inputs, method.kept.is_reordered
    if is_reordered and not inputs.is_whole:
        raise ValueError(
            "tensor_parallel_size: weights whose inputs are ordered (desc_act) cannot be shared by "
            "ranks: use 1, or a checkpoint without"
        )

    def put(group_of: Tensor, _: slice) -> None:
        if not inputs.is_whole:  # of a trivial order, the groups of this rank
            group_of = group_of - group_of[:1]
        method.put_order(part, rows, group_of)

    nothing, dtype = linear.weight.new_empty(0), torch.int32
    return WeightSlot(
        *(part, kind, nothing, (inputs,)),
        put=put,
        dtype=dtype,
        outputs=None,
        is_optional=not is_reordered,
    )
