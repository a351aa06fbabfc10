"""Large bodies are checked in a process of their own, and what may pass is decoded once more."""

import asyncio
import json
import os
import signal
from typing import Any

import pytest

from nanovllm.frontend.server import body_trial, endpoint
from nanovllm.frontend.server.api_errors import ApiError
from nanovllm.frontend.server.bodies import ChatBody, CompletionBody, TokenizeBody
from nanovllm.frontend.server.body_trial import BodyFacts, BodyTrials, check
from nanovllm.frontend.server.endpoint import LONG_BODY, MANY_LISTS, takes_long
from nanovllm.protocol.messages import AddRequest
from nanovllm.protocol.plan import WorkerInfo
from tests.frontend.fake_core import echo
from tests.frontend.server.hostile_bodies import CHAT, COMPLETIONS, USER, bodies
from tests.frontend.server.served import error_of, roomy, served
from tests.frontend.server.test_prompts import children
from tests.waiting import WAIT_S

WORKER = WorkerInfo(
    device="cpu",
    dtype="float32",
    attention_backend="none",
    architecture="none",
    num_blocks=9,
    max_model_len=64,
    vocab_size=100,
    eos_token_ids=[0],
)
FACTS = BodyFacts(WORKER, most_chars=4)
PAD = b" " * LONG_BODY  # makes a body large, and asks for nothing


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + PAD


def no_decoding(content: bytes, kind: object) -> None:
    raise AssertionError("a body that is refused is not decoded here")


async def test_what_is_refused_is_not_decoded_beside_streams(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = [one for one in bodies() if takes_long(one.content)]
    assert len(large) > 15
    async with served(address, roomy(echo)) as server:
        with monkeypatch.context() as patch:
            patch.setattr(endpoint, "decoded", no_decoding)
            for one in large:
                response = await server.client.post(one.path, content=one.content)
                assert response.status_code in one.statuses, (one.name, response.text)
                error = error_of(response)
                assert (error["param"] or "").startswith(one.param), (one.name, error)
        assert len(children(b"body_trial")) == 1 and not server.core.all_of(AddRequest)
        for path, fields in ((COMPLETIONS, {"prompt": "hello"}), (CHAT, {"messages": [USER]})):
            response = await server.client.post(path, content=body(**fields, max_tokens=3))
            assert response.status_code == 200, response.text
    assert not children(b"body_trial"), "it ends with its server"


async def test_a_process_that_is_gone_is_started_again() -> None:
    trials = BodyTrials()
    try:
        for _ in range(2):
            assert await trials.refusal(body(prompt="hello"), CompletionBody, FACTS) is None
            process = trials._process
            assert process is not None
            os.kill(process._process.pid, signal.SIGKILL)
            process._process.wait()
    finally:
        trials.close()


async def test_a_process_that_dies_of_a_body_costs_its_sender_alone(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(address, roomy(echo)) as server:
        with monkeypatch.context() as patch:
            patch.setattr("nanovllm.frontend.server.body_trial.PROGRAM", ("false",))
            response = await server.client.post(COMPLETIONS, content=body(prompt="hello"))
            assert response.status_code == 503, response.text
            assert response.headers["retry-after"] and "again" in error_of(response)["message"]
        response = await server.client.post(COMPLETIONS, content=body(prompt="hello"))
        assert response.status_code == 200, response.text


def test_few_lists_and_few_numbers_with_exponents_are_decoded_at_once() -> None:
    text = b'{"prompt": "%s"}'
    assert not takes_long(text % (b"[" * (MANY_LISTS - 1))) and not takes_long(b"x" * LONG_BODY)
    assert takes_long(text % (b"[" * MANY_LISTS)) and takes_long(b"x" * (LONG_BODY + 1))
    assert takes_long(b",".join([b"1e308"] * 257)) and takes_long(b",".join([b"1E-99"] * 400))
    assert not takes_long(b",".join([b"1e308"] * 256))
    assert not takes_long(b",".join([b"12345"] * 9000)) and not takes_long(b"the eel " * 8000)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [1] * 63},
        {"prompt": [[1] * 64, [2]]},  # told in the choices of the first
        {"prompt": ["a" * 999, "b"]},
        {"prompt": [1] * 64, "truncate_prompt_tokens": 8},
        {"prompt": "a" * 999, "truncate_prompt_tokens": 8},
        {"prompt": "a" * 256},  # as many tokens as the model takes, perhaps
    ],
)
def test_what_may_be_good_passes(fields: dict[str, Any]) -> None:
    check(body(**fields), CompletionBody, FACTS)


@pytest.mark.parametrize(
    ("kind", "fields", "told"),
    [
        (CompletionBody, {"prompt": [1] * 64}, "64 tokens"),
        (CompletionBody, {"prompt": [100]}, "100"),
        (CompletionBody, {"prompt": "a" * 257}, "max_model_len is 64"),
        (CompletionBody, {"prompt": [1], "temperature": -1}, "temperature"),
        (CompletionBody, {"prompt": [1], "best_of": 2}, "best_of"),
        (ChatBody, {"messages": [USER], "top_p": 7}, "top_p"),
        (ChatBody, {"messages": [USER], "tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_cannot_be_good_does_not(kind: Any, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(endpoint.ApiError, match=told) as refusal:
        check(body(**fields), kind, FACTS)
    assert refusal.value.status == 400


def test_all_messages_together_have_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their words stand in. A body that is not tried has no room for so many."""
    assert body_trial.MAX_PROMPT_CHARS > LONG_BODY
    monkeypatch.setattr(body_trial, "MAX_PROMPT_CHARS", 5)
    parts = {"role": "user", "content": ["b", {"type": "text", "text": "cd"}, {"type": "x"}]}
    refusal = {"role": "assistant", "refusal": "e"}
    fits = [{"role": "user", "content": "a"}, parts, refusal, {"role": "assistant"}]
    more = [*fits, {"role": "user", "content": "fg"}]
    for kind in (ChatBody, TokenizeBody):
        check(body(messages=fits), kind, FACTS)
        with pytest.raises(ApiError, match="messages holds 7 characters: at most 5") as error:
            check(body(messages=more), kind, FACTS)
        assert (error.value.status, error.value.details.param) == (400, "messages")


async def test_closing_ends_the_process_and_does_not_wait_for_a_body() -> None:
    before, trials = set(children(b"body_trial")), BodyTrials()
    assert await trials.refusal(body(messages=[USER]), ChatBody, FACTS) is None
    (process,) = set(children(b"body_trial")) - before
    os.kill(int(process.name), signal.SIGSTOP)
    refusal = asyncio.ensure_future(trials.refusal(body(messages=[USER]), ChatBody, FACTS))
    await asyncio.sleep(0.1)
    await asyncio.wait_for(asyncio.to_thread(trials.close), WAIT_S)
    with pytest.raises(ApiError) as refused:
        await refusal
    assert refused.value.status == 503
    assert process not in children(b"body_trial")
