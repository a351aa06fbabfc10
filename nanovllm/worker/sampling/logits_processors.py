"""Edits of single rows' logits whose size differs from request to request.

Allowed ids, bad words, ids that must not come before min_tokens, and logit_bias. `RequestRows`
prepares the tensors when a row is admitted; `sampler` applies them, looping over such rows only.
"""

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.protocol.plan import NewRow


@dataclass(frozen=True, slots=True)
class BadWords:
    """Token sequences whose last token must not follow the others; sorted by length."""

    prefixes: Tensor  # [num_words, longest] int32, right-aligned after -1, which matches anything
    last_ids: Tensor  # [num_words] int64
    prefix_lengths: list[int]


@dataclass(frozen=True, slots=True)
class RowEdits:
    """What one request does to its logits; None where it does nothing."""

    forbidden: Tensor | None  # [vocab_size] bool
    bad_words: BadWords | None
    early_ids: Tensor | None  # [n] int64: not before the output has min_tokens
    min_tokens: int
    biased_ids: Tensor | None  # [n] int64
    biases: Tensor | None  # [n] float32


def prepare_edits(
    new: NewRow, *, vocab_size: int, eos_token_ids: list[int], device: torch.device
) -> RowEdits | None:
    """The edits of an admitted row, or None if it has none.

    EOS ids count as early even with ignore_eos, as in vLLM. Ids outside the vocabulary (a stop id
    of another model, say) can never be sampled and are left out.
    """
    params = new.params

    def ids(values: list[int]) -> Tensor:
        return torch.tensor([i for i in values if i < vocab_size], dtype=torch.int64, device=device)

    forbidden = bad_words = early_ids = biased_ids = biases = None
    if params.allowed_token_ids is not None:
        forbidden = torch.ones(vocab_size, dtype=torch.bool, device=device)
        forbidden[ids(params.allowed_token_ids)] = False
    words = [w for w in new.bad_words_token_ids if w and w[-1] < vocab_size]
    if words:
        bad_words = _prepare_bad_words(words, device)
    if params.min_tokens > len(new.token_ids) - new.num_prompt_tokens:
        early_ids = ids(sorted({*params.stop_token_ids, *eos_token_ids}))
    if params.logit_bias:
        biased_ids = ids(list(params.logit_bias))
        values = [bias for token_id, bias in params.logit_bias.items() if token_id < vocab_size]
        biases = torch.tensor(values, dtype=torch.float32, device=device)
    if all(edit is None for edit in (forbidden, bad_words, early_ids, biased_ids)):
        return None
    return RowEdits(forbidden, bad_words, early_ids, params.min_tokens, biased_ids, biases)


def apply_edits(logits: Tensor, edits: RowEdits, outputs: Tensor) -> None:
    """Edit one row in place, in vLLM's order.

    logits: [vocab_size]; outputs: [num_outputs] int32, the tokens generated so far.
    """
    if edits.forbidden is not None:
        logits.masked_fill_(edits.forbidden, -torch.inf)
    if edits.bad_words is not None:
        _forbid_bad_words(logits, edits.bad_words, outputs)
    if edits.early_ids is not None and len(outputs) < edits.min_tokens:
        logits.index_fill_(0, edits.early_ids, -torch.inf)
    if edits.biased_ids is not None and edits.biases is not None:
        logits.index_add_(0, edits.biased_ids, edits.biases)


def _prepare_bad_words(words: list[list[int]], device: torch.device) -> BadWords:
    words = sorted(words, key=len)
    longest = len(words[-1]) - 1
    prefixes = [[-1] * (longest + 1 - len(word)) + word[:-1] for word in words]
    return BadWords(
        torch.tensor(prefixes, dtype=torch.int32, device=device),
        torch.tensor([word[-1] for word in words], device=device),
        [len(word) - 1 for word in words],
    )


def _forbid_bad_words(logits: Tensor, words: BadWords, outputs: Tensor) -> None:
    """Forbid the last token of each word whose other tokens end the output (outputs: [n])."""
    num_outputs = len(outputs)
    count = bisect_right(words.prefix_lengths, num_outputs)  # the others cannot match yet
    if not count:
        return
    longest = words.prefix_lengths[count - 1]
    tail = outputs[num_outputs - longest :]
    prefixes = words.prefixes[:count, words.prefixes.shape[1] - longest :]
    matches = ((prefixes == tail) | (prefixes < 0)).all(-1)  # [count]
    # Added, not assigned: several words may forbid one id, and only some of them now.
    penalty = torch.zeros(count, device=logits.device).masked_fill_(matches, -torch.inf)
    logits.index_add_(0, words.last_ids[:count], penalty)
