"""How AutoGPTQ and GPTQModel hold weights of 4 and 8 bits: along the inputs, in int32 words.

Chosen by `select`. Zero points of version 1 are stored less one. Source: Frantar et al., "GPTQ",
2022, and the packages' `QuantLinear`.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from nanovllm.worker.layers.linear import Linear, WeightSlot
from nanovllm.worker.parallel import Cut
from nanovllm.worker.pieces import pieces, within
from nanovllm.worker.quant.compressed_tensors import order_slot, scale_slot
from nanovllm.worker.quant.packed import Packed, per, signed, unpack_words


class Gptq:
    """`qweight` [words, outputs], `qzeros` [groups, words], `scales` [groups, outputs], `g_idx`.

    offset: of zero points, what they are stored less.
    """

    def __init__(self, offset: int) -> None:
        self._offset = offset

    def slots(
        self, method: Packed, linear: Linear, part: str, cut: Cut, rows: slice
    ) -> Iterator[WeightSlot]:
        kept, weight, inputs = method.kept, method.weight, linear.inputs
        bits, count = kept.bits, 32 // kept.bits
        groups = per(inputs, kept.group, "inputs") if kept.group else Cut.all_of(1)
        nothing, note = linear.weight.new_empty(0), str(kept)

        def put_codes(words: Tensor, _: slice) -> None:
            for piece in pieces(cut.size, inputs.size):
                own = words[:, piece].to(weight.codes.device)
                codes = unpack_words(own, bits, 0, inputs.size)
                method.put_codes(part, within(rows, piece), signed(codes, bits).t())

        def put_zero(words: Tensor, _: slice) -> None:
            codes = unpack_words(words.to(weight.codes.device), bits, 1, cut.size)
            codes = codes + self._offset & 2**bits - 1
            weight.set_zero(rows, signed(codes, bits).t())

        piece, dtype = (per(inputs, count, "inputs"), cut), torch.int32
        target = linear.weight[rows]
        turned = partial(WeightSlot, part, dtype=dtype, note=note, outputs=1)
        yield turned("qweight", target, piece, put=put_codes)
        piece = groups, per(cut, count, "outputs")
        yield turned("qzeros", nothing, piece, put=put_zero)
        piece = groups, cut
        yield scale_slot(method, linear, part, rows, kind="scales", piece=piece, is_turned=True)
        yield order_slot(method, linear, part, rows, kind="g_idx")
        if linear.bias is None:  # AutoGPTQ writes zeros for every layer without one
            yield WeightSlot(part, "bias", nothing, (cut,), put=_check_zeros, is_optional=True)


def _check_zeros(bias: Tensor, _: slice) -> None:
    if bias.any():
        raise ValueError(
            "is a bias, of which its config does not tell: check that it belongs to it"
        )
