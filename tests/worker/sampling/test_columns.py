"""The record by which the device knows what a row asks."""

import numpy as np

from nanovllm.protocol.plan import NewRow
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.request_rows import encode
from nanovllm.worker.sampling.columns import (
    COLUMNS,
    NEUTRAL,
    NO_LOGPROBS,
    NUM_WORDS,
    RECORD,
    word_offset,
)
from tests.worker.planning import new_row

FIELDS = {
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.25,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.75,
    "logprobs": 3,
    "prompt_logprobs": 2,
}


def record_of(new: NewRow) -> np.void:
    """By name."""
    words = np.array(encode(new), np.int32)
    assert words.shape == (NUM_WORDS,)
    (record,) = words.view(RECORD)
    return record


def test_a_record_holds_what_is_asked_and_nothing_is_counted_yet() -> None:
    params = SamplingParams(**FIELDS)  # type: ignore[arg-type]
    record = record_of(new_row(5, [1, 2, 3], params, num_prompt_tokens=2, seed=2**62 + 1))
    asked = {name: record[name].item() for name in RECORD.names or ()}
    assert asked == {"seed": 2**62 + 1, "num_prompt_tokens": 2, "num_counted": 0, **FIELDS}


def test_who_is_greedy_asks_for_no_draw_and_what_is_not_asked_changes_nothing() -> None:
    params = SamplingParams(**{**FIELDS, "temperature": 0.0, "logprobs": None})  # type: ignore[arg-type]
    record = record_of(new_row(0, [1], params))
    assert [record[name].item() for name in ("temperature", "top_k", "top_p", "min_p")] == [
        0,
        0,
        1,
        0,
    ]
    assert record["logprobs"] == NO_LOGPROBS and record["repetition_penalty"] == 1.5
    neutral = record_of(new_row(0, [], SamplingParams(temperature=0.0)))
    assert neutral == NEUTRAL[0]


def test_words_of_a_record_are_found_by_name() -> None:
    words = NEUTRAL.view("i4")
    assert NUM_WORDS == len(words) == 2 + 2 + len(COLUMNS)
    names = ("seed", "num_prompt_tokens", "num_counted")
    assert [word_offset(name) for name in names] == [0, 2, 3]
    assert words[word_offset("logprobs")] == NO_LOGPROBS
    assert words[word_offset("top_p")] == 0x3F800000, "1.0 in single precision"
