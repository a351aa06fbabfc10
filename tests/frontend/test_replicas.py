"""Several cores behind one frontend, scripted: who gets a request, who goes on with it when a core
has died, and what is said of all of them as of one."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from nanovllm.frontend import replicas as module
from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.errors import EngineDeadError
from nanovllm.frontend.replicas import CHUNK, Prefixes, load_of, merged
from nanovllm.frontend.request import Request
from nanovllm.protocol.messages import (
    Abort,
    AddRequest,
    Call,
    CallResult,
    CoreStatus,
    FromCore,
    Hello,
    Outputs,
    ToCore,
    Welcome,
)
from nanovllm.sampling_params import SamplingParams
from tests.frontend.fake_core import INFO, STATUS, WELCOME, FakeCore, Script
from tests.frontend.vocabulary import byte_tokenizer
from tests.waiting import WAIT_S

NOBODY = -1, 0
ROOMY = msgspec.structs.replace(INFO, max_model_len=4096)


def status(**changes: Any) -> CoreStatus:
    return msgspec.structs.replace(STATUS, **changes)


def welcome(epoch: str, **changes: Any) -> Welcome:
    return msgspec.structs.replace(WELCOME, epoch=epoch, worker=ROOMY, **changes)


def core(epoch: str, *, resets: bool = True, says: Iterable[int] = (), **changes: Any) -> Script:
    """Welcomes, answers calls, and gives the requests of these numbers one token."""

    def script(message: ToCore) -> Iterable[FromCore]:
        if isinstance(message, Hello):
            yield welcome(epoch, **changes)
        elif isinstance(message, Call):
            yield CallResult(message.call_id, resets)
        elif isinstance(message, AddRequest) and message.number in says:
            yield Outputs([message.number], [65])

    return script


@asynccontextmanager
async def attached(
    tmp_path: Path, *scripts: Script, **options: Any
) -> AsyncIterator[tuple[AsyncLLM, list[FakeCore]]]:
    async with AsyncExitStack() as stack:
        addresses = [f"ipc://{tmp_path}/{index}.sock" for index in range(len(scripts))]
        cores = [
            stack.enter_context(FakeCore(address, script))
            for address, script in zip(addresses, scripts, strict=True)
        ]
        llm = await AsyncLLM.connect(",".join(addresses), tokenizer=byte_tokenizer(), **options)
        stack.push_async_callback(llm.close)
        yield llm, cores


def submit(llm: AsyncLLM, token_ids: list[int], **options: Any) -> Request:
    made = llm.make_prompt({"prompt_token_ids": token_ids})
    request = llm.prepare(made, SamplingParams(max_tokens=99, seed=0), **options)
    llm.submit(request)
    return request


async def numbers(llm: AsyncLLM, cores: list[FakeCore]) -> list[list[int]]:
    """Of the requests that each core has got."""
    await llm.reset_prefix_cache()  # which each answers after what was sent before
    return [[message.number for message in one.all_of(AddRequest)] for one in cores]


# ---- who gets a request


async def test_prompts_that_nobody_knows_go_round(tmp_path: Path) -> None:
    async with attached(tmp_path, core("a"), core("b"), core("c")) as (llm, cores):
        for index in range(3):  # one after the other: all have equally little to do
            llm.discard(submit(llm, [index]))
        kept = [submit(llm, [3 + index]) for index in range(5)]
        assert await numbers(llm, cores) == [[0, 3, 6], [1, 4, 7], [2, 5]]
        for one in (kept[0], kept[3]):
            llm.discard(one)
        submit(llm, [9])
        assert (await numbers(llm, cores))[0] == [0, 3, 6, 8], "it has the least to do"


@pytest.mark.parametrize(
    ("num_others", "num_chunks", "most"),
    [(0, 1, 10), (8, 1, 12), (0, 8, 17), (0, 24, 33), (0, 28, 33)],
)
async def test_what_begins_alike_stays_together_up_to_a_point(
    tmp_path: Path, num_others: int, num_chunks: int, most: int
) -> None:
    """A core may have 8 requests more than another, a quarter of the other's, and one for each
    chunk that the other would compute again, of which 24 count."""
    async with attached(tmp_path, core("a"), core("b")) as (llm, cores):
        for index in range(2 * num_others):
            submit(llm, [index])
        first = 2 * num_others
        for index in range(most + 3):
            submit(llm, [7] * CHUNK * num_chunks + [index])
        got = await numbers(llm, cores)
        assert [number for number in got[0] if number >= first] == [*range(first, first + most)]
        assert got[1][num_others:] == [first + most, first + most + 1, first + most + 2]


async def test_other_salts_and_other_beginnings_are_not_alike(tmp_path: Path) -> None:
    async with attached(tmp_path, core("a"), core("b")) as (llm, cores):
        submit(llm, [7] * CHUNK, cache_salt="x")
        submit(llm, [7] * CHUNK, cache_salt="y")
        submit(llm, [7] * (CHUNK - 1) + [8])
        submit(llm, [7] * CHUNK + [1], cache_salt="y")
        submit(llm, [7] * CHUNK + [1], cache_salt="x")
        assert await numbers(llm, cores) == [[0, 2, 4], [1, 3]]


def test_the_longest_known_beginning_counts() -> None:
    known, one, two = Prefixes(), [1] * CHUNK, [2] * CHUNK
    known.note([*one, *two, 3], None, 0)
    known.note([*one, *one], None, 1)
    assert known.find([*one, *two], None) == (0, 2)
    assert known.find([*one, *two, *two], None) == (0, 2)
    last = 1, 1  # who came last has it
    assert known.find(one, None) == known.find([*one, 5, 5], None) == last
    assert known.find(one[1:], None) == NOBODY, "shorter than what is looked up at once"
    assert known.find([*two, *one], None) == NOBODY
    assert known.find(one, "salt") == NOBODY


def test_beginnings_are_looked_at_up_to_a_length_and_the_latest_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MOST_CHUNKS", 2)
    monkeypatch.setattr(module, "MOST_KNOWN", 3)
    known, parts = Prefixes(), [[index] * CHUNK for index in range(9)]
    known.note([*parts[0], *parts[1], *parts[2]], None, 0)
    known.note([*parts[0], *parts[1], *parts[3]], None, 1)
    assert known.find([*parts[0], *parts[1], *parts[2]], None) == (1, 2), (
        "the third is not looked at"
    )
    known.note(parts[4], None, 2)
    known.note(parts[0], None, 0)  # is the latest again
    known.note(parts[5], None, 2)
    assert known.find(parts[4], None) == known.find(parts[5], None) == (2, 1)
    assert known.find([*parts[0], *parts[1]], None) == (0, 1), "the second part has been forgotten"
    known.note(parts[6], None, 1)
    assert known.find(parts[4], None) == NOBODY and known.find(parts[0], None) == (0, 1)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (None, (3, 0, False)),
        ({"num_clients": 1, "num_running": 7, "num_queued_tokens": 5}, (3, 5, False)),
        ({"num_clients": 2, "num_running": 7, "num_waiting": 4}, (11, 0, False)),
        ({"num_clients": 2, "num_running": 1, "num_waiting": 1}, (3, 0, False)),
        ({"num_blocks": 100, "num_free_blocks": 5}, (3, 0, False)),
        ({"num_blocks": 100, "num_free_blocks": 4}, (3, 0, True)),
    ],
)
def test_how_much_a_core_has_to_do(
    told: dict[str, int] | None, expected: tuple[int, int, bool]
) -> None:
    """By the frontend's own count where it is alone, or where others' are fewer."""
    line = SimpleNamespace(latest_status=None if told is None else status(**told))
    session: Any = SimpleNamespace(line=line, num_requests=3)
    assert load_of(session) == expected


# ---- who goes on with it


async def test_what_a_dead_core_had_goes_on_at_another_but_for_what_it_may_have_died_of(
    tmp_path: Path,
) -> None:
    async with attached(tmp_path, core("a", says=(0, 1)), core("b")) as (llm, cores):
        prompts = [[7] * CHUNK + [index] for index in range(3)]
        streaming, aborted, stuck = (submit(llm, prompt) for prompt in prompts)
        assert await numbers(llm, cores) == [[0, 1, 2], []]
        await llm.abort(aborted.request_id)
        await numbers(llm, cores)
        assert cores[0].all_of(Abort)[0].numbers == [1] and not cores[1].all_of(Abort)
        cores[0].die()
        taken = await asyncio.to_thread(cores[1].wait_for, AddRequest)
        assert (taken.number, taken.output_token_ids) == (0, [65])
        with FakeCore(cores[0].address, core("c")) as back:
            again = await asyncio.to_thread(back.wait_for, AddRequest)
            assert (again.number, again.output_token_ids) == (2, [])
            assert again.is_suspect, "it had got nowhere"
            async with asyncio.timeout(WAIT_S):
                while not (output := await aborted.next_output()).finished:
                    pass
            assert output.outputs[0].finish_reason == "abort"
            assert [one.number for one in cores[1].all_of(AddRequest)] == [0]
            llm.discard(streaming)
            assert (await asyncio.to_thread(cores[1].wait_for, Abort)).numbers == [0]
            llm.discard(stuck)
            assert (await asyncio.to_thread(back.wait_for, Abort)).numbers == [2]


async def until(condition: Any) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)


async def test_who_is_away_gets_nothing_and_is_waited_for_if_all_are(tmp_path: Path) -> None:
    async with attached(tmp_path, core("a"), core("b")) as (llm, cores):
        first = submit(llm, [1])
        for one in cores:
            one.push(STATUS)
        await until(lambda: None not in llm.replica_stats)
        cores[0].die()
        await until(lambda: llm.replica_stats[0] is None)
        submit(llm, [2])
        submit(llm, [3])
        await until(lambda: len(cores[1].all_of(AddRequest)) == 2)
        assert llm.is_running and not llm.is_stalled and (await llm.stats()).num_blocks == 9
        cores[1].die()
        await until(lambda: llm.replica_stats == [None, None])
        assert llm.is_running and llm.is_stalled
        later = submit(llm, [4])
        with FakeCore(cores[0].address, core("c", says=(0, 3))) as back:
            await asyncio.to_thread(back.wait_for, AddRequest, 2)
            got = [one.number for one in back.all_of(AddRequest)]
            assert got == [3, 0], "last who may have ended a core"
            for request in (first, later):
                assert (await request.next_output()).outputs[0].token_ids == [65]
            assert llm.info.epoch == "c"


async def test_with_nobody_to_go_on_with_them_streams_wait(tmp_path: Path) -> None:
    async with attached(tmp_path, core("a", says=(0,)), core("b")) as (llm, cores):
        streaming = submit(llm, [1])
        await numbers(llm, cores)
        cores[1].push(STATUS)
        await until(lambda: llm.replica_stats[1] is not None)
        cores[1].die()
        await until(lambda: llm.replica_stats[1] is None)
        cores[0].die()
        with FakeCore(cores[0].address, core("c")) as back:
            again = await asyncio.to_thread(back.wait_for, AddRequest)
            assert again.output_token_ids == [65]
        assert (await streaming.next_output()).outputs[0].token_ids == [65]


async def test_when_none_comes_back_it_is_told(tmp_path: Path) -> None:
    options = {"core_return_timeout_s": 0.2}
    async with attached(tmp_path, core("a"), core("b"), **options) as (llm, cores):
        streams = [submit(llm, [index]) for index in range(2)]
        await numbers(llm, cores)
        for one in cores:
            one.die()
        for request in streams:
            with pytest.raises(EngineDeadError, match="no core came back"):
                await request.next_output()
        await until(lambda: not llm.is_running)
        with pytest.raises(EngineDeadError, match=r"0\.sock"):
            submit(llm, [3])
        with pytest.raises(EngineDeadError, match=r"1\.sock"):
            raise await llm._line.until_dead()


# ---- what is said of all of them


async def test_all_run_one_model_or_none_does(tmp_path: Path) -> None:
    other = msgspec.structs.replace(ROOMY, max_model_len=2048)

    def larger(message: ToCore) -> Iterable[FromCore]:
        return [msgspec.structs.replace(welcome("b"), worker=other)] * isinstance(message, Hello)

    with pytest.raises(ValueError, match="run different models"):
        async with attached(tmp_path, core("a"), larger):
            pass


async def test_a_change_is_said_to_each_and_a_question_to_one(tmp_path: Path) -> None:
    async with attached(tmp_path, core("a"), core("b", resets=False)) as (llm, cores):
        assert await llm.reset_prefix_cache() is False, "one of them could not"
        assert [len(one.all_of(Call)) for one in cores] == [1, 1]
        await llm.set_pace(num_steps=1)
        assert [len(one.all_of(Call)) for one in cores] == [2, 2]
        with pytest.raises(AssertionError):
            await llm.observe()  # the answer is none of a viewer's
        assert [len(one.all_of(Call)) for one in cores] == [3, 2]
        assert llm.address == ",".join(one.address for one in cores) and llm.info.epoch == "a"


async def test_a_number_is_known_by_its_request_wherever_it_is(tmp_path: Path) -> None:
    async with attached(tmp_path, core("a"), core("b")) as (llm, cores):
        for name in ("one", "two"):
            submit(llm, [1], request_id=name)
        assert await numbers(llm, cores) == [[0], [1]]
        assert [llm.request_id_of(0, number) for number in range(3)] == ["one", "two", None]
        with pytest.raises(ValueError, match="in use"):
            submit(llm, [1], request_id="two")


async def test_statuses_are_summed_as_they_come(tmp_path: Path) -> None:
    async with attached(tmp_path, core("a"), core("b")) as (llm, cores):
        cores[0].push(status(num_running=2))
        assert (await llm.stats()).num_running == 2
        cores[1].push(status(num_running=5))
        await until(lambda: None not in llm.replica_stats)
        assert (await llm.stats()).num_running == 7
        cores[0].push(status(num_running=1))
        await until(lambda: llm.replica_stats[0].num_running == 1)  # type: ignore[union-attr]
        assert (await llm.stats()).num_running == 6


def test_of_statuses_counts_are_sums_and_the_rest_what_it_means_for_all() -> None:
    one = status(epoch="a", last_step_ms=3.0, uptime_s=9.0, stalled_s=4.0, draining=True)
    one = msgspec.structs.replace(one, num_clients=2, num_running=1, explained_epochs=["x"])
    two = status(epoch="b", last_step_ms=5.0, uptime_s=8.0, stalled_s=1.0, draining=False)
    two = msgspec.structs.replace(two, num_clients=1, num_running=3, explained_epochs=["y"])
    both = merged([one, two])
    assert (both.epoch, both.last_step_ms, both.uptime_s, both.stalled_s) == ("a,b", 5.0, 9.0, 1.0)
    assert (both.draining, both.num_clients, both.num_running) == (False, 2, 4)
    assert both.explained_epochs == ["x", "y"] and both.num_blocks == 18
    assert merged([one]) == one
