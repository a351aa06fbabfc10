"""What the core checks of a request before anything is queued, for frontends that did not.

Called by `EngineCore.add`. `ValueError` names the field and what it takes.
"""

import math

from nanovllm.limits import (
    MAX_BAD_WORDS,
    MAX_BAD_WORDS_TOKENS,
    MAX_REQUEST_TOKENS,
    MAX_SALT_CHARS,
    check_count,
)
from nanovllm.protocol.messages import AddRequest
from nanovllm.protocol.plan import WorkerInfo
from nanovllm.protocol.request_checks import check_in_vocabulary, check_token_ids

MAX_NUMBER = 2**53  # of a sequence; -1 stands for none in answers
MAX_COUNT = 2**31 - 1  # what a worker's columns hold


def check_request(request: AddRequest, info: WorkerInfo) -> None:
    """Everything that does not depend on what else runs."""
    _check_lengths(request, info.max_model_len)
    _check_numbers(request)
    check_token_ids(request.prompt_token_ids, request.params, info.vocab_size)
    check_in_vocabulary("output_token_ids", request.output_token_ids, info.vocab_size)
    for word in request.bad_words_token_ids:
        check_in_vocabulary("bad_words_token_ids", word, info.vocab_size)
    _check_bad_words(request.bad_words_token_ids)
    _check_names(request)


def _check_bad_words(words: list[list[int]]) -> None:
    if not all(words):
        raise ValueError("bad_words_token_ids: a word of no tokens")
    check_count("bad_words_token_ids", len(words), 2 * MAX_BAD_WORDS, "words")
    size = len(words) * max(map(len, words), default=0)
    check_count("bad_words_token_ids", size, MAX_BAD_WORDS_TOKENS, "words times the longest")


def _check_names(request: AddRequest) -> None:
    for name in ("cache_salt", "tenant"):
        check_count(name, len(getattr(request, name) or ""), MAX_SALT_CHARS, "characters")


def _check_lengths(request: AddRequest, max_model_len: int) -> None:
    num_known = len(request.prompt_token_ids) + len(request.output_token_ids)
    if not request.prompt_token_ids:
        raise ValueError("prompt_token_ids is empty: send at least one token")
    if num_known >= max_model_len:
        raise ValueError(
            f"prompt_token_ids holds {num_known} tokens, which leaves no room for output: "
            f"max_model_len is {max_model_len}"
        )
    num_copied = request.params.n * num_known
    check_count("prompt_token_ids", num_copied, MAX_REQUEST_TOKENS, "tokens times n")
    max_tokens = request.params.max_tokens
    if max_tokens is not None and len(request.output_token_ids) >= max_tokens:
        raise ValueError("output_token_ids: max_tokens were generated already")


def _check_numbers(request: AddRequest) -> None:
    if not 0 <= request.number <= MAX_NUMBER:
        raise ValueError(f"number must be in [0, 2**53], not {request.number}")
    for name in ("max_tokens", "min_tokens", "top_k"):
        if (getattr(request.params, name) or 0) > MAX_COUNT:
            raise ValueError(f"{name} must be below 2**31")
    for name in ("deadline_ms", "ttft_deadline_ms"):
        limit_ms = getattr(request, name)
        if limit_ms is not None and not 0 < limit_ms < math.inf:
            raise ValueError(f"{name} must be a number above 0, not {limit_ms}")
