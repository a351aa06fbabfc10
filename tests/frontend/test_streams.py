"""What a stream yields: every token once, whole characters, exact stops, log-probabilities."""

import asyncio
from collections.abc import Iterable
from itertools import chain
from typing import Any

import msgspec
import pytest

from nanovllm.frontend.outputs import Logprob, RequestOutput
from nanovllm.protocol.messages import (
    Abort,
    AddRequest,
    Finished,
    FromCore,
    Outputs,
    PromptLogprobs,
    Started,
    ToCore,
)
from nanovllm.protocol.plan import PositionLogprobs, TokenLogprobs
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams
from tests.frontend.attached import all_of, attached, last_of, says, settled
from tests.frontend.fake_core import echo, silent
from tests.frontend.vocabulary import EOS

# ---- streams


@pytest.mark.parametrize("kind", ["cumulative", "delta", "final_only"])
async def test_a_stream_holds_everything_once(address: str, kind: Any) -> None:
    async with attached(address, echo) as (llm, core):
        params = SamplingParams(output_kind=kind, max_tokens=10)
        outputs = await all_of(llm.generate("Grüße", params, "mine"))
        assert core.all_of(AddRequest)[0].prompt_token_ids == list("Grüße".encode())
    texts = [output.outputs[0].text for output in outputs]
    ids = [output.outputs[0].token_ids for output in outputs]
    last = outputs[-1]
    if kind == "delta":
        assert "".join(texts) == "Grüße" and [*chain(*ids)] == list("Grüße".encode())
    else:
        assert texts[-1] == "Grüße" and ids[-1] == list("Grüße".encode())
        assert all("Grüße".startswith(text) for text in texts)
    if kind == "final_only":
        assert len(outputs) == 1
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert [output.outputs[0].finished for output in outputs] == [o.finished for o in outputs]
    assert (last.request_id, last.prompt, last.prompt_token_ids) == (
        "mine",
        "Grüße",
        list("Grüße".encode()),
    )
    assert last.outputs[0].finish_reason == "length" and last.outputs[0].stop_reason is None
    metrics = last.metrics
    assert metrics.num_generation_tokens == 7 and metrics.queued_ms == 1.5
    assert last.num_cached_tokens == 2
    assert metrics.first_token_time is not None and metrics.finished_time is not None
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time


async def test_outputs_do_not_change_later(address: str) -> None:
    async with attached(address) as (llm, core):
        stream = llm.generate("a")
        first = asyncio.ensure_future(anext(stream))
        await asyncio.to_thread(core.wait_for, AddRequest)
        core.push(Outputs([0], [65]))
        kept = await first
        core.push(Outputs([0], [66], finished=[Finished(0, "length", None, 0)]))
        last = await anext(stream)
        assert (kept.outputs[0].text, kept.outputs[0].token_ids, kept.finished) == (
            "A",
            [65],
            False,
        )
        assert (last.outputs[0].text, last.metrics.num_generation_tokens) == ("AB", 2)
        assert kept.metrics.num_generation_tokens == 1


async def test_a_slow_caller_gets_one_merged_output(address: str) -> None:
    async with attached(address) as (llm, core):
        stream = llm.generate("a", SamplingParams(output_kind="delta"))
        first = asyncio.ensure_future(anext(stream))
        await asyncio.to_thread(core.wait_for, AddRequest)
        core.push(Outputs([0], [65]))
        assert (await first).outputs[0].text == "A"
        core.push(*(Outputs([0], [66]) for _ in range(100)))
        await settled(llm, core)
        merged = await anext(stream)
        assert merged.outputs[0].text == "B" * 100 and len(merged.outputs[0].token_ids) == 100
        core.push(Outputs(finished=[Finished(0, "stop", None, 3)]))
        (last,) = await all_of(stream)
        assert (last.outputs[0].text, last.outputs[0].finish_reason) == ("", "stop")
        assert last.metrics.num_preemptions == 3


@pytest.mark.parametrize("kind", ["cumulative", "delta", "final_only"])
async def test_n_outputs_are_one_request(address: str, kind: Any) -> None:
    async with attached(address) as (llm, core):
        before = asyncio.create_task(last_of(llm.generate("x", SamplingParams(n=2))))
        await asyncio.to_thread(core.wait_for, AddRequest)
        params = SamplingParams(n=3, output_kind=kind)
        outputs: list[RequestOutput] = []

        async def collect() -> None:
            async for output in llm.generate("a", params):
                outputs.append(output)

        collecting = asyncio.create_task(collect())
        request = await asyncio.to_thread(core.wait_for, AddRequest, 2)
        assert request.number == 2
        core.push(Outputs([2, 4], [65, 67]))
        await settled(llm, core)
        core.push(Outputs([3, 4, 3], [66, 68, EOS], finished=[Finished(3, "stop", None, 1)]))
        core.push(Outputs([2], [69], finished=[Finished(n, "length", None, 0) for n in (2, 4)]))
        await collecting
        before.cancel()
    last = outputs[-1]
    assert last.finished and not any(output.finished for output in outputs[:-1])
    texts = ["", "", ""]
    for output in outputs:
        for one in output.outputs:
            texts[one.index] = texts[one.index] + one.text if kind == "delta" else one.text
    assert texts == ["AE", "B", "CD"]
    if kind == "delta":
        assert [one.index for one in outputs[0].outputs] == [0, 2], "only those with news"
    else:
        assert [one.finish_reason for one in last.outputs] == ["length", "stop", "length"]
    assert last.metrics.num_generation_tokens == 6 and last.metrics.num_preemptions == 1


async def test_half_characters_are_not_shown(address: str) -> None:
    chunks = [bytes([byte]) for byte in "é世".encode()]
    async with attached(address, says(*chunks, b"\xe4", end="length")) as (llm, _):
        params = SamplingParams(output_kind="delta")
        texts = [output.outputs[0].text for output in await all_of(llm.generate("a", params))]
    assert "".join(texts) == "é世\ufffd" and texts[-1].endswith("\ufffd")


async def test_without_detokenizing_there_are_only_ids(address: str) -> None:
    async with attached(address, says("AB")) as (llm, _):
        output = await last_of(llm.generate("a", SamplingParams(detokenize=False)))
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("", [65, 66])


@pytest.mark.parametrize(
    ("include", "text"), [(False, "AB"), (True, "ABC")], ids=["cut", "included"]
)
async def test_the_token_that_ends_it_is_not_text(address: str, include: bool, text: str) -> None:
    def script(message: ToCore) -> Iterable[FromCore]:
        if isinstance(message, AddRequest):
            yield Outputs([0, 0, 0], [65, 66, 67], finished=[Finished(0, "stop", 67, 0)])
        else:
            yield from silent(message)

    async with attached(address, script) as (llm, _):
        params = SamplingParams(stop_token_ids=[67], include_stop_str_in_output=include)
        (one,) = (await last_of(llm.generate("a", params))).outputs
    assert (one.text, one.token_ids) == (text, [65, 66, 67])
    assert (one.finish_reason, one.stop_reason) == ("stop", 67)


async def test_the_last_token_of_a_complete_grammar_is_text(address: str) -> None:
    def script(message: ToCore) -> Iterable[FromCore]:
        if isinstance(message, AddRequest):
            end = Finished(0, "stop", None, 0, last_is_text=True)
            yield Outputs([0, 0, 0], [65, 66, 67], finished=[end])
        else:
            yield from silent(message)

    async with attached(address, script) as (llm, _):
        params = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["ABC"]))
        (one,) = (await last_of(llm.generate("a", params))).outputs
    assert (one.text, one.finish_reason, one.stop_reason) == ("ABC", "stop", None)


# ---- stop strings


@pytest.mark.parametrize("kind", ["cumulative", "delta", "final_only"])
@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_across_tokens_cuts_and_aborts(
    address: str, kind: Any, include: bool
) -> None:
    script = says("Hi", " E", "N", "D more", " and more", end=None)
    async with attached(address, script) as (llm, core):
        params = SamplingParams(
            stop=["never", "END"], output_kind=kind, include_stop_str_in_output=include
        )
        outputs = await all_of(llm.generate("a", params))
        assert (await asyncio.to_thread(core.wait_for, Abort)).numbers == [0]
        core.push(Outputs([0], [65], finished=[Finished(0, "abort", None, 0)]))  # too late
        await settled(llm, core)
    (last,) = outputs[-1].outputs
    assert (last.finish_reason, last.stop_reason) == ("stop", "END")
    text = "".join(o.outputs[0].text for o in outputs) if kind == "delta" else last.text
    ids = (
        [*chain(*(o.outputs[0].token_ids for o in outputs))] if kind == "delta" else last.token_ids
    )
    assert text == ("Hi END" if include else "Hi ")
    assert bytes(ids) == b"Hi END", "up to the token that completed it"
    assert outputs[-1].metrics.num_generation_tokens == 6
    if kind != "delta":
        assert all("Hi END".startswith(output.outputs[0].text) for output in outputs)


async def test_a_stop_string_in_the_last_message_beats_the_length(address: str) -> None:
    def script(message: ToCore) -> Iterable[FromCore]:
        if isinstance(message, AddRequest):
            yield Outputs([0] * 3, [65, 66, 67], finished=[Finished(0, "length", None, 0)])
        else:
            yield from silent(message)

    async with attached(address, script) as (llm, core):
        (one,) = (await last_of(llm.generate("a", SamplingParams(stop="B")))).outputs
        await settled(llm, core)
        assert core.all_of(Abort) == [], "the core has ended it itself"
    assert (one.text, one.token_ids, one.stop_reason) == ("A", [65, 66], "B")


async def test_what_was_held_back_comes_at_the_end(address: str) -> None:
    async with attached(address, says("ab", "EN")) as (llm, _):
        (one,) = (await last_of(llm.generate("a", SamplingParams(stop="END")))).outputs
    assert (one.text, one.finish_reason, one.stop_reason) == ("abEN", "length", None)


async def test_stop_strings_wait_for_min_tokens(address: str) -> None:
    async with attached(address, says("abababa", end=None)) as (llm, _):
        params = SamplingParams(stop="b", min_tokens=3)
        (one,) = (await last_of(llm.generate("a", params))).outputs
    assert (one.text, one.stop_reason) == ("aba", "b")


async def test_a_stop_string_is_found_behind_one_that_came_too_early(address: str) -> None:
    async with attached(address, says("aabaab", end=None)) as (llm, _):
        params = SamplingParams(stop="aab", min_tokens=4)
        (one,) = (await last_of(llm.generate("a", params))).outputs
    assert (one.text, one.stop_reason) == ("aab", "aab")


# ---- log-probabilities


async def test_logprobs_are_keyed_by_token(address: str) -> None:
    def script(message: ToCore) -> Iterable[FromCore]:
        if isinstance(message, AddRequest):
            number = message.number
            chunk = PositionLogprobs.of([TokenLogprobs(98, -3.0, 7, [99, 100], [-0.5, -1.5])])
            yield Outputs(prompt_logprobs=[PromptLogprobs(number, chunk)])
            yield Outputs(
                [number],
                [65],
                logprobs={0: TokenLogprobs(65, -0.25, 1, [65, 66], [-0.25, -2.0])},
                prompt_logprobs=[PromptLogprobs(number, chunk)],
                started=[Started(number, 0, 0.0)],
            )
            yield Outputs(
                [number],
                [200],
                logprobs={0: TokenLogprobs(200, -4.0, 9, [65], [-0.5])},
                finished=[Finished(number, "length", None, 0)],
            )
        else:
            yield from silent(message)

    async with attached(address, script) as (llm, _):
        params = SamplingParams(logprobs=2, prompt_logprobs=2)
        output = await last_of(llm.generate("abb", params))
        delta = msgspec.structs.replace(params, output_kind="delta")
        deltas = await all_of(llm.generate("abb", delta))
    (one,) = output.outputs
    assert one.logprobs == [
        {65: Logprob(-0.25, 1, "A"), 66: Logprob(-2.0, 2, "B")},
        {200: Logprob(-4.0, 9, "\ufffd"), 65: Logprob(-0.5, 1, "A")},
    ]
    assert one.cumulative_logprob == -4.25
    prompt = {98: Logprob(-3.0, 7, "b"), 99: Logprob(-0.5, 1, "c"), 100: Logprob(-1.5, 2, "d")}
    assert output.prompt_logprobs == [None, prompt, prompt]
    assert deltas[0].prompt_logprobs == [None, prompt, prompt]
    assert all(later.prompt_logprobs is None for later in deltas[1:])
    assert [*chain(*(later.outputs[0].logprobs or [] for later in deltas))] == one.logprobs
    assert deltas[-1].outputs[0].cumulative_logprob == -4.25
