"""Penalties on tokens a row has seen; `sampler` calls this for the rows that ask.

What was seen is read from the device's own tokens, so ids that the host does not know yet count.
"""

import torch
from torch import Tensor


def penalize(
    logits: Tensor,
    tokens: Tensor,
    is_output: Tensor,
    *,
    repetition_penalty: Tensor,
    presence_penalty: Tensor,
    frequency_penalty: Tensor,
) -> Tensor:
    """Penalize in place, in vLLM's order: repetition, frequency, presence.

    logits: [n, vocab_size]; tokens: [n, width] int64, each row's tokens padded with its first;
    is_output: [n, width], which of them were generated. repetition_penalty ([n], Keskar et al.
    2019) divides positive and multiplies negative logits of prompt and output tokens;
    frequency_penalty ([n]) subtracts once per occurrence in the output, presence_penalty ([n]) once
    if there is any.
    """
    counts = torch.zeros_like(logits, dtype=torch.int32)
    counts = counts.scatter_add_(1, tokens, is_output.int()).gather(1, tokens)  # [n, width]
    seen = logits.gather(1, tokens)
    rate = repetition_penalty[:, None]
    seen = torch.where(seen > 0, seen / rate, seen * rate)
    seen -= frequency_penalty[:, None] * counts + presence_penalty[:, None] * (counts > 0)
    # Repeated tokens write the same value several times, so the order of writes does not matter.
    return logits.scatter_(1, tokens, seen)
