"""How AutoAWQ's gemm version holds 4-bit weights: along the outputs, eight to an int32 word.

Chosen by `select`. Source: Lin et al., "AWQ", 2023, and the `awq` package's `WQLinear_GEMM`.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from nanovllm.worker.layers.linear import Linear, WeightSlot
from nanovllm.worker.parallel import Cut
from nanovllm.worker.pieces import pieces, within
from nanovllm.worker.quant.compressed_tensors import scale_slot
from nanovllm.worker.quant.packed import Packed, per, unpack_words

PER_WORD = 8
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # of eight outputs in their word


class Awq:
    """`qweight` [inputs, words], `qzeros` [groups, words], `scales` [groups, outputs]."""

    def slots(
        self, method: Packed, linear: Linear, part: str, cut: Cut, rows: slice
    ) -> Iterator[WeightSlot]:
        weight, inputs = method.weight, linear.inputs
        groups = per(inputs, method.kept.group, "inputs") if method.kept.group else Cut.all_of(1)
        words = per(cut, PER_WORD, "outputs")
        nothing, note = linear.weight.new_empty(0), str(method.kept)

        def put_codes(values: Tensor, _: slice) -> None:
            for piece in pieces(cut.size, inputs.size, unit=PER_WORD):
                words = slice(piece.start // PER_WORD, piece.stop // PER_WORD)
                codes = unpack_outputs(values[:, words].to(weight.codes.device))
                method.put_codes(part, within(rows, piece), codes)

        def put_zero(values: Tensor, _: slice) -> None:
            weight.set_zero(rows, unpack_outputs(values))

        turned = partial(WeightSlot, part, dtype=torch.int32, note=note, outputs=1)
        yield turned("qweight", linear.weight[rows], (inputs, words), put=put_codes)
        yield turned("qzeros", nothing, (groups, words), put=put_zero)
        piece = groups, cut
        yield scale_slot(method, linear, part, rows, kind="scales", piece=piece, is_turned=True)


def unpack_outputs(words: Tensor) -> Tensor:
    """words: [n, outputs / 8]. Returns codes [outputs, n], uint8."""
    codes = unpack_words(words, 4, 1, words.shape[1] * PER_WORD)
    places = torch.tensor(PLACES, device=words.device)
    eights = codes.view(len(codes), -1, PER_WORD)
    return eights.index_select(2, places).flatten(1).t()
