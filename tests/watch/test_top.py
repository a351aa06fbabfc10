"""`nanovllm top`: what it makes of events, how it looks, and where it gets them."""

import asyncio
import io
import threading
from argparse import Namespace
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from nanovllm import cli
from nanovllm.watch.events import (
    ChunkEvent,
    Counts,
    EngineEvent,
    Layout,
    Progress,
    SequenceEvent,
    StepEvent,
    Table,
)
from nanovllm.watch.top.command import from_core, from_server, reading_keys
from nanovllm.watch.top.screen import Screen
from nanovllm.watch.top.state import State
from nanovllm.watch.top.view import View
from tests.core.serving import RawClient, add, serving
from tests.e2e.processes import wait_until
from tests.frontend.server.test_engine import complete, engine
from tests.waiting import WAIT_S

TIMEOUT_S = WAIT_S


def layout(**changes: Any) -> Layout:
    fields = {
        **{"model": "m", "device": "cpu", "view": "full", "num_blocks": 40, "block_size": 16},
        **{"num_cells": 40, "num_dense": 40, "stride": 1, "max_num_batched_tokens": 64},
        **{"max_num_seqs": 4, "max_model_len": 128},
    }
    return Layout(**{**fields, **changes})


def sequence(uid: int, **changes: Any) -> SequenceEvent:
    fields = {
        **{"request_id": None, "state": "running", "cause": "", "queued_at": 0.0},
        **{"started_at": 0.5, "ttft_s": 0.0, "num_prompt_tokens": 30, "num_tokens": 34},
        **{"num_computed": 33, "num_cached_tokens": 16, "num_preemptions": 0},
    }
    return SequenceEvent(uid, **{**fields, **changes})


def event(now: float = 1.0, **changes: Any) -> EngineEvent:
    fields = {
        **{"kind": "update", "now": now, "interval_s": 0.1, "cells": [], "sequences": []},
        **{"progress": [], "tables": [], "gone": [], "num_hidden": 0, "steps": []},
        **{"batches": {}, "num_lost_steps": 0, "ended": []},
        "counters": Counts(37, 2, 1, 0, 3, 60, 10, 0, 60, 15, 5),
    }
    return EngineEvent(**{**fields, **changes})


BUSY = event(
    kind="snapshot",
    layout=layout(),
    cells=[0, 5, 1, 3, 2, 2, 7, 1],  # shared by two; held and full; held; cached but free
    sequences=[
        sequence(0),
        sequence(1, num_computed=20),
        sequence(2, state="waiting", cause="seats", num_computed=0),
    ],
    tables=[Table(0, 0, [1, 2]), Table(1, 0, [1, 3])],
    steps=[
        StepEvent(3, 0.8, 0.85, 512, 0, [ChunkEvent(1, 0, 48)], 1, []),
        StepEvent(4, 0.9, 0.95, 512, 2, [], 2, [2]),
    ],
)


def shown(state: State, width: int = 120, height: int = 40, view: View | None = None) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False)
    console.print(Screen(state, view), height=height)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_state_is_what_its_events_say() -> None:
    state = State()
    state.apply(BUSY)
    assert state.owners == {1: 1, 2: 0, 3: 1} and state.hit_rate == 0.25
    later = Counts(38, 1, 0, 0, 3, 60, 110, 0, 60, 15, 9)
    update = {"progress": [Progress(0, 40, 39)], "gone": [1], "cells": [0, 3, 2, 0]}
    state.apply(event(1.5, counters=later, tables=[Table(0, 1, [2, 9])], **update))
    assert (state.cells[0], state.cells[2], state.owners) == (3, 0, {1: 0, 2: 0, 9: 0})
    assert state.sequences[0].num_tokens == 40 and set(state.sequences) == {0, 2}
    assert state.tokens_per_s == pytest.approx(200)
    state.apply(event(kind="snapshot", layout=layout()))
    assert state.sequences == {} and sum(state.cells) == 0


def test_the_screen_shows_it() -> None:
    state = State()
    assert "waiting for the engine" in shown(state)
    state.apply(BUSY)
    text = shown(state)
    assert "m on cpu" in text and "cache hits 25%" in text and "preempted 3" in text
    assert "3 of 40 blocks in use, 16 tokens each" in text
    assert "2█▓····░" in text, "shared, full, being written, free …, cached but free"
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("#")}
    assert "decode" in rows["#0"] and "prefill" in rows["#1"]
    assert "waits for a seat" in rows["#2"]
    assert "▼" in text, "a preemption"


@pytest.mark.parametrize(
    ("width", "height"), [(40, 8), (60, 16), (80, 24), (80, 20), (200, 60), (90, 30)]
)
def test_it_fits_into_any_terminal(width: int, height: int) -> None:
    state = State()
    many = [sequence(uid) for uid in range(100)]
    large = layout(num_blocks=100_000, num_cells=4096, num_dense=2048, stride=48)
    state.apply(event(kind="snapshot", layout=large, sequences=many, num_hidden=7))
    lines = shown(state, width, height).splitlines()
    assert all(len(line) <= width for line in lines)
    assert len(lines) <= height
    assert ("blocks in use (a sample)" in "".join(lines)) == (height >= 20)
    assert ("Steps" in "".join(lines)) == (height >= 16)
    listed = sum(line.startswith("#") for line in lines)
    assert listed >= 2 and f"and {107 - listed} more" in lines[-1]


def numbers(text: str) -> list[int]:
    return [int(line.split()[0][1:]) for line in text.splitlines() if line.startswith("#")]


def test_keys_sort_scroll_and_choose() -> None:
    state, view = State(), View()
    some = [sequence(uid, num_prompt_tokens=30 + uid % 7) for uid in range(30)]
    state.apply(event(kind="snapshot", layout=layout(), sequences=some, num_hidden=2))

    def press(*keys: str) -> list[int]:
        assert all([view.press(key) for key in keys])
        return numbers(shown(state, 80, 12, view))

    first = press()
    page = len(first)
    assert first == list(range(page)) and 3 < page < 10
    assert press("down", "j") == list(range(2, 2 + page))
    text = shown(state, 80, 12, view)
    assert f"2 before these; and {30 - page} more" in text and "q quit   s sort (arrival)" in text
    assert press("up", "k", "k") == first, "not beyond the first"
    assert press("pagedown") == list(range(page, 2 * page))
    assert press("pageup") == first and press("end")[-1] == 29
    assert press("up")[-1] == 28 and press("home") == first
    assert press("r") == list(range(29, 29 - page, -1))
    assert press("r", "s") == [6, 13, 20, 27, 5, 12, 19, 26, 4, 11][:page]
    assert "prompt▼" in shown(state, 80, 12, view)
    assert "Steps" in shown(state, 80, 24, view)
    view.press("f")
    assert "Steps" not in (alone := shown(state, 80, 24, view)) and len(numbers(alone)) == 17
    assert not view.press("q") and not view.press("c-c")


async def test_keys_are_read_from_a_terminal() -> None:
    view, ends = View(), asyncio.Event()
    seen: list[str] = []
    with (
        create_pipe_input() as keyboard,
        create_app_session(input=keyboard, output=DummyOutput()),
        reading_keys(view, on_key=lambda: seen.append(view.sort), on_quit=ends.set),
    ):
        keyboard.send_text("s\x1b[Bx")
        keyboard.send_text("q")
        async with asyncio.timeout(TIMEOUT_S):
            await ends.wait()
    assert seen[-1] == view.sort == "prompt"


async def first_of(events: Any) -> EngineEvent:
    async with asyncio.timeout(TIMEOUT_S):
        found: EngineEvent = await anext(events)
        await events.aclose()
        return found


async def test_events_of_a_core(tmp_path: Any) -> None:
    address = f"ipc://{tmp_path}/core.sock"
    with serving(address):
        first = await first_of(from_core(Namespace(address=address, keys=None)))
        assert first.kind == "snapshot" and first.layout


async def test_events_of_a_server(tmp_path: Any) -> None:
    import httpx

    address = f"ipc://{tmp_path}/core.sock"
    async with engine(address, api_key=["k"]) as (url, _):
        headers = {"authorization": "Bearer k"}
        async with httpx.AsyncClient(headers=headers, timeout=WAIT_S) as client:
            events = from_server(url, "k")
            assert (await anext(events)).kind == "snapshot"  # type: ignore[union-attr]
            await complete(client, url)
            async with asyncio.timeout(TIMEOUT_S):
                async for one in events:
                    if one is not None and one.ended:
                        break
            await events.aclose()
        with pytest.raises(ValueError, match="answers 401"):
            await first_of(from_server(url, None))


async def test_a_url_where_nobody_is() -> None:
    with pytest.raises(ValueError, match=r"--url: .* cannot be reached"):
        await first_of(from_server("http://127.0.0.1:9", None))


def test_the_command_prints_once(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"ipc://{tmp_path}/core.sock"
    with serving(address):
        client = RawClient(address)
        client.greet()
        client.send(add(0, max_tokens=400))
        assert cli.main(["top", "--address", address, "--once"]) == 0
        client.close()
    out = capsys.readouterr().out
    assert "KV cache" in out and "of 199 blocks" in out


def test_the_command_goes_on_until_the_core_ends(tmp_path: Any) -> None:
    address = f"ipc://{tmp_path}/core.sock"
    with serving(address) as server:

        def stop_once_watched() -> None:
            wait_until(lambda: len(server._clients) > 0, timeout_s=WAIT_S, what="a viewer")
            server.stop()

        stopping = threading.Thread(target=stop_once_watched)
        stopping.start()
        arguments = ["top", "--address", address]
        assert cli.main(arguments) == 1, "the core's end is told, not waited out"
        stopping.join()
