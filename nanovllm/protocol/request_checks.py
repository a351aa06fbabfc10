"""That the token ids of a request are the model's: they index tables on the device.

Frontends check before they send (`frontend/inputs.py`), the core before it queues
(`core/admission.py`), for those that did not.
"""

from array import array
from collections.abc import Collection, Iterator

import numpy as np

from nanovllm.sampling_params import SamplingParams


def check_token_ids(
    prompt_token_ids: Collection[int], params: SamplingParams, vocab_size: int
) -> None:
    """All that a caller names by id. Raises `ValueError` naming the field."""
    for name, token_ids in _named_token_ids(prompt_token_ids, params):
        check_in_vocabulary(name, token_ids, vocab_size)


def check_in_vocabulary(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    """Raises `ValueError` if one is outside of [0, vocab_size)."""
    if token_ids and not _are_below(vocab_size, token_ids):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise ValueError(
            f"{name} holds {wrong}, which is outside the model's vocabulary: "
            f"token ids are in [0, {vocab_size})"
        )


def _are_below(limit: int, token_ids: Collection[int]) -> bool:
    """Whether all are in [0, limit). Long prompts wait for this: a third of a loop's time."""
    try:
        words = array("I", token_ids)
    except OverflowError:
        return False
    return int(np.frombuffer(words, np.uint32).max()) < limit


def _named_token_ids(
    prompt_token_ids: Collection[int], params: SamplingParams
) -> Iterator[tuple[str, Collection[int]]]:
    yield "prompt_token_ids", prompt_token_ids
    yield "stop_token_ids", params.stop_token_ids
    yield "logit_bias", params.logit_bias
    yield "allowed_token_ids", params.allowed_token_ids or ()
