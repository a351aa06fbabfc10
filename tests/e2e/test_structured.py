"""Structured outputs through the whole engine with a real model, beside free requests."""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from nanovllm import LLM, RequestFailedError, SamplingParams, StructuredOutputsParams
from tests.waiting import WAIT_S

pytestmark = pytest.mark.model
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
DATE = "(19|20)[0-9]{2}-[01][0-9]-[0-3][0-9]"
CHOICES = ["yes", "no", "café au lait"]
SUM = 'start: number (" + " number)~1..3\nnumber: /[1-9][0-9]?/'
QUESTION = [{"role": "user", "content": "Tell me something about yourself, in a short answer."}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Small enough to chunk the prompts, and to preempt; two steps in flight."""
    with LLM(
        "smollm2",
        device="cpu",
        dtype="float32",
        max_model_len=256,
        max_num_seqs=16,
        max_num_batched_tokens=48,
        num_gpu_blocks_override=22,
        max_inflight_steps=2,
        grammar_timeout_s=WAIT_S,
    ) as llm:
        yield llm


def sampled(wanted: dict[str, Any] | None, seed: int, **params: Any) -> SamplingParams:
    structured = None if wanted is None else StructuredOutputsParams(**wanted)
    settings = {"temperature": 1.0, "max_tokens": 150, "seed": seed, **params}
    return SamplingParams(structured_outputs=structured, **settings)


def test_all_kinds_validate_beside_free_requests_that_do_not_change(llm: LLM) -> None:
    free = [sampled(None, seed, max_tokens=24, ignore_eos=True) for seed in range(3)]
    alone = llm.chat([QUESTION] * 3, free, use_tqdm=False)
    kinds = [{"json": PERSON}, {"regex": DATE}, {"choice": CHOICES}, {"grammar": SUM}]
    params = [sampled(kind, seed) for seed in range(3) for kind in kinds]
    outputs = llm.chat([QUESTION] * 15, [*free, *params], use_tqdm=False)
    assert [one.outputs[0].token_ids for one in outputs[:3]] == [
        one.outputs[0].token_ids for one in alone
    ]
    texts = [one.outputs[0].text for one in outputs[3:]]
    assert all(one.outputs[0].finish_reason == "stop" for one in outputs[3:])
    for text in texts[0::4]:
        jsonschema.validate(json.loads(text), PERSON)
    assert all(re.fullmatch(DATE, text) for text in texts[1::4])
    assert all(text in CHOICES for text in texts[2::4])
    assert all(re.fullmatch(r"[1-9][0-9]?( \+ [1-9][0-9]?){1,3}", text) for text in texts[3::4])


def test_preempted_outputs_go_on_where_they_were(llm: LLM) -> None:
    prompts = [{"prompt_token_ids": list(range(100 + i, 115 + i))} for i in range(10)]
    params = sampled({"regex": "[a-z ]{99}"}, 0, max_tokens=24, temperature=0.0)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert sum(one.metrics.num_preemptions for one in outputs) > 0
    assert all(re.fullmatch("[a-z ]+", one.outputs[0].text) for one in outputs)
    (alone,) = llm.generate(prompts[-1:], params, use_tqdm=False)
    assert alone.outputs[0].token_ids == outputs[-1].outputs[0].token_ids


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.0}, {"repetition_penalty": 1.2, "presence_penalty": 0.5}]
)
def test_tokens_that_a_grammar_forces_are_those_it_would_have_sampled(
    llm: LLM, settings: dict[str, Any]
) -> None:
    """Who wants log-probabilities has every token sampled."""
    kinds = [{"json": PERSON}, {"regex": "The answer is (yes|no), and that is (it|all)\\."}]
    params = [sampled(kind, seed, **settings) for seed in range(2) for kind in kinds]
    forced = llm.chat([QUESTION] * 4, params, use_tqdm=False)
    params = [sampled(kind, seed, logprobs=0, **settings) for seed in range(2) for kind in kinds]
    whole = llm.chat([QUESTION] * 4, params, use_tqdm=False)
    assert [one.outputs[0].token_ids for one in forced] == [
        one.outputs[0].token_ids for one in whole
    ]
    assert [one.metrics.num_generation_tokens for one in forced] == [
        one.metrics.num_generation_tokens for one in whole
    ]
    assert all(one.metrics.num_forced_tokens > 0 for one in forced[1::2])
    assert all(one.metrics.num_forced_tokens == 0 for one in whole)
    assert all(len(one.outputs[0].logprobs or ()) == len(one.outputs[0].token_ids) for one in whole)


def test_n_outputs_go_their_own_ways(llm: LLM) -> None:
    (output,) = llm.chat(QUESTION, sampled({"regex": "[a-z]{8,12}"}, 5, n=4), use_tqdm=False)
    texts = [one.text for one in output.outputs]
    assert len(set(texts)) == 4 and all(re.fullmatch("[a-z]{8,12}", text) for text in texts)


def test_with_all_else_that_shapes_an_output(llm: LLM) -> None:
    """min_tokens keeps a repetition going; where a grammar has an end, it ends."""
    shaped: dict[str, Any] = {"top_k": 40, "top_p": 0.9, "repetition_penalty": 1.3, "logprobs": 2}
    params = [
        sampled({"regex": "(ab ?)+"}, 1, min_tokens=12, max_tokens=20, **shaped),
        sampled({"choice": ["yes"]}, 2, min_tokens=12, **shaped),
        sampled({"regex": "[0-9]{1,3};[0-9]{9}"}, 3, stop=[";"], **shaped),
        sampled({"json": PERSON}, 4, max_tokens=3, **shaped),  # an object may be {} and whole
    ]
    long, whole, stopped, cut = (
        one.outputs[0] for one in llm.chat([QUESTION] * 4, params, use_tqdm=False)
    )
    assert len(long.token_ids) >= 12 and re.fullmatch("(ab ?)*a?", long.text)
    assert (whole.text, whole.finish_reason) == ("yes", "stop")
    assert re.fullmatch("[0-9]{1,3}", stopped.text) and stopped.stop_reason == ";"
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 3)
    assert all(one.logprobs and len(one.logprobs) == len(one.token_ids) for one in (long, whole))


def test_a_bad_grammar_costs_its_sender_an_error_in_time(llm: LLM) -> None:
    start = time.monotonic()
    with pytest.raises(RequestFailedError, match=r"structured_outputs\.json cannot be used"):
        llm.chat(QUESTION, sampled({"json": {"type": "nonsense"}}, 1), use_tqdm=False)
    assert time.monotonic() - start < WAIT_S
    (output,) = llm.chat(QUESTION, sampled({"choice": CHOICES}, 1), use_tqdm=False)
    assert output.outputs[0].text in CHOICES
