"""The asynchronous engine against a scripted core: leaving early, mistakes, death, owning it."""

import asyncio
import gc
from collections.abc import Iterable
from contextlib import aclosing
from typing import Any

import pytest

from nanovllm.frontend import async_llm
from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.errors import EngineDeadError, OverloadedError, RequestFailedError
from nanovllm.limits import MAX_NAME_CHARS
from nanovllm.protocol.messages import (
    Abort,
    AddRequest,
    Call,
    CallResult,
    CoreFailed,
    Detached,
    Finished,
    FromCore,
    Goodbye,
    Hello,
    Outputs,
    Overloaded,
    RequestFailed,
    Started,
    ToCore,
    Why,
)
from nanovllm.sampling_params import SamplingParams
from tests.frontend.attached import Handle, all_of, attached, last_of, says, settled
from tests.frontend.fake_core import STATUS, WELCOME, FakeCore, echo, silent
from tests.frontend.vocabulary import EOS, byte_tokenizer
from tests.waiting import WAIT_S

MESSAGES = [{"role": "user", "content": "hi"}]


# ---- leaving early


async def test_leaving_the_loop_aborts_all_outputs(address: str) -> None:
    async with attached(address, says("A", end=None)) as (llm, core):
        async for _ in llm.generate("a", SamplingParams(n=2)):
            break
        gc.collect()
        assert (await asyncio.to_thread(core.wait_for, Abort)).numbers == [0, 1]


async def test_cancelling_aborts(address: str) -> None:
    async with attached(address) as (llm, core):
        task = asyncio.create_task(last_of(llm.generate("a")))
        await asyncio.to_thread(core.wait_for, AddRequest)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await asyncio.to_thread(core.wait_for, Abort)).numbers == [0]


async def test_a_finished_request_is_not_aborted(address: str) -> None:
    async with attached(address, says("A")) as (llm, core):
        await last_of(llm.generate("a"))
        await settled(llm, core)
        assert core.all_of(Abort) == []


@pytest.mark.parametrize("ends", [True, False])
async def test_what_has_ended_leaves_no_garbage(address: str, ends: bool) -> None:
    """What refers to itself would wait for the collector, which holds all streams up."""
    async with attached(address, says("A", end="length" if ends else None)) as (llm, _):

        async def generate() -> None:
            async with aclosing(llm.generate("a")) as stream:
                async for _output in stream:
                    if not ends:
                        break

        await generate()
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for _ in range(3):
                await generate()
            gc.collect()
            left = [one for one in gc.garbage if type(one).__module__.startswith("nanovllm.")]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
        assert not left


async def test_abort_by_id_ends_the_stream(address: str) -> None:
    def script(message: ToCore) -> Iterable[FromCore]:
        match message:
            case AddRequest(number):
                yield Outputs([number], [65])
            case Abort(numbers):
                yield Outputs(finished=[Finished(n, "abort", None, 0) for n in numbers])
            case _:
                yield from silent(message)

    async with attached(address, script) as (llm, core):
        streams = [llm.generate("a", request_id=name) for name in ("one", "two", "three")]
        for stream in streams:
            assert (await anext(stream)).outputs[0].text == "A"
        await llm.abort("one")
        await llm.abort(["two", "unknown"])
        await llm.abort("unknown")
        for stream in streams[:2]:
            assert (await last_of(stream)).outputs[0].finish_reason == "abort"
        assert [abort.numbers for abort in core.all_of(Abort)] == [[0], [1]]
        await streams[2].aclose()


# ---- mistakes and failures


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": {"prompt_token_ids": []}}, "prompt_token_ids is empty"),
        ({"prompt": {"prompt_token_ids": [300]}}, "vocabulary"),
        ({"prompt": "a" * 64}, "max_model_len"),
        (
            {
                "prompt": "a",
                "sampling_params": SamplingParams(allowed_token_ids=[EOS], min_tokens=1),
            },
            "allowed_token_ids: .* forbid all",
        ),
        (
            {
                "prompt": "a",
                "sampling_params": SamplingParams(allowed_token_ids=[97], bad_words=["a"]),
            },
            "allowed_token_ids: .* forbid all",
        ),
        ({"prompt": "a", "sampling_params": {"n": 1}}, "sampling_params must be"),
        ({"prompt": "a", "priority": "high"}, "priority"),
        ({"prompt": "a", "priority": 2**63}, "priority"),
        ({"prompt": "a", "cache_salt": 1}, "cache_salt"),
        ({"prompt": "a", "request_id": 1}, "request_id"),
        ({"prompt": "a", "tenant": 1}, "tenant"),
        ({"prompt": "a", "deadline_ms": 0}, "deadline_ms"),
        ({"prompt": "a", "ttft_deadline_ms": float("nan")}, "ttft_deadline_ms"),
        ({"prompt": "a", "priorty": 1}, "did you mean 'priority'"),
    ],
)
async def test_mistakes_are_told_and_nothing_is_sent(
    address: str, arguments: dict[str, Any], complaint: str
) -> None:
    async with attached(address, echo) as (llm, core):
        with pytest.raises(ValueError, match=complaint):
            await last_of(llm.generate(**arguments))
        assert (await last_of(llm.generate("ok"))).outputs[0].text == "ok"
        assert len(core.all_of(AddRequest)) == 1


async def test_stop_strings_need_a_tokenizer(address: str) -> None:
    with FakeCore(address, echo) as core:
        async with await AsyncLLM.connect(address, skip_tokenizer_init=True) as llm:
            with pytest.raises(ValueError, match=r"stop strings need a tokenizer.*stop_token_ids"):
                await last_of(llm.generate([1], SamplingParams(stop="x")))
            await last_of(llm.generate([1], SamplingParams(stop_token_ids=[2])))
            assert len(core.all_of(AddRequest)) == 1


async def test_a_live_request_id_cannot_be_used_again(address: str) -> None:
    async with attached(address) as (llm, core):
        first = asyncio.create_task(last_of(llm.generate("a", request_id="same")))
        await asyncio.to_thread(core.wait_for, AddRequest)
        with pytest.raises(ValueError, match="'same' is in use"):
            await last_of(llm.generate("b", request_id="same"))
        core.push(Outputs([0], [65], finished=[Finished(0, "length", None, 0)]))
        assert (await first).outputs[0].text == "A"
        again = asyncio.create_task(last_of(llm.generate("c", request_id="same")))
        request = await asyncio.to_thread(core.wait_for, AddRequest, 2)
        core.push(Outputs(finished=[Finished(request.number, "length", None, 0)]))
        await again


async def test_options_reach_the_core(address: str) -> None:
    async with attached(address, echo) as (llm, core):
        params = SamplingParams(bad_words=["b"], seed=1)
        options = {"tenant": "t", "deadline_ms": 9, "ttft_deadline_ms": 5.5}
        await last_of(llm.generate("a", params, priority=-3, cache_salt="tenant", **options))
        (request,) = core.all_of(AddRequest)
    assert (request.tenant, request.deadline_ms, request.ttft_deadline_ms) == ("t", 9, 5.5)
    assert (request.priority, request.cache_salt) == (-3, "tenant")
    assert request.bad_words_token_ids == [[98], [32, 98]] and request.params == params


async def test_a_refusal_says_when_to_come_back(address: str) -> None:
    def script(message: ToCore) -> Iterable[FromCore]:
        if isinstance(message, AddRequest):
            return [Overloaded(message.number, 2.5, draining=message.number == 1)]
        return silent(message)

    async with attached(address, script) as (llm, _):
        for draining in (False, True):
            with pytest.raises(OverloadedError, match=r"2\.5 s") as refusal:
                await last_of(llm.generate("a"))
            assert (refusal.value.retry_after, refusal.value.draining) == (2.5, draining)
            why = "the core is about to end" if draining else "the core's queue is full"
            assert str(refusal.value).startswith(why)
            assert isinstance(refusal.value, RequestFailedError)


async def test_a_client_let_go_says_hello_and_sends_all_again(address: str) -> None:
    async with attached(address) as (llm, core):
        stream = asyncio.create_task(last_of(llm.generate("a")))
        sent = await asyncio.to_thread(core.wait_for, AddRequest)
        core.push(Outputs(numbers=[sent.number], token_ids=[66]))
        core.push(Detached("silent"))
        again = await asyncio.to_thread(core.wait_for, AddRequest, 2)
        assert again.output_token_ids == [66]
        core.push(Outputs(finished=[Finished(again.number, "length", None, 0)]))
        assert (await asyncio.wait_for(stream, WAIT_S)).outputs[0].token_ids == [66]


async def test_a_client_let_go_learns_it(address: str) -> None:
    async with attached(address, on_core_death="fail") as (llm, core):
        stream = asyncio.create_task(last_of(llm.generate("a")))
        await asyncio.to_thread(core.wait_for, AddRequest)
        core.push(Detached("silent"))
        with pytest.raises(EngineDeadError, match="let this client go: silent"):
            await stream


async def test_why_is_told_per_output(address: str) -> None:
    def script(message: ToCore) -> Iterable[FromCore]:
        if isinstance(message, AddRequest):
            why = [Why(1.0, 2.0, 3.0, 4.0, 5, 1, 6 + index, 7.0, 8.0) for index in range(2)]
            yield Outputs(finished=[Finished(n, "timeout", None, 1, why=why[n]) for n in range(2)])
        else:
            yield from silent(message)

    async with attached(address, script) as (llm, _):
        last = await last_of(llm.generate("a", SamplingParams(n=2)))
    assert [output.finish_reason for output in last.outputs] == ["timeout", "timeout"]
    assert last.metrics.num_recomputed_tokens == 13 and last.metrics.num_preemptions == 2
    assert last.metrics.why[1].num_recomputed_tokens == 7 and last.metrics.why[0].kv_ms == 4.0


async def test_one_failed_request_costs_the_others_nothing(address: str) -> None:
    async with attached(address) as (llm, core):
        params = SamplingParams(n=2)
        bad = asyncio.create_task(last_of(llm.generate("a", params)))
        await asyncio.to_thread(core.wait_for, AddRequest)
        good = asyncio.create_task(last_of(llm.generate("b")))
        await asyncio.to_thread(core.wait_for, AddRequest, 2)
        core.push(RequestFailed(0, "grammar exploded"))
        with pytest.raises(RequestFailedError, match="grammar exploded"):
            await bad
        assert (await asyncio.to_thread(core.wait_for, Abort)).numbers == [0, 1]
        core.push(Outputs([2], [65], finished=[Finished(2, "length", None, 0)]))
        assert (await good).outputs[0].text == "A"


async def test_a_failure_nobody_can_place_fails_what_has_not_begun(address: str) -> None:
    async with attached(address) as (llm, core):
        begun = asyncio.create_task(last_of(llm.generate("a")))
        await asyncio.to_thread(core.wait_for, AddRequest)
        core.push(Outputs([0], [65], started=[Started(0, 0, 0.0)]))
        await settled(llm, core)
        waiting = asyncio.create_task(last_of(llm.generate("b")))
        await asyncio.to_thread(core.wait_for, AddRequest, 2)
        core.push(RequestFailed(-1, "bad frame"))
        with pytest.raises(RequestFailedError, match="bad frame"):
            await waiting
        core.push(Outputs(finished=[Finished(0, "length", None, 0)]))
        assert (await begun).outputs[0].text == "A"


async def test_death_fails_every_stream_with_its_cause(address: str) -> None:
    script = says("A", end=None)
    async with attached(address, script, on_core_death="fail") as (llm, core):
        streams = [llm.generate("a") for _ in range(3)]
        for stream in streams:
            await anext(stream)
        pending = [asyncio.ensure_future(anext(stream)) for stream in streams[:2]]
        core.push(CoreFailed("out of memory", ""))
        found = await asyncio.gather(*pending, return_exceptions=True)
        assert [str(error) for error in found] == ["out of memory"] * 2
        assert found[0] is not found[1] and isinstance(found[0], EngineDeadError)
        for late in (streams[2], llm.generate("b")):
            with pytest.raises(EngineDeadError, match="out of memory"):
                await anext(late)
        assert not llm.is_running
        for call in (llm.stats(), llm.reset_prefix_cache()):
            with pytest.raises(EngineDeadError, match="out of memory"):
                await call


async def test_before_the_start_nothing_works() -> None:
    llm = AsyncLLM("smollm2")
    assert not llm.is_running
    with pytest.raises(RuntimeError, match="not started"):
        llm.generate([1])
    with pytest.raises(RuntimeError, match="not started"):
        await llm.stats()
    await llm.close()
    with pytest.raises(ValueError, match="did you mean 'max_num_seqs'"):
        AsyncLLM(max_num_seq=3)


# ---- the rest of the surface


async def test_chat_uses_the_template_and_adds_no_tokens(address: str) -> None:
    async with attached(address, echo) as (llm, core):
        assert llm.apply_chat_template(MESSAGES) == "user:hi|"
        output = await last_of(llm.chat(MESSAGES * 2))
        assert output.prompt == "user:hi<eos>user:hi|"
        expected = [*b"user:hi", EOS, *b"user:hi|"]
        assert core.all_of(AddRequest)[0].prompt_token_ids == expected
        shorter = await last_of(llm.chat(MESSAGES, add_generation_prompt=False))
        assert shorter.prompt == "user:hi"


async def test_stats_and_reset(address: str) -> None:
    def script(message: ToCore) -> Iterable[FromCore]:
        match message:
            case Hello():
                yield from (WELCOME, STATUS)
            case Call(call_id):
                yield CallResult(call_id, result=True)

    async with attached(address, script) as (llm, core):
        assert await llm.stats() == STATUS
        assert await llm.reset_prefix_cache() is True
        assert llm.is_running and llm.info == WELCOME and llm.vocab_size == 300
        await llm.close()
        await llm.close()
        assert not llm.is_running
        await asyncio.to_thread(core.wait_for, Goodbye)


async def test_attaching_without_a_tokenizer_serves_token_ids(address: str) -> None:
    with FakeCore(address, echo):
        llm = await AsyncLLM.connect(address)  # the core's "no-such-model" is not to be found
        assert llm.tokenizer is None
        output = await last_of(llm.generate([65, 66]))
        assert (output.outputs[0].token_ids, output.outputs[0].text) == ([65, 66], "")
        with pytest.raises(ValueError, match="no-such-model"):
            llm.generate("text")
        with pytest.raises(ValueError, match="no-such-model"):
            llm.chat(MESSAGES)
        await llm.close()
        with pytest.raises(ValueError, match="no-such-tokenizer"):
            await AsyncLLM.connect(address, tokenizer="no-such-tokenizer")


# ---- owning a core


async def test_an_owned_core_lives_as_long_as_the_block(address: str, handle: Handle) -> None:
    with FakeCore(address, echo):
        async with AsyncLLM("m", load_format="dummy") as llm:
            assert (await last_of(llm.generate("ok"))).outputs[0].text == "ok"
            assert handle.closed == 0
            with pytest.raises(RuntimeError, match="started before"):
                await llm.start()
        assert handle.closed == 1


async def test_an_owned_core_that_is_killed(address: str, handle: Handle) -> None:
    with FakeCore(address):
        async with AsyncLLM("m", load_format="dummy", on_core_death="fail") as llm:
            pending = asyncio.create_task(last_of(llm.generate("ok")))
            await asyncio.sleep(0.05)
            handle.process.kill()
            async with asyncio.timeout(WAIT_S):
                with pytest.raises(EngineDeadError, match="signal 9"):
                    await pending


@pytest.mark.parametrize(("usage", "kind"), [(True, ValueError), (False, EngineDeadError)])
async def test_a_start_that_fails_leaves_nothing(
    address: str, handle: Handle, usage: bool, kind: type[Exception]
) -> None:
    def fail(message: ToCore) -> Iterable[FromCore]:
        yield CoreFailed("no room", "", usage)

    with FakeCore(address, fail):
        with pytest.raises(kind, match="no room"):
            await AsyncLLM("m", load_format="dummy").start()
        assert handle.closed == 1


async def test_a_tokenizer_that_fails_stops_the_start(
    address: str, handle: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> None:
        raise ValueError(f"{name} has none")

    monkeypatch.setattr(async_llm.Tokenizer, "load", load)
    with FakeCore(address, lambda message: []):
        with pytest.raises(ValueError, match="other has none"):
            await AsyncLLM("m", load_format="dummy", tokenizer="other").start()
        assert handle.closed == 1


async def test_an_unknown_model_starts_no_core(handle: Handle) -> None:
    with pytest.raises(ValueError, match="smollm2"):
        await AsyncLLM("smollm3").start()
    assert handle.closed == 0 and handle.process.poll() is None
    handle.close()


async def test_used_before_its_start_it_says_so() -> None:
    llm = AsyncLLM("m", load_format="dummy")
    hello = [{"role": "user", "content": "Hello"}]
    for use in (
        lambda: llm.generate("Hello"),
        lambda: llm.chat(hello),
        lambda: llm.generate([1]),
        lambda: llm.info,
    ):
        with pytest.raises(RuntimeError, match="not started"):
            use()
    for call in (llm.stats(), llm.abort("x"), llm.reset_prefix_cache()):
        with pytest.raises(RuntimeError, match="not started"):
            await call


@pytest.mark.parametrize("kind", ["delta", "cumulative"])
async def test_prompt_logprobs_of_one_token(address: str, kind: str) -> None:
    params = SamplingParams(prompt_logprobs=1, output_kind=kind)  # type: ignore[arg-type]
    async with attached(address, says("a", "b")) as (llm, _):
        outputs = await all_of(llm.generate([65], params))
        without = await last_of(llm.generate([65]))
    assert outputs[0].prompt_logprobs == [None] and without.prompt_logprobs is None
    if kind == "delta":
        assert all(one.prompt_logprobs is None for one in outputs[1:])


async def test_a_number_of_the_core_is_known_by_its_request_a_while_longer(address: str) -> None:
    async with attached(address, says("a", "b")) as (llm, _):
        for request_id in ("one", "two", "three"):
            await last_of(llm.generate([65], request_id=request_id))
        ids = [llm.request_id_of(llm.info.client_id, number) for number in range(4)]
        assert ids == ["one", "two", "three", None]
        assert llm.request_id_of(llm.info.client_id + 1, 0) is None


async def test_frontends_of_one_core_draw_seeds_of_their_own(address: str) -> None:
    with FakeCore(address, silent) as core:
        for _ in range(2):
            async with await AsyncLLM.connect(address, tokenizer=byte_tokenizer()) as llm:
                made = llm.prepare(llm.make_prompt("a"), SamplingParams(temperature=1.0))
                llm.submit(made)
                llm.discard(made)
                await asyncio.to_thread(core.wait_for, AddRequest)
        await asyncio.to_thread(core.wait_for, AddRequest, 2)
        one, two = (message.params.seed for message in core.all_of(AddRequest))
        assert one is not None and two is not None and one != two


@pytest.mark.parametrize(
    ("settings", "loaded"),
    [
        ({"load_format": "dummy"}, ["m"]),
        ({"load_format": "dummy", "tokenizer": "other"}, ["other"]),
        ({"load_format": "synthetic"}, []),  # there is no model whose tokenizer it could be
        ({"load_format": "synthetic", "tokenizer": "other"}, ["other"]),
        ({"load_format": "synthetic", "tokenizer": "other", "skip_tokenizer_init": True}, []),
    ],
)
async def test_which_tokenizer_is_loaded(
    address: str,
    handle: Handle,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    loaded: list[str],
) -> None:
    found: list[str] = []

    def load(name: str) -> Any:
        found.append(name)
        return byte_tokenizer()

    monkeypatch.setattr(async_llm.Tokenizer, "load", load)
    with FakeCore(address, silent):
        async with AsyncLLM("m", **settings) as llm:
            assert (llm.tokenizer is not None) == bool(loaded)
    assert found == loaded


async def test_a_tokenizer_that_is_named_is_not_loaded_if_none_is_wanted(
    address: str, handle: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_llm.Tokenizer, "load", None)
    options = {"load_format": "dummy", "tokenizer": "other", "skip_tokenizer_init": True}
    with FakeCore(address, silent):
        async with AsyncLLM("m", **options) as llm:  # type: ignore[arg-type]
            assert llm.tokenizer is None
            with pytest.raises(ValueError, match="skip_tokenizer_init"):
                llm.generate("text")


async def test_a_frontend_that_is_closed_leaves_no_task(address: str) -> None:
    before = asyncio.all_tasks()
    async with attached(address) as (llm, _):
        await asyncio.sleep(0)
        assert asyncio.all_tasks() - before
        await llm.close()
        assert asyncio.all_tasks() == before


@pytest.mark.parametrize("name", ["request_id", "cache_salt", "tenant"])
async def test_names_have_a_length(address: str, name: str) -> None:
    async with attached(address, echo) as (llm, _):
        longest: Any = {name: "x" * MAX_NAME_CHARS}
        assert (await last_of(llm.generate("ok", **longest))).finished
        with pytest.raises(ValueError, match=f"{name} holds {MAX_NAME_CHARS + 1} characters"):
            llm.generate("ok", **{name: "x" * (MAX_NAME_CHARS + 1)})
