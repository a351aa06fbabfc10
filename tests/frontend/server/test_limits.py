"""Everything a body can hold has a limit, which the answer names; nothing is begun beyond it."""

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from starlette.types import Message

from nanovllm.frontend.server import middleware
from nanovllm.frontend.server.api_errors import ApiError
from nanovllm.frontend.server.body_trial import BodyTrials, Refusal, Trial, answer, excess
from nanovllm.frontend.server.middleware import (
    BUDGET_BODIES,
    LARGE_BODY_BYTES,
    SMALL_BODY_BYTES,
    BodyBudget,
    Incoming,
)
from nanovllm.limits import (
    MAX_JSON_DIGITS,
    MAX_JSON_EXPONENTS,
    MAX_JSON_LISTS,
    MAX_JSON_TEXTS,
    MAX_JSON_VALUES,
)
from nanovllm.protocol.messages import AddRequest
from tests.frontend.fake_core import echo
from tests.frontend.server.hostile_bodies import USER, Hostile, bodies
from tests.frontend.server.served import Served, error_of, roomy, served
from tests.waiting import WAIT_S


@pytest.fixture
async def small(address: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its large bodies are checked in this process: `test_body_trial` has another for that."""

    def try_out(self: BodyTrials, trial: bytes, content: bytes) -> Refusal | None:
        return answer(content, msgspec.msgpack.decode(trial, type=Trial))

    monkeypatch.setattr(BodyTrials, "_try_out", try_out)
    async with served(address, roomy(echo)) as one:
        yield one


@pytest.mark.parametrize("one", bodies(), ids=lambda one: one.name)
async def test_what_is_too_much_names_its_field_and_begins_nothing(
    small: Served, one: Hostile
) -> None:
    response = await small.client.post(one.path, content=one.content)
    assert response.status_code in one.statuses, response.text
    error = error_of(response)
    assert (error["param"] or "").startswith(one.param) and len(response.content) < 4096
    assert not small.core.all_of(AddRequest)


@pytest.mark.parametrize("piece_bytes", [1000, 65_536, 1 << 22])
@pytest.mark.parametrize(
    ("unit", "count", "status", "told"),
    [
        (b"1,", MAX_JSON_VALUES + 1, 413, f"{MAX_JSON_VALUES + 1} values"),
        (b"1,", MAX_JSON_VALUES - 1, 400, "prompt"),
        (b"[]", MAX_JSON_LISTS + 1, 413, f"{MAX_JSON_LISTS + 1} lists and objects"),
        (b'""', MAX_JSON_TEXTS, 413, f"{MAX_JSON_TEXTS + 1} names and texts"),
        (b'""', MAX_JSON_TEXTS - 1, 400, "prompt"),
    ],
)
async def test_values_are_counted_however_a_body_comes(
    small: Served, piece_bytes: int, unit: bytes, count: int, status: int, told: str
) -> None:
    content = b'"prompt": ' + unit * count

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(content), piece_bytes):
            yield content[at : at + piece_bytes]

    response = await small.client.post("/v1/completions", content=pieces())
    assert response.status_code == status, response.text
    assert status == 400 or told in error_of(response)["message"]


TEXT = '["{}"]'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (TEXT.format(r"[{1e5,\"" * 200_000 + r"\\"), None),
        (TEXT.format('","'.join([r"\\\""] * MAX_JSON_TEXTS)), None),
        (TEXT.format('","'.join([r"\\\\"] * (MAX_JSON_TEXTS + 1))), "131073 names and texts"),
        (",".join(["1e9", "-2.5E+300"] * (MAX_JSON_EXPONENTS // 2)), None),
        (",".join(["true", "false"] * 1000), None),
        (",".join(["1e9"] * (MAX_JSON_EXPONENTS + 1)), "257 numbers with exponents"),
        (",".join(["12345678"] * MAX_JSON_VALUES), None),
        ("1" * (MAX_JSON_DIGITS + 1), "digits"),
        ("[" * MAX_JSON_LISTS, None),
        ("[" * MAX_JSON_LISTS + "{", "131073 lists and objects"),
    ],
    ids=lambda one: str(one)[:16],
)
def test_what_there_is_to_decode_is_counted_outside_of_texts(text: str, told: str | None) -> None:
    found = excess(text.encode())
    assert (told or "None") in str(found)


@pytest.mark.parametrize("depth", [900, 100_000])
async def test_deep_json_is_a_mistake_of_the_client(small: Served, depth: int) -> None:
    body = {"messages": [USER]}
    text = (
        json.dumps(body)[:-1] + ', "chat_template_kwargs": ' + '{"a":' * depth + "1" + "}" * depth
    )
    response = await small.client.post("/v1/chat/completions", content=text.encode() + b"}")
    assert response.status_code == 400, response.text


async def test_tokenizing_has_limits(small: Served) -> None:
    for path, body, param in (
        ("/tokenize", {"prompt": "a" * ((1 << 22) + 1)}, "prompt"),
        ("/tokenize", {"messages": [USER] * 4097}, "messages"),
        ("/detokenize", {"tokens": [1] * ((1 << 18) + 1)}, "tokens"),
    ):
        response = await small.post(path, **body)
        assert response.status_code == 400 and error_of(response)["param"] == param


async def test_bodies_that_were_refused_on_their_way_hold_nothing_of_the_budget(
    address: str,
) -> None:
    most = SMALL_BODY_BYTES + 10_000
    async with served(address, roomy(echo), max_body_bytes=most) as server:

        async def pieces(num_bytes: int) -> AsyncIterator[bytes]:
            yield b'{"prompt": "hi"}'.ljust(most)
            yield b" " * (num_bytes - most)

        for _ in range(2 * BUDGET_BODIES):
            answer = await server.client.post("/v1/completions", content=pieces(most + 1))
            assert answer.status_code == 413, answer.text
        answer = await server.client.post("/v1/completions", content=pieces(most))
        assert answer.status_code == 200, answer.text


def incoming(budget: BodyBudget, *sizes: int) -> Incoming:
    """A body that comes in pieces, after each of which it has so many bytes."""
    ends = iter(sizes)
    starts = iter((0, *sizes))

    async def receive() -> Message:
        body = b" " * (next(ends) - next(starts))
        return {"type": "http.request", "body": body, "more_body": True}

    return Incoming(receive, budget)


async def test_large_bodies_share_a_budget_and_small_ones_need_none() -> None:
    most = SMALL_BODY_BYTES + 10_000
    budget = BodyBudget(most)
    sizes = (SMALL_BODY_BYTES, SMALL_BODY_BYTES + 1, most)
    bodies = [incoming(budget, *sizes) for _ in range(BUDGET_BODIES)]
    for body in bodies:  # all of it, piece by piece
        for _ in sizes:
            await body.receive()
    late, later = incoming(budget, SMALL_BODY_BYTES, SMALL_BODY_BYTES + 1), incoming(budget, most)
    await late.receive()
    with pytest.raises(ApiError) as refusal:
        await late.receive()
    assert (refusal.value.status, refusal.value.details.code) == (503, "overloaded")
    for _ in range(2):
        bodies[0].release()  # what is given back is given back once
    await later.receive()
    with pytest.raises(ApiError):
        await incoming(budget, SMALL_BODY_BYTES + 1).receive()


async def test_a_body_that_has_been_decoded_is_given_back_while_its_answer_is_awaited() -> None:
    most = SMALL_BODY_BYTES + 1
    budget = BodyBudget(most)
    messages: list[Message] = [
        {"type": "http.request", "body": b" " * most, "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Message:
        return messages.pop(0)

    body = Incoming(receive, budget)
    await body.receive()
    others = [incoming(budget, most) for _ in range(BUDGET_BODIES)]
    for other in others[1:]:
        await other.receive()
    with pytest.raises(ApiError):
        await incoming(budget, most).receive()
    assert (await body.receive())["type"] == "http.disconnect"
    await others[0].receive()


async def test_memory_of_large_bodies_is_returned_once_they_have_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Soon after the first of several that go, and again after the next ones."""
    trims: list[str] = []
    monkeypatch.setattr(middleware, "TRIM_AFTER_S", 0.01)
    monkeypatch.setattr(middleware, "_return_free_memory", lambda: trims.append("trim"))
    budget = BodyBudget(LARGE_BODY_BYTES)
    budget.give_back(LARGE_BODY_BYTES - 1)
    await asyncio.sleep(0.05)
    assert not trims
    for number in (1, 2):
        for _ in range(3):
            budget.give_back(LARGE_BODY_BYTES)
        async with asyncio.timeout(WAIT_S):
            while len(trims) < number:
                await asyncio.sleep(0.005)
    await asyncio.sleep(0.05)
    assert len(trims) == 2


@pytest.mark.parametrize("libc", ["glibc", ""])
def test_only_glibc_is_asked_to_return_memory(monkeypatch: pytest.MonkeyPatch, libc: str) -> None:
    asked: list[Any] = []
    library = SimpleNamespace(malloc_trim=asked.append)
    monkeypatch.setattr(middleware, "ctypes", SimpleNamespace(CDLL=lambda name: library))
    monkeypatch.setattr(middleware, "platform", SimpleNamespace(libc_ver=lambda: (libc, "2.36")))
    middleware._return_free_memory()
    assert asked == ([0] if libc else [])
