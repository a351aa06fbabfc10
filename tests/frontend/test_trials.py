"""Requests that may have ended their core, as their client speaks of them to the next ones."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.errors import QuarantinedError
from nanovllm.frontend.request import TRIAL_TOKENS, Request
from nanovllm.protocol.messages import (
    AddRequest,
    Call,
    CallResult,
    DeathsExplained,
    FromCore,
    Hello,
    Outputs,
    ToCore,
    TrialAccepted,
    TrialOffered,
    TrialOver,
)
from nanovllm.sampling_params import SamplingParams
from tests.frontend.fake_core import WELCOME, FakeCore, Script
from tests.frontend.vocabulary import byte_tokenizer
from tests.waiting import WAIT_S


def life(epoch: str, *, after_crash_of: str = "") -> Script:
    """A core that welcomes and answers calls."""
    welcome = msgspec.structs.replace(WELCOME, epoch=epoch, after_crash_of=after_crash_of)

    def script(message: ToCore) -> Iterable[FromCore]:
        if isinstance(message, Hello):
            yield welcome
        elif isinstance(message, Call):
            yield CallResult(message.call_id)

    return script


@asynccontextmanager
async def attached(address: str) -> AsyncIterator[tuple[AsyncLLM, FakeCore]]:
    """To the first life; what comes later begins when that has died."""
    with FakeCore(address, life("one")) as core:
        llm = await AsyncLLM.connect(address, tokenizer=byte_tokenizer())
        try:
            yield llm, core
        finally:
            await llm.close()


async def bring(core: FakeCore, request: Request, num_tokens: int) -> None:
    """So many tokens more, until they have been taken in."""
    wanted = request.completions[0].num_received + num_tokens
    core.push(Outputs([request.number] * num_tokens, [65] * num_tokens))
    async with asyncio.timeout(WAIT_S):
        while request.completions[0].num_received < wanted:
            await asyncio.sleep(0.005)


def submit(llm: AsyncLLM, **params: Any) -> Request:
    made = llm.make_prompt({"prompt_token_ids": [1, 2]})
    request = llm.prepare(made, SamplingParams(max_tokens=50, seed=0, **params))
    llm.submit(request)
    return request


async def sent(core: FakeCore, kind: Any, count: int = 1) -> Any:
    return await asyncio.to_thread(core.wait_for, kind, count)


@pytest.mark.parametrize(
    ("num_tokens", "after_crash_of", "is_suspect"),
    [(0, "", True), (0, "one", True), (3, "", False), (3, "one", True), (3, "other", False)],
)
async def test_who_is_a_suspect_after_a_death_that_the_next_core_knows_of(
    address: str, num_tokens: int, after_crash_of: str, is_suspect: bool
) -> None:
    """All if the core failed by itself, else those that had got nowhere."""
    async with attached(address) as (llm, first):
        request = submit(llm)
        await sent(first, AddRequest)
        await bring(first, request, num_tokens)
        first.die()
        with FakeCore(address, life("two", after_crash_of=after_crash_of)) as second:
            again = await sent(second, AddRequest)
            assert (again.is_suspect, again.output_token_ids) == (is_suspect, [65] * num_tokens)
            assert second.all_of(DeathsExplained) == []


@pytest.mark.parametrize("num_tokens", [0, 2])
async def test_what_counts_is_how_far_it_has_got_since_it_was_last_sent(
    address: str, num_tokens: int
) -> None:
    """Of two deaths whose cause nobody knows."""
    async with attached(address) as (llm, first):
        request = submit(llm)
        await sent(first, AddRequest)
        await bring(first, request, 3)
        first.die()
        with FakeCore(address, life("two")) as second:
            assert not (await sent(second, AddRequest)).is_suspect
            await bring(second, request, num_tokens)
        with FakeCore(address, life("three")) as third:
            again = await sent(third, AddRequest)
            assert again.is_suspect == (num_tokens == 0)
            assert again.output_token_ids == [65] * (3 + num_tokens)


@pytest.mark.parametrize("is_left", [False, True])
async def test_a_trial_is_over_when_it_has_got_far_enough_or_nobody_waits(
    address: str, is_left: bool
) -> None:
    async with attached(address) as (llm, first):
        suspect = submit(llm)
        await sent(first, AddRequest)
        first.die()
        with FakeCore(address, life("two")) as second:
            await sent(second, AddRequest)
            second.push(TrialOffered(77), TrialOffered(0))  # of the first nobody knows
            assert (await sent(second, TrialAccepted)).number == 0
            other = submit(llm)
            await bring(second, suspect, TRIAL_TOKENS - 1)
            llm.discard(other)
            await llm.reset_prefix_cache()
            assert second.all_of(TrialOver) == [], "the core may have computed that and died"
            if is_left:
                llm.discard(suspect)
            else:
                await bring(second, suspect, 1)
            assert (await sent(second, TrialOver)).number == 0
            llm.discard(submit(llm))
            await llm.reset_prefix_cache()
            assert len(second.all_of(TrialOver)) == len(second.all_of(TrialAccepted)) == 1


async def test_who_ends_a_core_alone_on_trial_fails_and_is_not_sent_again(address: str) -> None:
    async with attached(address) as (llm, first):
        guilty, other = submit(llm), submit(llm)
        await sent(first, AddRequest, 2)
        await bring(first, other, 1)
        first.die()
        with FakeCore(address, life("two", after_crash_of="one")) as second:
            await sent(second, AddRequest, 2)
            second.push(TrialOffered(0))
            await sent(second, TrialAccepted)
        with FakeCore(address, life("three", after_crash_of="two")) as third:
            with pytest.raises(QuarantinedError, match="tried this request alone"):
                await guilty.next_output()
            assert sorted((await sent(third, DeathsExplained)).epochs) == ["one", "two"]
            await sent(third, AddRequest)
            await llm.reset_prefix_cache()
            (again,) = third.all_of(AddRequest)
            assert (again.number, again.output_token_ids) == (1, [65])
