"""A core that dies and comes back, scripted: streams go on where they were, and only there."""

import asyncio
import time
from collections.abc import Iterable
from itertools import chain
from typing import Any

import msgspec
import pytest

from nanovllm.frontend import core_life, supervisor
from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.errors import EngineDeadError
from nanovllm.frontend.outputs import RequestOutput
from nanovllm.frontend.request import Request
from nanovllm.frontend.resume import missed_end, resumption
from nanovllm.frontend.supervisor import RestartBudget
from nanovllm.protocol.messages import (
    Abort,
    AddRequest,
    CallResult,
    Finished,
    FromCore,
    Hello,
    Outputs,
    PromptLogprobs,
    Started,
    ToCore,
)
from nanovllm.protocol.plan import PositionLogprobs, TokenLogprobs
from nanovllm.sampling_params import SamplingParams
from tests.frontend.attached import Handle, last_of
from tests.frontend.fake_core import INFO, WELCOME, FakeCore, echo, silent
from tests.frontend.vocabulary import EOS, byte_tokenizer
from tests.waiting import WAIT_S

TEXT = b"Hello, world"


def one_logprob(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -0.5, 1, [], [])


def saying(text: bytes, *, until: int) -> Any:
    """Says the rest of `text` after what a request has, up to `until` tokens; ends at its end."""

    def script(message: ToCore) -> Iterable[FromCore]:
        if not isinstance(message, AddRequest):
            yield from silent(message)
            return
        numbers = range(message.number, message.number + message.params.n)
        yield Outputs(
            started=[Started(number, len(message.output_token_ids), 1.0) for number in numbers]
        )
        if message.params.prompt_logprobs is not None:
            some = PositionLogprobs.of([*map(one_logprob, message.prompt_token_ids[1:])])
            yield Outputs(prompt_logprobs=[PromptLogprobs(message.number, some)])
        for number in numbers:
            new = list(text[len(message.output_token_ids) : until])
            logprobs = (
                {} if message.params.logprobs is None else dict(enumerate(map(one_logprob, new)))
            )
            if new:
                yield Outputs([number] * len(new), new, logprobs)
            if until >= len(text):
                yield Outputs(finished=[Finished(number, "length", None, 0)])

    return script


async def attach(address: str, **supervision: Any) -> AsyncLLM:
    return await AsyncLLM.connect(address, tokenizer=byte_tokenizer(), **supervision)


async def through_a_death(
    address: str, params: SamplingParams, *, first: int = 5, **options: Any
) -> tuple[list[RequestOutput], FakeCore]:
    """The outputs of one request whose core dies after `first` tokens, and the second core."""
    outputs: list[RequestOutput] = []
    with FakeCore(address, saying(TEXT, until=first)) as core:
        llm = await attach(address)

        async def read() -> None:
            async for output in llm.generate("abc", params, **options):
                outputs.append(output)

        reading = asyncio.create_task(read())
        await asyncio.to_thread(core.wait_for, AddRequest)
        core.push(CallResult(0))
        await llm.reset_prefix_cache()
        await asyncio.sleep(0)
    with FakeCore(address, saying(TEXT, until=len(TEXT))) as second:
        async with asyncio.timeout(WAIT_S):
            await reading
        await llm.close()
    return outputs, second


@pytest.mark.parametrize("kind", ["cumulative", "delta", "final_only"])
@pytest.mark.parametrize("n", [1, 2])
async def test_each_token_comes_once(address: str, kind: Any, n: int) -> None:
    params = SamplingParams(output_kind=kind, n=n, seed=7, logprobs=0, prompt_logprobs=0)
    outputs, second = await through_a_death(address, params)
    last = outputs[-1]
    for index in range(n):
        parts = [one for output in outputs for one in output.outputs if one.index == index]
        if kind == "delta":
            assert "".join(one.text for one in parts) == TEXT.decode()
            assert bytes(chain(*(one.token_ids for one in parts))) == TEXT
            assert sum(len(one.logprobs or ()) for one in parts) == len(TEXT)
        else:
            assert parts[-1].text == TEXT.decode() and bytes(parts[-1].token_ids) == TEXT
            assert len(parts[-1].logprobs or ()) == len(TEXT)
        assert parts[-1].cumulative_logprob == -0.5 * len(TEXT)
    (told,) = [output.prompt_logprobs for output in outputs if output.prompt_logprobs][:1]
    assert len(told) == 3
    assert last.metrics.num_generation_tokens == n * len(TEXT) and last.metrics.num_resumes == 1
    assert last.num_cached_tokens == 0, "of the prompt, and not its own output"
    asked = second.all_of(AddRequest)
    assert [(one.number, one.params.n, one.params.seed) for one in asked] == [
        (index, 1, 7 + index) for index in range(n)
    ]
    assert all(bytes(one.output_token_ids) == TEXT[:5] for one in asked)
    assert all(one.params.prompt_logprobs is None for one in asked), "they have come"


async def test_what_had_not_begun_is_asked_again_as_it_was(address: str) -> None:
    params = SamplingParams(n=2, prompt_logprobs=0)
    outputs, second = await through_a_death(address, params, first=0)
    (again,) = second.all_of(AddRequest)
    assert again.params.n == 2 and again.output_token_ids == []
    assert again.params.seed is not None, "drawn by the client, so that it is the same"
    assert len(outputs[-1].prompt_logprobs or ()) == 3


@pytest.mark.parametrize("first", [0, 5])
async def test_deadlines_go_on_counting(address: str, first: int) -> None:
    deadlines = {"deadline_ms": 60_000.0, "ttft_deadline_ms": 50_000.0}
    before = time.monotonic()
    outputs, second = await through_a_death(address, SamplingParams(), first=first, **deadlines)
    most_ms = (time.monotonic() - before) * 1e3
    (again,) = second.all_of(AddRequest)
    assert again.deadline_ms is not None and 60_000 - most_ms <= again.deadline_ms < 60_000
    if first:
        assert again.ttft_deadline_ms is None, "it had its first token in time"
    else:
        assert again.ttft_deadline_ms is not None
        assert again.deadline_ms - again.ttft_deadline_ms == pytest.approx(10_000)
    assert bytes(outputs[-1].outputs[0].token_ids) == TEXT


@pytest.mark.parametrize(
    ("deadlines", "first", "reason"),
    [
        ({"deadline_ms": 1.0}, TEXT[:5], "timeout"),
        ({"ttft_deadline_ms": 1.0}, b"", "timeout"),
        ({"ttft_deadline_ms": 1.0}, TEXT[:5], "length"),
    ],
)
async def test_what_ran_out_of_time_while_the_core_was_away_is_not_sent_again(
    address: str, deadlines: dict[str, float], first: bytes, reason: str
) -> None:
    outputs, second = await through_a_death(
        address, SamplingParams(), first=len(first), **deadlines
    )
    (one,) = outputs[-1].outputs
    assert one.finish_reason == reason
    assert len(second.all_of(AddRequest)) == (reason == "length")
    assert bytes(one.token_ids) == (TEXT if reason == "length" else first)


async def test_stop_strings_across_the_cut(address: str) -> None:
    outputs, _ = await through_a_death(address, SamplingParams(stop="o, w"))
    (one,) = outputs[-1].outputs
    assert (one.text, one.stop_reason, bytes(one.token_ids)) == ("Hell", "o, w", TEXT[:8])


@pytest.mark.parametrize(
    ("params", "first", "reason", "stop_reason"),
    [
        (SamplingParams(max_tokens=5), TEXT[:5], "length", None),
        (SamplingParams(stop_token_ids=[TEXT[4]]), TEXT[:5], "stop", TEXT[4]),
        (SamplingParams(max_tokens=None), TEXT[:5] * 12 + b"!", "length", None),
        (SamplingParams(), [EOS], "stop", None),
    ],
)
async def test_an_end_that_was_not_heard_is_not_run_past(
    address: str, params: SamplingParams, first: Any, reason: str, stop_reason: Any
) -> None:
    with FakeCore(address) as core:
        llm = await attach(address)
        reading = asyncio.create_task(last_of(llm.generate("abc", params)))
        await asyncio.to_thread(core.wait_for, AddRequest)
        core.push(Outputs([0] * len(first), list(first)), CallResult(0))
        await llm.reset_prefix_cache()
    with FakeCore(address, echo) as second:
        async with asyncio.timeout(WAIT_S):
            (one,) = (await reading).outputs
        assert second.all_of(AddRequest) == []
        await llm.close()
    assert (one.finish_reason, one.stop_reason) == (reason, stop_reason)
    assert one.token_ids == list(first)


async def test_aborts_while_it_is_away_and_before(address: str) -> None:
    with FakeCore(address) as core:
        llm = await attach(address)
        before, during = (
            asyncio.create_task(last_of(llm.generate("abc", None, name)))
            for name in ("before", "during")
        )
        await asyncio.to_thread(core.wait_for, AddRequest, 2)
        await llm.abort("before")  # this core never answers
        await asyncio.to_thread(core.wait_for, Abort)
    while not llm.is_stalled:
        await asyncio.sleep(0.01)
    await llm.abort("during")
    async with asyncio.timeout(WAIT_S):
        assert (await during).outputs[0].finish_reason == "abort", "nobody has to be asked"
    left = asyncio.create_task(last_of(llm.generate("abc", None, "left")))
    await asyncio.sleep(0)
    left.cancel()
    late = asyncio.create_task(last_of(llm.generate("abc", None, "late")))
    with FakeCore(address, echo) as second:
        async with asyncio.timeout(WAIT_S):
            assert (await before).outputs[0].finish_reason == "abort"
            assert (await late).outputs[0].text == "abc"
        assert len(second.all_of(AddRequest)) == 1, "only what is still wanted"
        await llm.close()


async def test_nobody_comes_back(address: str) -> None:
    with FakeCore(address) as core:
        llm = await attach(address, core_return_timeout_s=0.3)
        reading = asyncio.create_task(last_of(llm.generate("abc")))
        await asyncio.to_thread(core.wait_for, AddRequest)
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(EngineDeadError, match=r"closed the connection.*within 0\.3 s"):
            await reading
    with pytest.raises(EngineDeadError):
        await llm.stats()
    assert not llm.is_running
    await llm.close()


async def test_a_model_of_the_same_shape_and_another_name_continues_nothing(address: str) -> None:
    def another(message: ToCore) -> Iterable[FromCore]:
        if isinstance(message, Hello):
            yield msgspec.structs.replace(WELCOME, model="another")

    with FakeCore(address) as core:
        llm = await attach(address)
        reading = asyncio.create_task(last_of(llm.generate("abc")))
        await asyncio.to_thread(core.wait_for, AddRequest)
    with FakeCore(address, another) as second:
        async with asyncio.timeout(WAIT_S):
            with pytest.raises(EngineDeadError, match=f"another model: another .*{WELCOME.model}"):
                await reading
        assert not second.all_of(AddRequest)
    await llm.close()


def test_seeds_of_outputs_that_are_resumed_wrap_where_the_cores_do() -> None:
    params = SamplingParams(n=3, seed=2**63 - 2)
    request = Request("r", None, AddRequest(7, [1, 2], params), None)
    for completion in request.completions:
        completion.arrived.append(5)
    seeds = [message.params.seed for message in resumption(request, 0.0)]
    assert seeds == [2**63 - 2, 2**63 - 1, 0]


@pytest.mark.parametrize("index, asked", [(0, [None, None]), (1, [0, None])])
def test_only_the_first_output_asks_for_the_prompts_log_probabilities_again(
    index: int, asked: list[int | None]
) -> None:
    """And only if nothing of it has come, though the other's tokens have."""
    params = SamplingParams(n=2, prompt_logprobs=0)
    request = Request("r", None, AddRequest(7, [1, 2], params), None)
    request.completions[index].arrived.append(5)
    assert [message.params.prompt_logprobs for message in resumption(request, 0.0)] == asked


async def test_closing_while_it_is_away(address: str) -> None:
    with FakeCore(address) as core:
        llm = await attach(address)
        reading = asyncio.create_task(last_of(llm.generate("abc")))
        await asyncio.to_thread(core.wait_for, AddRequest)
    while not llm.is_stalled:
        await asyncio.sleep(0.01)
    await llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        await reading


async def test_only_supervision_can_be_set_when_attaching(address: str) -> None:
    with pytest.raises(ValueError, match=r"block_size: the core at .* has settings of its own"):
        await AsyncLLM.connect(address, block_size=16)
    with pytest.raises(ValueError, match="did you mean 'on_core_death'"):
        await AsyncLLM.connect(address, on_core_dead="fail")


# ---- an owned core


async def test_an_owned_core_is_started_again(address: str, handle: Handle) -> None:
    core = FakeCore(address, saying(TEXT, until=3)).__enter__()
    async with AsyncLLM("m", load_format="dummy") as llm:
        reading = asyncio.create_task(last_of(llm.generate("abc", SamplingParams(temperature=0))))
        await asyncio.to_thread(core.wait_for, AddRequest)
        await asyncio.sleep(0.05)
        handle.process.kill()
        core.die()
        with FakeCore(address, saying(TEXT, until=len(TEXT))):
            async with asyncio.timeout(WAIT_S):
                assert (await reading).outputs[0].text == TEXT.decode()
            assert handle.restarts == 1 and llm.info == WELCOME
    assert handle.closed == 1


async def test_a_core_that_hangs_up_is_ended_before_it_is_started_again(
    address: str, handle: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Handle.restart` asserts that its process has ended, which nobody else ends here."""
    monkeypatch.setattr(core_life, "EXIT_S", 0.0)
    core = FakeCore(address, saying(TEXT, until=3)).__enter__()
    async with AsyncLLM("m", load_format="dummy") as llm:
        reading = asyncio.create_task(last_of(llm.generate("abc", SamplingParams(temperature=0))))
        await asyncio.to_thread(core.wait_for, AddRequest)
        first = handle.process
        core.die()
        with FakeCore(address, saying(TEXT, until=len(TEXT))):
            async with asyncio.timeout(WAIT_S):
                assert (await reading).outputs[0].text == TEXT.decode()
            assert handle.restarts == 1 and handle.process is not first


async def test_a_core_that_cannot_be_started_again_is_dead_for_good(
    address: str, handle: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(handle, "restart", refuse)
    with FakeCore(address, silent) as core:
        async with AsyncLLM("m", load_format="dummy") as llm:
            reading = asyncio.create_task(last_of(llm.generate("abc")))
            await asyncio.to_thread(core.wait_for, AddRequest)
            handle.process.kill()
            core.die()
            async with asyncio.timeout(WAIT_S):
                with pytest.raises(EngineDeadError, match=r"again failed: .*no more processes"):
                    await reading
            assert not llm.is_running


def test_the_budget_of_restarts() -> None:
    budget = RestartBudget(3)
    assert [budget.take(float(now)) for now in range(4)] == [0.0, 0.05, 0.1, None]
    assert budget.take(supervisor.WINDOW_S + 0.5) == 0.1, "the first is forgotten"
    assert RestartBudget(0).take(0.0) is None


def test_deaths_that_are_explained_cost_nothing_of_the_budget() -> None:
    budget = RestartBudget(2)
    assert [budget.take(1.0, "a"), budget.take(2.0, "b"), budget.take(3.0, "c")] == [0, 0.05, None]
    budget.give_back({"a", "other"})
    assert [budget.take(4.0, "c"), budget.take(5.0, "d")] == [0.05, None]
    assert budget.take(2.0 + supervisor.WINDOW_S, "e") is None, "the last moment of the window"
    assert budget.take(2.1 + supervisor.WINDOW_S, "e") == 0.05


@pytest.mark.parametrize("first", [0, 5])
async def test_log_probabilities_of_a_prompt_come_once_whatever_dies(
    address: str, first: int
) -> None:
    params = SamplingParams(output_kind="delta", n=2, seed=7, prompt_logprobs=0)
    outputs, second = await through_a_death(address, params, first=first)
    told = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    assert [len(one) for one in told] == [3]
    asked = [one.params.prompt_logprobs for one in second.all_of(AddRequest)]
    assert asked == ([0] if first == 0 else [None, None])


def request_with(
    num_tokens: int, last: int = 7, *, deadlines: Any = None, **params: Any
) -> Request:
    """Of a prompt of 3 tokens, one output of which so many have come."""
    message = AddRequest(0, [1, 2, 3], SamplingParams(**{"max_tokens": 9, **params}))
    made = Request("r", None, msgspec.structs.replace(message, **(deadlines or {})), None)
    made.completions[0].arrived += [*[7] * (num_tokens - 1), last][:num_tokens]
    return made


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({"num_tokens": 0}, None),
        ({"num_tokens": 1, "last": 256}, ("stop", None)),
        ({"num_tokens": 1, "last": 256, "ignore_eos": True}, None),
        ({"num_tokens": 1, "last": 256, "min_tokens": 2}, None),
        ({"num_tokens": 2, "last": 256, "min_tokens": 2}, ("stop", None)),
        ({"num_tokens": 2, "last": 8, "stop_token_ids": [8]}, ("stop", 8)),
        ({"num_tokens": 8}, None),
        ({"num_tokens": 9}, ("length", None)),
        ({"num_tokens": 9, "last": 256}, ("stop", None)),
        ({"num_tokens": 60, "max_tokens": None}, None),
        ({"num_tokens": 61, "max_tokens": None}, ("length", None)),
        ({"num_tokens": 1, "deadlines": {"deadline_ms": 1000.1}}, None),
        ({"num_tokens": 1, "deadlines": {"deadline_ms": 1000.0}}, ("timeout", None)),
        ({"num_tokens": 1, "deadlines": {"ttft_deadline_ms": 1000.0}}, None),
        ({"num_tokens": 0, "deadlines": {"ttft_deadline_ms": 1000.0}}, ("timeout", None)),
        ({"num_tokens": 9, "deadlines": {"deadline_ms": 1.0}}, ("length", None)),
    ],
)
def test_an_end_that_nobody_told_of(fields: dict[str, Any], end: Any) -> None:
    made = request_with(**fields)
    made.made_at = 100.0
    found = missed_end(made.completions[0], INFO, 101.0)
    assert found == (None if end is None else Finished(0, end[0], end[1], 0))


def test_what_is_left_of_deadlines_is_sent() -> None:
    deadlines = {"deadline_ms": 5000.0, "ttft_deadline_ms": 900.0}
    for num_tokens, left in ((0, (4750.0, 650.0)), (1, (4750.0, None))):
        made = request_with(num_tokens, deadlines=deadlines)
        made.made_at = 100.0
        (message,) = resumption(made, 100.25)
        assert (message.deadline_ms, message.ttft_deadline_ms) == left
        assert not message.is_suspect and message.output_token_ids == [7] * num_tokens
        made.completions[0].deaths.append("life")
        assert resumption(made, 100.25)[0].is_suspect
