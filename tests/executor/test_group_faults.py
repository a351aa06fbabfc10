"""Ranks that die, stop or raise, wherever they are: the group ends of it with the cause, or waits.

They load no model (`executor.synthetic`), so that each starts in a moment.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from nanovllm.executor.group import GroupExecutor
from nanovllm.executor.synthetic import SyntheticExecutor
from nanovllm.protocol.plan import DeviceLostError, StepResult
from tests.e2e.processes import alive, rank_children, wait_until
from tests.executor.test_group import begin, config_of
from tests.waiting import WAIT_S
from tests.worker.planning import make_plan, new_row, run_step


def synthetic(step_ms: float = 1.0, size: int = 2) -> GroupExecutor:
    return GroupExecutor(
        config_of("synthetic", size, load_format="synthetic", step_ms=step_ms), lambda *_: None
    )


def pids_of(group: GroupExecutor) -> list[int]:
    return [rank.process.pid for rank in group._ranks]


@pytest.fixture
def group() -> Iterator[GroupExecutor]:
    """Its steps take 0.3 s."""
    group = synthetic(step_ms=300.0)
    begin(group)
    pids = pids_of(group)
    yield group
    group.shutdown()
    assert not any(map(alive, pids)), "an orphan"


PLAN = make_plan(0, [(1, 0, 3)], new_rows=[new_row(1, [5, 6, 7])])


def test_a_step_of_a_group(group: GroupExecutor) -> None:
    alone = SyntheticExecutor(config_of("synthetic", load_format="synthetic"), lambda *_: None)
    expected = run_step(alone, PLAN).result()
    assert run_step(group, PLAN).result() == StepResult(0, expected.token_ids)
    assert not group.warm_up()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_in_a_step_ends_the_group_with_its_cause(
    group: GroupExecutor, victim: int
) -> None:
    ranks = pids_of(group)
    step = run_step(group, PLAN)
    killed_at = time.monotonic()
    os.kill(ranks[victim], signal.SIGKILL)
    with pytest.raises(DeviceLostError, match=rf"rank {victim} .*SIGKILL"):
        step.result()
    assert time.monotonic() - killed_at < WAIT_S
    assert not any(map(alive, ranks))
    with pytest.raises(DeviceLostError, match=rf"rank {victim} "):
        group.submit(PLAN)


def test_a_rank_killed_between_steps_is_noticed_by_the_next(group: GroupExecutor) -> None:
    os.kill(pids_of(group)[1], signal.SIGKILL)
    with pytest.raises(DeviceLostError, match=r"rank 1 .*SIGKILL"):
        run_step(group, PLAN).result()


def test_a_rank_that_raises_ends_the_group_with_what_it_raised(group: GroupExecutor) -> None:
    with pytest.raises(DeviceLostError, match=r"rank \d .*IndexError"):
        run_step(group, make_plan(0, [(99, 0, 1)], new_rows=[new_row(99, [5])])).result()


def test_a_stopped_rank_is_told_of_and_waited_for(
    group: GroupExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    stopped = pids_of(group)[0]
    os.kill(stopped, signal.SIGSTOP)
    step = run_step(group, PLAN)
    waker = subprocess.Popen(["sh", "-c", f"sleep 2; kill -CONT {stopped}"])
    assert len(step.result().token_ids) == 1
    waker.wait()
    assert f"rank 0 (pid {stopped}), stopped by a signal" in caplog.text


def test_a_rank_killed_at_its_start_ends_the_start() -> None:
    group = synthetic()

    def kill(phase: str, progress: float) -> None:
        os.kill(pids_of(group)[1], signal.SIGKILL)

    group._on_progress = kill
    with pytest.raises(DeviceLostError, match=r"rank 1 .*SIGKILL"):
        begin(group)  # its start may just have ended
    pids = pids_of(group)
    group.shutdown()
    assert not any(map(alive, pids))


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
