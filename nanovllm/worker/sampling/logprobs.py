"""Log-probabilities of chosen tokens: computed on the device, copied and unpacked on the host.

`sampler` uses it for sampled tokens, `model_runner` for prompts. They are the model's own, before
any edit, penalty or temperature, as vLLM's default has it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.protocol.plan import TokenLogprobs


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """n positions; ranks count from 1; the top ones descend."""

    token_ids: Tensor  # [n] int64
    logprobs: Tensor  # [n] float32
    ranks: Tensor  # [n] int64
    top_ids: Tensor  # [n, num_top] int64
    top_logprobs: Tensor  # [n, num_top] float32

    def to_host(self) -> "LogprobTensors":
        """Start copying to (on CUDA: pinned) host memory; an event says when it is done."""
        return LogprobTensors(*(t.to("cpu", non_blocking=True) for t in self._tensors()))

    def unpack(self, num_top: list[int]) -> list[TokenLogprobs]:
        """One message per position, with its first `num_top[i]` alternatives (-1: all)."""
        columns = (tensor.tolist() for tensor in self._tensors())
        return [
            TokenLogprobs(token_id, logprob, rank, ids[: _end(n)], logprobs[: _end(n)])
            for n, token_id, logprob, rank, ids, logprobs in zip(num_top, *columns, strict=True)
        ]

    @staticmethod
    def concatenate(parts: list["LogprobTensors"]) -> "LogprobTensors":
        """Join along the positions."""
        columns = zip(*(part._tensors() for part in parts), strict=True)
        return LogprobTensors(*(torch.cat(column) for column in columns))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.token_ids, self.logprobs, self.ranks, self.top_ids, self.top_logprobs


def gather_logprobs(logits: Tensor, token_ids: Tensor, *, num_top: int) -> LogprobTensors:
    """logits: [n, vocab_size] float32; token_ids: [n] int64; num_top: alternatives, or -1 for all.

    A token's rank is one more than the number of tokens with a larger logit.
    """
    vocab_size = logits.shape[1]
    chosen = logits.gather(1, token_ids[:, None])  # [n, 1]
    ranks = (logits > chosen).sum(-1) + 1
    normalizer = logits.logsumexp(-1, keepdim=True)
    top = logits.topk(vocab_size if num_top < 0 else min(num_top, vocab_size), dim=-1)
    return LogprobTensors(
        token_ids, (chosen - normalizer)[:, 0], ranks, top.indices, top.values - normalizer
    )


def _end(num_top: int) -> int | None:
    return None if num_top < 0 else num_top
