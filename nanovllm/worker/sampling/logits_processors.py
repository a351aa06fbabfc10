"""Edits of single rows' logits whose size differs from request to request.

Allowed ids, bad words, ids that must not come before min_tokens, and logit_bias. `RequestRows`
prepares them when a row is admitted. `sampler` applies them in plain torch, looping over such rows
only; on a GPU `edit_tables` brings them to the device once, where kernels do the same.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanovllm.protocol.plan import NewRow

IdArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class RowEdits:
    """What one request does to its logits."""

    forbidden: npt.NDArray[np.bool_] | None  # [vocab_size]; None: every id is allowed
    bad_words: list[list[int]]  # the last token of each must not follow the others
    early_ids: IdArray  # not before the output has min_tokens
    min_tokens: int
    biased_ids: IdArray  # each once
    biases: npt.NDArray[np.float32]  # like biased_ids


def prepare_edits(new: NewRow, *, vocab_size: int, eos_token_ids: list[int]) -> RowEdits | None:
    """The edits of an admitted row, or None if it has none.

    EOS ids count as early even with ignore_eos, as in vLLM. Ids outside the vocabulary (a stop id
    of another model, say) can never be sampled and are left out.
    """
    params = new.params

    def ids(values: Any) -> IdArray:
        return np.array([i for i in values if i < vocab_size], np.int64)

    forbidden = None
    if params.allowed_token_ids is not None:
        forbidden = np.ones(vocab_size, bool)
        forbidden[ids(params.allowed_token_ids)] = False
    bad_words = [word for word in new.bad_words_token_ids if word and word[-1] < vocab_size]
    early: set[int] = set()
    if params.min_tokens > len(new.token_ids) - new.num_prompt_tokens:
        early = {*params.stop_token_ids, *eos_token_ids}
    if forbidden is None and not (bad_words or early or params.logit_bias):
        return None
    values = [bias for token_id, bias in params.logit_bias.items() if token_id < vocab_size]
    return RowEdits(
        forbidden=forbidden,
        bad_words=bad_words,
        early_ids=ids(sorted(early)),
        min_tokens=params.min_tokens,
        biased_ids=ids(params.logit_bias),
        biases=np.array(values, np.float32),
    )


def apply_edits(logits: Tensor, edits: RowEdits, outputs: Tensor) -> None:
    """Edit one row in place, in vLLM's order.

    logits: [vocab_size]; outputs: [num_outputs] int32, the tokens generated so far.
    """
    device = logits.device
    if edits.forbidden is not None:
        logits.masked_fill_(torch.from_numpy(edits.forbidden).to(device), -torch.inf)
    if edits.bad_words and (ends := ends_of_bad_words(edits.bad_words, outputs)):
        logits[torch.tensor(ends, device=device)] = -torch.inf
    if len(outputs) < edits.min_tokens:
        logits.index_fill_(0, torch.from_numpy(edits.early_ids).to(device), -torch.inf)
    if len(edits.biased_ids):
        biased, biases = torch.from_numpy(edits.biased_ids), torch.from_numpy(edits.biases)
        logits.index_add_(0, biased.to(device), biases.to(device))


def ends_of_bad_words(words: list[list[int]], outputs: Tensor) -> list[int]:
    """Last tokens of the words whose other tokens end the output (outputs: [n])."""
    longest = max(map(len, words)) - 1
    tail = outputs[max(0, len(outputs) - longest) :].tolist()
    return [
        word[-1]
        for word in words
        if len(word) == 1 or (len(word) - 1 <= len(tail) and word[:-1] == tail[1 - len(word) :])
    ]
