"""Viewers of one core, by way of one watcher: whoever applies the events has the core's state."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from nanovllm.core.server import CoreServer
from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.errors import EngineDeadError
from nanovllm.sampling_params import SamplingParams
from nanovllm.watch import feed
from nanovllm.watch import observer as observer_module
from nanovllm.watch.events import EngineEvent, Layout
from nanovllm.watch.feed import EngineFeed
from tests.core.serving import serving
from tests.waiting import WAIT_S

TIMEOUT_S = WAIT_S


@dataclass
class Picture:
    """What a viewer makes of events."""

    cells: dict[int, int] = field(default_factory=dict)
    tables: dict[int, list[int]] = field(default_factory=dict)
    uids: set[int] = field(default_factory=set)
    num_tokens: dict[int, int] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    ended: list[tuple[int, str]] = field(default_factory=list)
    layout: Layout | None = None

    def apply(self, event: EngineEvent) -> None:
        if event.kind == "snapshot":
            assert isinstance(event.layout, Layout)
            self.__init__(layout=event.layout)  # type: ignore[misc]
        for cell, state in zip(event.cells[::2], event.cells[1::2], strict=True):
            self.cells[cell] = state
        for one in event.sequences:
            self.uids.add(one.uid)
            self.num_tokens[one.uid] = one.num_tokens
        for step in event.progress:
            assert step.uid in self.uids
            self.num_tokens[step.uid] = step.num_tokens
        for table in event.tables:
            self.tables.setdefault(table.uid, [])[table.index :] = table.block_ids
        for uid in event.gone:
            self.uids.remove(uid)
            self.tables.pop(uid, None)
        self.steps += [step.step for step in event.steps]
        self.ended += [(end.uid, end.reason) for end in event.ended]

    @property
    def held(self) -> dict[int, int]:
        return {cell: state >> 1 for cell, state in self.cells.items() if state >> 1}


async def following(
    events: AsyncGenerator[EngineEvent | None, None], picture: Picture, until: Any
) -> None:
    async with asyncio.timeout(TIMEOUT_S), aclosing(events):
        async for event in events:
            if event is not None:
                picture.apply(event)
            if until(picture):
                return


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer_module, "MIN_INTERVAL_S", 0.01)
    monkeypatch.setattr(observer_module, "COST_SHARE", 1.0)


@asynccontextmanager
async def engine(address: str, **settings: Any) -> AsyncIterator[tuple[AsyncLLM, CoreServer]]:
    settings = {"block_size": 4, **settings}
    with serving(address, **settings) as server:
        llm = await AsyncLLM.connect(address, skip_tokenizer_init=True, on_core_death="fail")
        try:
            yield llm, server
        finally:
            await llm.close()


async def run(llm: AsyncLLM, num_tokens: int, request_id: str | None = None) -> None:
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=1)
    prompt = {"prompt_token_ids": list(range(1, 12))}
    async for _ in llm.generate(prompt, params, request_id):
        pass


@pytest.mark.usefixtures("quick")
async def test_two_viewers_see_the_same_and_all_of_it(address: str) -> None:
    async with engine(address) as (llm, _):
        feed = EngineFeed(llm)
        pictures = Picture(), Picture()
        watching = [
            asyncio.create_task(following(feed.events(), one, lambda p: len(p.ended) == 3))
            for one in pictures
        ]
        while any(one.layout is None for one in pictures):
            await asyncio.sleep(0.01)
        for number in range(3):
            await run(llm, 30, f"mine-{number}")
        await asyncio.gather(*watching)
        assert pictures[0].ended == pictures[1].ended == [(n, "length") for n in range(3)]
        assert pictures[0].steps == list(range(90)), "every step, once, in order"
        assert pictures[0].cells == pictures[1].cells and sum(pictures[0].cells.values()) > 3
        assert feed.num_viewers == 0


@pytest.mark.usefixtures("quick")
async def test_a_late_viewer_begins_with_the_state_of_now(address: str) -> None:
    async with engine(address, allow_debug=True) as (llm, _):
        feed = EngineFeed(llm, view="counts")
        early, late = Picture(), Picture()
        first = asyncio.create_task(following(feed.events(), early, lambda p: p.ended))
        await llm.set_pace(num_steps=30)  # the request is still there when the late one comes
        running = asyncio.create_task(run(llm, 400))
        while not early.uids:
            await asyncio.sleep(0.01)
        await following(feed.events(), late, lambda p: p.num_tokens.get(0, 0) > 20)
        assert late.layout is not None and late.layout.view == "counts"
        (table,) = late.tables.values()
        assert {block - 1 for block in table} == late.held.keys()
        assert set(late.held.values()) == {1}
        await llm.set_pace()
        await running
        await first


@pytest.mark.usefixtures("quick")
async def test_nothing_is_asked_of_the_core_without_viewers(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine(address) as (llm, _):
        asked = 0
        observe = llm.observe

        async def counted(*, fresh: bool = False) -> Any:
            nonlocal asked
            asked += 1
            return await observe(fresh=fresh)

        monkeypatch.setattr(llm, "observe", counted)
        feed = EngineFeed(llm)
        await asyncio.sleep(0.05)
        assert asked == 0
        await following(feed.events(), Picture(), lambda p: True)
        assert feed.num_viewers == 0
        before = asked
        await asyncio.sleep(0.1)
        assert asked == before > 0
        picture = Picture()
        await following(feed.events(), picture, lambda p: p.layout is not None)
        assert asked > before, "the next viewer starts it again"


@pytest.mark.usefixtures("quick")
async def test_a_viewer_that_reads_too_slowly_gets_a_snapshot(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "MAX_BEHIND", 2)
    async with engine(address) as (llm, _):
        watched = EngineFeed(llm)
        events = watched.events()
        first = await anext(events)
        assert first is not None and first.kind == "snapshot"
        (viewer,) = watched._viewers
        await run(llm, 40)
        while not viewer.is_behind:
            await asyncio.sleep(0.01)
        kinds = []
        picture = Picture()
        async for event in events:
            assert event is not None
            kinds.append(event.kind)
            if event.kind == "snapshot":
                picture.apply(event)
                break
        await events.aclose()
        assert kinds[-1] == "snapshot"
        assert sum(state & 1 for state in picture.cells.values()) > 3, "blocks still cached"


@pytest.mark.usefixtures("quick")
async def test_requests_of_this_frontend_are_named(address: str) -> None:
    async with engine(address, allow_debug=True) as (llm, _):
        other = await AsyncLLM.connect(address, skip_tokenizer_init=True)
        await llm.set_pace(num_steps=1)  # none of them ends before it was seen
        names: dict[int, str | None] = {}
        tasks = [
            asyncio.create_task(run(llm, 300, "chatcmpl-1")),
            asyncio.create_task(run(other, 300, "of another")),
        ]
        async with asyncio.timeout(TIMEOUT_S):
            async for event in EngineFeed(llm).events():
                if event is not None:
                    names |= {one.uid: one.request_id for one in event.sequences}
                if len(names) == 2:
                    break
        assert set(names.values()) == {"chatcmpl-1", None}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await other.close()


@pytest.mark.usefixtures("quick")
async def test_viewers_learn_of_the_core_s_death(address: str) -> None:
    async with engine(address) as (llm, server):
        events = EngineFeed(llm).events()
        await anext(events)
        server.stop()
        with pytest.raises(EngineDeadError):
            async with asyncio.timeout(TIMEOUT_S):
                async for _ in events:
                    pass


async def test_silence_is_told(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "SILENCE_S", 0.01)
    monkeypatch.setattr(observer_module, "MIN_INTERVAL_S", 0.5)
    async with engine(address) as (llm, _):
        events = EngineFeed(llm).events()
        seen = [await anext(events) for _ in range(6)]
        await events.aclose()
        assert None in seen and any(seen)
