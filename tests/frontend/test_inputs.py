"""Mistakes are found before anything is sent, and say what to do."""

import math
from typing import Any

import pytest

from nanovllm.frontend import inputs
from nanovllm.frontend.inputs import (
    Prompt,
    checked_messages,
    encode_bad_words,
    make_prompt,
)
from nanovllm.frontend.tokenizer import Tokenizer
from nanovllm.sampling_params import SamplingParams
from tests.frontend.fake_core import MAX_MODEL_LEN, VOCAB_SIZE
from tests.frontend.vocabulary import byte_tokenizer


def no_tokenizer() -> Tokenizer:
    raise ValueError("there is no tokenizer")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", Prompt("ab", [97, 98])),
        ({"prompt": "ab"}, Prompt("ab", [97, 98])),
        ({"prompt_token_ids": [5, 6]}, Prompt(None, [5, 6])),
        ([5, 6], Prompt(None, [5, 6])),
        ((5, 6), Prompt(None, [5, 6])),
    ],
)
def test_prompts(prompt: Any, expected: Prompt) -> None:
    assert make_prompt(prompt, byte_tokenizer) == expected


def test_token_ids_need_no_tokenizer_and_are_copied() -> None:
    mine = [5, 6]
    made = make_prompt(mine, no_tokenizer)
    mine.append(7)
    assert made.token_ids == [5, 6]


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ("", "prompt is empty"),
        ({}, "exactly one"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "exactly one"),
        ({"promt": "a"}, "did you mean 'prompt'"),
        ({"prompt": [1]}, "prompt must be a string, not list"),
        ({"prompt_token_ids": "a"}, "prompt_token_ids must be a list of integers, not str"),
        ({"prompt_token_ids": [1, True]}, "True"),
        ([1, 2.0], r"2\.0"),
        (None, "not NoneType"),
        (7, "not int"),
    ],
)
def test_what_is_no_prompt(prompt: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make_prompt(prompt, byte_tokenizer)


def test_a_prompt_is_as_long_as_allowed_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_PROMPT_CHARS", 3)
    assert make_prompt("abc", byte_tokenizer).text == "abc"
    with pytest.raises(ValueError, match=r"prompt holds 4 characters: at most 3"):
        make_prompt("abcd", byte_tokenizer)


@pytest.mark.parametrize(
    ("token_ids", "params", "complaint"),
    [
        ([], {}, "prompt_token_ids is empty"),
        ([1] * MAX_MODEL_LEN, {}, "prompt has 64 tokens.*max_model_len is 64"),
        ([1, VOCAB_SIZE], {}, "prompt_token_ids holds 300.*vocabulary"),
        ([-1], {}, "prompt_token_ids holds -1"),
        ([1], {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids holds 300"),
        ([1], {"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias holds 300"),
        ([1], {"allowed_token_ids": [3, VOCAB_SIZE]}, "allowed_token_ids holds 300"),
    ],
)
def test_what_this_model_cannot_do(
    token_ids: list[int], params: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        SamplingParams(**params).check_prompt(token_ids, most=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE)


def test_what_fits_or_is_cut_to_what_fits() -> None:
    for params in ({"max_tokens": 4}, {"max_tokens": None}, {"max_tokens": 5000}):
        made = SamplingParams(**params, allowed_token_ids=[0, VOCAB_SIZE - 1])
        for num_tokens in (60, MAX_MODEL_LEN - 1):
            made.check_prompt([0] * num_tokens, most=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE)


def test_bad_words_are_banned_at_the_start_and_after_a_space() -> None:
    words = encode_bad_words(["ab", " b", "ab", " "], byte_tokenizer)
    assert words == [[97, 98], [32, 97, 98], [98], [32, 98], [32], [32, 32]]
    with pytest.raises(ValueError, match="tokenizer"):
        encode_bad_words(["ab"], no_tokenizer)
    assert encode_bad_words([], no_tokenizer) == []


def test_params_check_themselves() -> None:
    with pytest.raises(ValueError, match="temperature"):
        SamplingParams(temperature=math.nan)


def test_texts_of_a_message_are_lines_of_its_content() -> None:
    parts = [{"type": "text", "text": "a"}, "b"]
    messages = checked_messages([{"role": "user", "content": parts}], byte_tokenizer)
    assert messages == [{"role": "user", "content": "a\nb"}]
