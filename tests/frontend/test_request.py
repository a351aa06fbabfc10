"""What the table of live requests makes of the core's messages, without a core."""

import asyncio
from typing import Any

import pytest

from nanovllm.frontend.detokenizer import DetokenizerFactory
from nanovllm.frontend.outputs import RequestOutput
from nanovllm.frontend.request import TRIAL_TOKENS, Request, RequestTable
from nanovllm.protocol.messages import AddRequest, Finished, FinishReason, Outputs, Started, Why
from nanovllm.protocol.plan import TokenLogprobs
from nanovllm.sampling_params import SamplingParams
from tests.frontend.vocabulary import byte_tokenizer

DETOKENIZERS = DetokenizerFactory(byte_tokenizer())


def request_in(table: RequestTable, number: int = 0, **params: Any) -> Request:
    message = AddRequest(number, [104, 105], SamplingParams(**params))
    request = Request(f"r{number}", "hi", message, DETOKENIZERS)
    table.add(request)
    return request


def tokens(number: int, text: str, *, scored: bool = False) -> Outputs:
    ids = list(text.encode())
    scores = {i: TokenLogprobs(one, -1.0, 1, [], []) for i, one in enumerate(ids)} if scored else {}
    return Outputs([number] * len(ids), ids, scores)


def end(number: int, reason: FinishReason = "length", **known: Any) -> Outputs:
    return Outputs(finished=[Finished(number, reason, None, 0, **known)])


def has_news(request: Request) -> bool:
    return request._has_news


async def taken(request: Request) -> RequestOutput:
    assert has_news(request)
    return await request.next_output()


async def test_streams_do_not_wait_for_log_probabilities_of_others() -> None:
    """These take the longest to write, so their streams are the last to be woken."""
    table, woken = RequestTable(), list[int]()
    requests = [request_in(table, number, logprobs=number % 2 or None) for number in range(4)]

    async def read(request: Request) -> None:
        await request.next_output()
        woken.append(request.number)

    tasks = [asyncio.create_task(read(one)) for one in requests]
    await asyncio.sleep(0)
    scores = {one: TokenLogprobs(65, -1.0, 1, [], []) for one in (0, 2)}
    table.apply(Outputs([3, 2, 1, 0], [65] * 4, scores))
    await asyncio.gather(*tasks)
    assert woken == [2, 0, 3, 1]


async def test_the_accounts_of_all_outputs_are_one_request_s() -> None:
    table = RequestTable()
    request = request_in(table, n=3)
    whys = [Why(1.0, 0.0, 0.0, 0.0, 0, 1, 10 + i, 1.0, None, 3 * i) for i in range(2)]
    ends = [Finished(i, "length", None, 5, why=why) for i, why in enumerate([*whys, None])]
    table.apply(Outputs([0, 1, 1, 2], [65] * 4, finished=ends))
    metrics = (await taken(request)).metrics
    assert (metrics.num_generation_tokens, metrics.num_preemptions) == (4, 15)
    assert (metrics.num_recomputed_tokens, metrics.num_forced_tokens) == (21, 3)
    assert metrics.why == dict(enumerate(whys))
    assert len(table) == 0 and request.num_unfinished == 0


async def test_only_the_first_start_of_the_first_output_is_news() -> None:
    table = RequestTable()
    request, other = request_in(table, n=2), request_in(table, 2)
    assert not request.has_begun
    table.apply(Outputs(started=[Started(1, 7, 7.0), Started(9, 7, 7.0)]))
    assert not request.has_begun and not other.has_begun
    table.apply(Outputs(started=[Started(0, 0, 2.0)]))
    assert request.has_begun
    table.apply(Outputs(started=[Started(0, 9, 9.0)]))
    assert (request.num_cached_tokens, request.metrics.queued_ms) == (0, 2.0)


@pytest.mark.parametrize("kind", ["cumulative", "delta", "final_only"])
async def test_log_probabilities_end_where_a_stop_string_does(kind: Any) -> None:
    """Though tokens behind it have come with the same message."""
    table = RequestTable()
    request = request_in(table, stop=["BC"], logprobs=0, output_kind=kind)
    assert table.apply(tokens(0, "ABCDE", scored=True)) == [0], "the core has to be told"
    (one,) = (await taken(request)).outputs
    assert (one.text, bytes(one.token_ids), one.stop_reason) == ("A", b"ABC", "BC")
    assert len(one.logprobs or ()) == 3 and one.cumulative_logprob == -3.0
    assert table.apply(tokens(0, "F")) == [] and not has_news(request)
    assert request.metrics.num_generation_tokens == 3


async def test_log_probabilities_are_made_while_the_core_works() -> None:
    """Also where nobody reads before the end: then all at once would take as long as some steps."""
    table = RequestTable()
    request = request_in(table, logprobs=0, output_kind="final_only")
    table.apply(tokens(0, "AB", scored=True))
    (completion,) = request.completions
    assert len(completion.logprobs or ()) == 2 and not completion.token_ids
    table.apply(tokens(0, "C", scored=True))
    table.apply(end(0))
    (one,) = (await taken(request)).outputs
    assert [list(some) for some in one.logprobs or ()] == [[65], [66], [67]]
    assert (bytes(one.token_ids), one.cumulative_logprob) == (b"ABC", -3.0)


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("delta", ["AB", "CD", "E"]),
        ("cumulative", ["AB", "ABCD", "ABCDE"]),
        ("final_only", ["ABCDE"]),
    ],
)
async def test_a_reader_is_woken_for_what_he_asked_for(kind: Any, texts: list[str]) -> None:
    table = RequestTable()
    request = request_in(table, output_kind=kind)
    found = []
    for message in (tokens(0, "AB"), tokens(0, "CD"), tokens(0, "E"), end(0)):
        reading = asyncio.ensure_future(request.next_output())
        await asyncio.sleep(0)
        table.apply(message)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if reading.done():
            found.append(reading.result())
        else:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
    shown = [one.text for output in found for one in output.outputs]
    assert [text for text in shown if text or kind != "delta"][: len(texts)] == texts
    assert [output.finished for output in found] == [False] * (len(found) - 1) + [True]
    assert found[-1].metrics.finished_time is not None


def test_when_an_output_is_stuck_and_when_it_has_passed() -> None:
    table = RequestTable()
    request = request_in(table, n=2, output_kind="final_only")
    first, second = request.completions
    request.note_sent("e")
    assert first.is_stuck and request.is_stuck and not first.has_passed
    table.apply(tokens(0, "A" * (TRIAL_TOKENS - 1)))
    assert not first.is_stuck and request.is_stuck and not first.has_passed
    table.apply(tokens(0, "A"))
    assert first.has_passed and first.received_token_ids() == [65] * TRIAL_TOKENS
    assert first.last_token_id == 65
    table.apply(end(1))
    assert second.has_passed and not second.is_stuck and not request.is_stuck
    request.note_sent("f")
    assert request.epoch == "f" and first.is_stuck and not first.has_passed
    first.deaths, first.num_failed_trials = ["e"], 1
    assert request.is_suspect
    first.acquit()
    assert not request.is_suspect and first.num_failed_trials == 0


def test_whom_a_number_belongs_to() -> None:
    table = RequestTable()
    request, other = request_in(table, 3, n=2), request_in(table, 5)
    assert [table.owner_of(n) for n in (2, 3, 4, 5, 6)] == [None, request, request, other, None]
    assert table.completion(4) is request.completions[1] and table.completion(6) is None
    assert "r3" in table and table.find("r3") is request and list(table) == [request, other]
    table.apply(end(4))
    assert table.remove(request) == [3] and table.remove(request) == []
    assert "r3" not in table and table.find("r3") is None and list(table) == [other]
