"""Ranks that die, stop or raise, wherever they are: the group ends of it with the cause, or waits.

They load no model (`executor.synthetic`), so that each starts in a moment.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from nanovllm.config import EngineConfig
from nanovllm.executor import group as group_module
from nanovllm.executor.group import GroupExecutor
from nanovllm.executor.rank_process import RankProcess
from nanovllm.executor.synthetic import SyntheticExecutor
from nanovllm.protocol.plan import DeviceLostError, StepResult
from tests.e2e.processes import alive, rank_children, wait_until
from tests.executor.test_group import begin, config_of
from tests.waiting import WAIT_S
from tests.worker.planning import make_plan, new_row, run_step


def synthetic(step_ms: float = 1.0, size: int = 2, **settings: Any) -> GroupExecutor:
    settings |= {"load_format": "synthetic", "step_ms": step_ms}
    return GroupExecutor(config_of("synthetic", size, **settings), lambda *_: None)


def pids_of(group: GroupExecutor) -> list[int]:
    return [rank.process.pid for rank in group._ranks]


@pytest.fixture(params=[1.0])
def group(request: pytest.FixtureRequest) -> Iterator[GroupExecutor]:
    """Its steps take a millisecond, unless a test says otherwise."""
    group = synthetic(step_ms=request.param)
    begin(group)
    pids = pids_of(group)
    yield group
    group.shutdown()
    assert not any(map(alive, pids)), "an orphan"


ENDLESS = pytest.mark.parametrize("group", [1e6], indirect=True)  # no step ends before its group
PLAN = make_plan(0, [(1, 0, 3)], new_rows=[new_row(1, [5, 6, 7])])


def test_a_step_of_a_group(group: GroupExecutor) -> None:
    alone = SyntheticExecutor(config_of("synthetic", load_format="synthetic"), lambda *_: None)
    expected = run_step(alone, PLAN).result()
    assert run_step(group, PLAN).result() == StepResult(0, expected.token_ids)
    assert not group.warm_up()


@ENDLESS
@pytest.mark.parametrize(
    ("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSEGV)]
)
def test_a_rank_killed_in_a_step_ends_the_group_with_its_cause(
    group: GroupExecutor, victim: int, number: signal.Signals
) -> None:
    ranks = pids_of(group)
    step = run_step(group, PLAN)
    killed_at = time.monotonic()
    os.kill(ranks[victim], number)
    with pytest.raises(DeviceLostError, match=rf"rank {victim} .*{number.name}") as raised:
        step.result()
    assert raised.value.from_outside is (number == signal.SIGKILL), "a step may fault by itself"
    assert time.monotonic() - killed_at < WAIT_S
    assert not any(map(alive, ranks))
    with pytest.raises(DeviceLostError, match=rf"rank {victim} "):
        group.submit(PLAN)


@ENDLESS
def test_a_rank_killed_between_steps_is_noticed_by_the_next(group: GroupExecutor) -> None:
    os.kill(pids_of(group)[1], signal.SIGKILL)
    with pytest.raises(DeviceLostError, match=r"rank 1 .*SIGKILL"):
        run_step(group, PLAN).result()


def test_a_rank_killed_between_steps_is_noticed_by_who_checks(group: GroupExecutor) -> None:
    group.check()
    assert run_step(group, PLAN).result() == StepResult(0, ANY)
    group.check()
    os.kill(pids_of(group)[1], signal.SIGKILL)
    with pytest.raises(DeviceLostError, match=r"rank 1 .*SIGKILL"):
        wait_until(lambda: group.check(), timeout_s=WAIT_S, what="the group ends")
    with pytest.raises(DeviceLostError, match=r"rank 1 "):
        group.check()


def test_a_rank_that_raises_ends_the_group_with_what_it_raised(group: GroupExecutor) -> None:
    with pytest.raises(DeviceLostError, match=r"rank \d .*IndexError"):
        run_step(group, make_plan(0, [(99, 0, 1)], new_rows=[new_row(99, [5])])).result()


class Wakes(logging.Handler):
    """Lets ranks that a signal has stopped go on as soon as the group tells of them."""

    def __init__(self, pids: Callable[[], list[int]]) -> None:
        super().__init__()
        self._pids = pids
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())
        for pid in self._pids():
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("when", ["start", "warm-up", "step"])
def test_a_stopped_rank_is_told_of_and_waited_for(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_module, "TELL_STOPPED_AFTER_S", 0.1)
    group = synthetic()
    wakes = Wakes(lambda: pids_of(group))
    group_module.LOG.addHandler(wakes)
    try:
        if when == "start":
            sends_at_birth(monkeypatch, 1, signal.SIGSTOP)
        begin(group)
        stopped = pids_of(group)[1 if when != "step" else 0]
        if when != "start":
            os.kill(stopped, signal.SIGSTOP)
        if when == "warm-up":
            assert not group.warm_up()
        assert len(run_step(group, PLAN).result().token_ids) == 1
    finally:
        group_module.LOG.removeHandler(wakes)
        group.shutdown()
    waiting = {"start": "the start", "step": "step 0"}.get(when, when)
    rank = 1 if when != "step" else 0
    assert f"{waiting} waits for rank {rank} (pid {stopped}), stopped by a signal" in wakes.told


def test_each_stopped_rank_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is stopped while another is waited for."""
    monkeypatch.setattr(group_module, "TELL_STOPPED_AFTER_S", 0.1)
    group = synthetic()
    told: list[str] = []

    class StopsTheOther(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())
            first, second = pids_of(group)
            if len(told) == 1:
                os.kill(second, signal.SIGSTOP)
            else:
                for pid in (first, second):
                    os.kill(pid, signal.SIGCONT)

    handler = StopsTheOther()
    group_module.LOG.addHandler(handler)
    try:
        begin(group)
        ranks = [str(rank) for rank in group._ranks]
        os.kill(pids_of(group)[0], signal.SIGSTOP)
        assert len(run_step(group, PLAN).result().token_ids) == 1
    finally:
        group_module.LOG.removeHandler(handler)
        group.shutdown()
    assert told == [f"step 0 waits for {rank}, stopped by a signal" for rank in ranks]


def sends_at_birth(monkeypatch: pytest.MonkeyPatch, victim: int, sent: signal.Signals) -> None:
    """Have one rank get a signal before it can do anything."""
    spawn = RankProcess.spawn

    def spawn_and_send(config: EngineConfig, rank: int) -> RankProcess:
        started = spawn(config, rank)
        if rank == victim:
            started.process.send_signal(sent)
        return started

    monkeypatch.setattr(RankProcess, "spawn", spawn_and_send)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_at_its_start_ends_the_start(
    victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sends_at_birth(monkeypatch, victim, signal.SIGKILL)
    group = synthetic()
    with pytest.raises(DeviceLostError, match=rf"rank {victim} .*SIGKILL"):
        group.start()
    pids = pids_of(group)
    group.shutdown()
    assert not any(map(alive, pids))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_in_warm_up(victim: int) -> None:
    group = synthetic()
    begin(group)
    pids = pids_of(group)
    os.kill(pids[victim], signal.SIGKILL)
    with pytest.raises(DeviceLostError, match=rf"rank {victim} .*SIGKILL"):
        group.warm_up()
    group.shutdown()
    assert not any(map(alive, pids))


@pytest.mark.parametrize("where", ["start", "warm_up"])
def test_ranks_that_raise_before_any_step(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks import what Python imports first of all, and find this."""
    (tmp_path / "sitecustomize.py").write_text(
        "from nanovllm.executor.synthetic import SyntheticExecutor\n"
        "def fail(executor): raise LookupError('no such device')\n"
        f"SyntheticExecutor.{where} = fail\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    group = synthetic()
    with pytest.raises(DeviceLostError, match=r"rank \d .*LookupError: no such device"):
        begin(group)
        group.warm_up()
    pids = pids_of(group)
    group.shutdown()
    assert not any(map(alive, pids))


@pytest.mark.parametrize("stages", [1, 2])
def test_ranks_that_have_different_ids_end_the_group(
    stages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one takes a token for another: its own, or of the stages the last one's."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "from nanovllm.executor.synthetic import SyntheticExecutor\n"
        "begun = SyntheticExecutor.ids_begun\n"
        "mistake = '1' == sys.orig_argv[sys.orig_argv.index('--rank') + 1]\n"
        "SyntheticExecutor.ids_begun = lambda *all: [one + mistake for one in begun(*all)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    group = synthetic(size=2 // stages, pipeline_parallel_size=stages)
    try:
        begin(group)
        with pytest.raises(DeviceLostError, match="ranks have different ids in step 0"):
            run_step(group, PLAN).result()
    finally:
        group.shutdown()


@pytest.mark.parametrize("stops_first", [False, True])
def test_ranks_end_with_their_owner(stops_first: bool) -> None:
    """Also one that a signal has stopped."""
    program = (
        "import sys, time; from tests.executor.test_group_faults import begin, synthetic\n"
        "group = synthetic(); begin(group); print('ready', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"ready\n"
    ranks = rank_children(owner.pid)
    assert len(ranks) == 2
    if stops_first:
        os.kill(ranks[1], signal.SIGSTOP)
    owner.kill()
    with owner:
        pass
    wait_until(lambda: not any(map(alive, ranks)), timeout_s=WAIT_S, what="ranks end")


def test_a_plan_larger_than_any_buffer_arrives(group: GroupExecutor) -> None:
    token_ids = list(range(3, 60)) * 20_000
    plan = make_plan(0, [(1, 0, 3)], new_rows=[new_row(1, token_ids, block_ids=[1])])
    assert len(run_step(group, plan).result().token_ids) == 1
