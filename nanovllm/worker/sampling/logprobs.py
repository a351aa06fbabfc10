"""Log-probabilities of chosen tokens: computed and packed on the device, unpacked on the host.

Samplers use it for sampled tokens, `model_runner` for prompts. They are the model's own, before any
edit, penalty or temperature, as vLLM's default has it.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nanovllm.protocol.plan import PositionLogprobs, TokenLogprobs
from nanovllm.worker.sampling.columns import Int32Array

NUM_FIXED = 3  # words of a position before its alternatives: token id, log-probability, rank


class PackLogprobs(Protocol):
    """`pack_logprobs`, or the same by kernels."""

    def __call__(self, logits: Tensor, token_ids: Tensor, *, num_top: int) -> Tensor: ...


def pack_logprobs(logits: Tensor, token_ids: Tensor, *, num_top: int) -> Tensor:
    """As 32-bit words: [m, 3 + 2 * num_top] int32.

    logits: [m, vocab_size] of any float type; token_ids: [m] integers. num_top: alternatives, or -1
    for the whole vocabulary. A line's words are its token id, log-probability (float32) and rank,
    the likeliest ids, descending, and their log-probabilities. A token's rank is one more than the
    number of tokens with a larger logit.
    """
    logits, token_ids = logits.float(), token_ids.long()
    vocab_size = logits.shape[1]
    chosen = logits.gather(1, token_ids[:, None])  # [m, 1]
    ranks = (logits > chosen).sum(-1, keepdim=True) + 1
    normalizer = logits.logsumexp(-1, keepdim=True)
    top = logits.topk(vocab_size if num_top < 0 else min(num_top, vocab_size), dim=-1)
    words = (
        token_ids[:, None].int(),
        (chosen - normalizer).view(torch.int32),
        ranks.int(),
        top.indices.int(),
        (top.values - normalizer).view(torch.int32),
    )
    return torch.cat(words, dim=1)


@dataclass(frozen=True, slots=True)
class PackedLogprobs:
    """What `pack_logprobs` has made of m positions, perhaps still on its way to the host."""

    words: Tensor  # [m, 3 + 2 * num_top] int32

    def to_host(self) -> "PackedLogprobs":
        """Start copying to (on CUDA: pinned) host memory; an event says when it is done."""
        return PackedLogprobs(self.words.to("cpu", non_blocking=True))

    def unpack(self, num_top: list[int]) -> list[TokenLogprobs]:
        """One message per position, with its first `num_top[i]` alternatives (-1: all)."""
        return unpack(self.words.numpy(), num_top)


def unpack(words: Int32Array, num_top: list[int]) -> list[TokenLogprobs]:
    """As `PackedLogprobs.unpack`. words: [m, 3 + 2 * n]; of a position that wants fewer than n, no
    others are looked at."""
    most, reals = (words.shape[1] - NUM_FIXED) // 2, words.view(np.float32)
    middle = NUM_FIXED + most  # where ids end and their log-probabilities begin
    found = []
    for wanted, token_id, logprob, rank, ids, logprobs in zip(
        num_top,
        words[:, 0].tolist(),
        reals[:, 1].tolist(),
        words[:, 2].tolist(),
        words[:, NUM_FIXED:middle].tolist(),
        reals[:, middle:].tolist(),
        strict=True,
    ):
        if 0 <= wanted < most:
            ids, logprobs = ids[:wanted], logprobs[:wanted]
        found.append(TokenLogprobs(token_id, logprob, rank, ids, logprobs))
    return found


def joined(parts: list[PackedLogprobs]) -> PositionLogprobs:
    """As they go to the core. parts: on the host, of so many alternatives each."""
    words = torch.cat([part.words for part in parts])
    return PositionLogprobs(len(words), words.numpy().tobytes())
