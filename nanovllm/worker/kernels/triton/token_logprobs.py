"""Log-probabilities of chosen tokens and of the likeliest ones, in two launches.

`sampling.logprobs` says what they are, and does the same in plain torch. The first kernel goes over
pieces of the vocabulary, each program with a piece of one line; the second joins a line's pieces.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.worker.kernels.triton.fused_sampler import LOG2E, order_key, value_of_key
from nanovllm.worker.kernels.triton.staged_words import (
    LOGITS,
    MOST,
    NUM_TOP,
    TOLD_LINE,
    TYPES,
    address,
    field,
)
from nanovllm.worker.sampling.logprobs import NUM_FIXED
from nanovllm.worker.sampling.wishes import Wishes

PIECE = 2048  # tokens of a program
BELOW_KEYS = tl.constexpr(-(2**63))  # below every key
LN2 = tl.constexpr(0.6931471805599453)


# One compilation for every number of alternatives, which is a bound of loops.
@triton.jit(do_not_specialize=["num_top"])
def _pieces_kernel(
    logits,  # [n, vocab_size] of any float type; None: where the words say
    stride,
    token_ids,  # [n] of any integer type
    words, size,  # as `sampling.wishes` has them; None: everybody wants num_top
    sums,  # [m, num_pieces, 2] fp32, out: maximum, sum of exp(logit - maximum)
    larger,  # [m, num_pieces] int32, out: logits above the chosen token's
    candidates,  # [m, num_pieces, num_top] int64, out: the largest, descending
    vocab_size,
    num_top,  # as many as an entry wants, or more
    PIECE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    entry, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    line, wanted = entry, num_top
    if words is not None:
        line = field(words, TOLD_LINE, entry, size)
        wanted = field(words, NUM_TOP, entry, size).to(tl.int32)
        logits = address(words, LOGITS, TYPE)
    if line < 0:
        return
    tokens = piece * PIECE + tl.arange(0, PIECE)
    inside = tokens < vocab_size
    row_logits = logits + line * stride
    x = tl.load(row_logits + tokens, inside, other=float("-inf")).to(tl.float32)
    chosen = tl.load(row_logits + tl.load(token_ids + line).to(tl.int64)).to(tl.float32)
    largest = tl.max(x, 0)
    weights = tl.exp2((x - tl.maximum(largest, -1e30)) * LOG2E)
    place = entry * tl.num_programs(1) + piece
    tl.store(sums + 2 * place, largest)
    tl.store(sums + 2 * place + 1, tl.sum(weights, 0))
    tl.store(larger + place, tl.sum((x > chosen).to(tl.int32), 0))
    # Of equal logits the first: the lower half of a key falls as the token rises.
    keys = tl.where(inside, (order_key(x) << 32) | (0x7FFFFFFF - tokens).to(tl.int64), BELOW_KEYS)
    for index in range(wanted):
        best = tl.max(keys, 0)
        tl.store(candidates + place * num_top + index, best)
        keys = tl.where(keys == best, BELOW_KEYS, keys)


@triton.jit(do_not_specialize=["num_top"])
def _join_kernel(
    logits, stride, token_ids, words, size, sums, larger, candidates,
    packed,  # [m, 3 + 2 * most] int32, out: as `sampling.logprobs` packs them
    num_pieces, num_top,
    NUM_FIXED: tl.constexpr, PIECES: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """One program per entry. The most that any of them wants is num_top, or what the words say."""
    entry = tl.program_id(0).to(tl.int64)
    line, wanted, most = entry, num_top, num_top
    if words is not None:
        line = field(words, TOLD_LINE, entry, size)
        wanted = field(words, NUM_TOP, entry, size).to(tl.int32)
        most = tl.load(words + MOST)
        logits = address(words, LOGITS, TYPE)
    if line < 0:
        return
    pieces = tl.arange(0, PIECES)
    present = pieces < num_pieces
    places = entry * num_pieces + pieces
    maxima = tl.load(sums + 2 * places, present, other=float("-inf"))
    masses = tl.load(sums + 2 * places + 1, present, other=0.0)
    largest = tl.max(maxima, 0)
    total = tl.sum(masses * tl.exp2((tl.maximum(maxima, -1e30) - largest) * LOG2E), 0)
    normalizer = largest + tl.log2(total) * LN2
    token = tl.load(token_ids + line).to(tl.int64)
    chosen = tl.load(logits + line * stride + token).to(tl.float32)
    rank = 1 + tl.sum(tl.load(larger + places, present, other=0), 0)
    out = packed + entry * (NUM_FIXED + 2 * most)
    tl.store(out, token.to(tl.int32))
    tl.store(out + 1, (chosen - normalizer).to(tl.int32, bitcast=True))
    tl.store(out + 2, rank)
    taken = tl.zeros([PIECES], tl.int32)  # of each piece's candidates
    for index in range(wanted):
        heads = tl.load(
            candidates + places * num_top + taken, present & (taken < wanted), other=BELOW_KEYS
        )
        best = tl.max(heads, 0)
        taken += (heads == best).to(tl.int32)
        top_id = 0x7FFFFFFF - (best & 0xFFFFFFFF)
        logprob = value_of_key(best >> 32) - normalizer
        tl.store(out + NUM_FIXED + index, top_id.to(tl.int32))
        tl.store(out + NUM_FIXED + most + index, logprob.to(tl.int32, bitcast=True))


def pack_logprobs(logits: Tensor, token_ids: Tensor, *, num_top: int) -> Tensor:
    """As `sampling.logprobs.pack_logprobs`. logits: [m, vocab_size] of any float type; token_ids:
    [m] integers. Returns [m, 3 + 2 * num_top]."""
    m, num_top = len(logits), min(num_top, logits.shape[1])
    assert logits.stride(1) == 1 and token_ids.stride(0) == 1
    packed = torch.empty(m, NUM_FIXED + 2 * num_top, dtype=torch.int32, device=logits.device)
    _launch(logits, token_ids, None, m, num_top, packed)
    return packed


def pack_wished(
    wishes: Wishes, num_entries: int, *, token_ids: Tensor, num_top: int, packed: Tensor
) -> None:
    """The same of entries that want them, from the logits that the words point to.

    num_entries: as many as there are, or more. token_ids: [n] int64, of the step. num_top: as many
    alternatives as an entry wants, or more. packed: int32, out: [num_entries, 3 + 2 * most], by the
    most that the head tells; of an entry that wants fewer, what lies behind them means nothing.
    """
    _launch(None, token_ids, wishes, num_entries, num_top, packed)


def _launch(
    logits: Tensor | None,
    token_ids: Tensor,
    wishes: Wishes | None,
    m: int,
    num_top: int,
    packed: Tensor,
) -> None:
    """Of logits, or of what is wished."""
    words, size, dtype = None, 0, None
    if wishes is not None:
        words, size, dtype = wishes.words, wishes.size, TYPES[wishes.dtype]
        stride, vocab_size = wishes.stride, wishes.vocab_size
    else:
        assert logits is not None
        stride, vocab_size = logits.stride(0), logits.shape[1]
    device, num_pieces = token_ids.device, triton.cdiv(vocab_size, PIECE)
    sums = torch.empty(m, num_pieces, 2, device=device)
    larger = torch.empty(m, num_pieces, dtype=torch.int32, device=device)
    candidates = torch.empty(m, num_pieces, max(num_top, 1), dtype=torch.int64, device=device)
    _pieces_kernel[(m, num_pieces)](
        logits, stride, token_ids, words, size, sums, larger, candidates, vocab_size, num_top,
        PIECE=PIECE, TYPE=dtype, num_warps=4,
    )  # fmt: skip
    _join_kernel[(m,)](
        logits, stride, token_ids, words, size, sums, larger, candidates, packed, num_pieces,
        num_top,
        NUM_FIXED=NUM_FIXED, PIECES=triton.next_power_of_2(num_pieces), TYPE=dtype, num_warps=4,
    )  # fmt: skip
