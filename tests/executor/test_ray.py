"""Ranks on a Ray cluster of two nodes, both of this machine, each with room for one rank."""

import asyncio
import importlib.util
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from nanovllm.executor import group as group_module
from nanovllm.executor.group import GroupExecutor
from nanovllm.executor.inline import inline_executor
from nanovllm.protocol.plan import DeviceLostError
from nanovllm.sampling_params import SamplingParams
from tests.e2e.processes import alive, ranks_with, wait_until
from tests.e2e.test_replicas import all_ids, all_running, engine, undisturbed_ids
from tests.executor.test_group import begin, config_of
from tests.executor.test_group_faults import PLAN, Wakes
from tests.executor.test_inline import generate
from tests.waiting import WAIT_S
from tests.worker.planning import new_row, run_step

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="Ray is not installed (pip install 'nanovllm[ray]', 240 MB)",
)
FRESH_S = 0.5  # `ray_launcher`'s
SEAT = "seat"  # a resource of which each node has one
ON_RAY: dict[str, Any] = {
    "distributed_executor_backend": "ray",
    "ray_resource": SEAT,
    "ray_placement_timeout": WAIT_S,
}
NODE = {"num_cpus": 1, "num_gpus": 0, "resources": {SEAT: 1}, "object_store_memory": 80_000_000}


class TwoNodes:
    """The cluster. Its second node can be killed and comes back."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(True, head_node_args={**NODE, "include_dashboard": False})
        self.address: str = self._cluster.address
        self._second = self._cluster.add_node(**NODE)

    def kill_second(self) -> None:
        self._cluster.remove_node(self._second, allow_graceful=False)

    def add_second(self) -> None:
        self._second = self._cluster.add_node(**NODE)

    def end(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    with pytest.MonkeyPatch.context() as patch:
        place = tempfile.mkdtemp(prefix="nv")  # a short name, as that of a socket has to be
        patch.setenv("RAY_TMPDIR", place)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        nodes = TwoNodes()
        patch.setenv("RAY_ADDRESS", nodes.address)
        yield nodes
        nodes.end()
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def on_ray(nodes: TwoNodes) -> Iterator[Callable[..., GroupExecutor]]:
    """Makes groups of two ranks, and sees to it that nothing of them is left."""
    import ray
    from ray.util import placement_group_table

    groups: list[GroupExecutor] = []

    def make(model: str = "synthetic", size: int = 2, **settings: Any) -> GroupExecutor:
        if model == "synthetic":
            settings["load_format"] = "synthetic"
        groups.append(GroupExecutor(config_of(model, size, **ON_RAY | settings), lambda *_: None))
        return groups[-1]

    yield make
    for group in groups:
        group.shutdown()
    wait_until(lambda: not ranks_with("RAY_TMPDIR"), timeout_s=WAIT_S, what="ranks end")
    assert not ray.is_initialized()
    ray.init("auto", log_to_driver=False)
    try:
        wait_until(
            lambda: all(one["state"] == "REMOVED" for one in placement_group_table().values()),
            timeout_s=WAIT_S,
            what="placement groups are removed",
        )
    finally:
        ray.shutdown()


ENDLESS = 1e6  # ms: no step ends before its group


def test_ids_of_one_rank(
    on_ray: Callable[..., GroupExecutor], tiny_checkpoint: Callable[[str], Path]
) -> None:
    """A real model; its ranks are on different nodes, and meet by TCP."""
    model = str(tiny_checkpoint("qwen3"))
    alone, group = inline_executor(config_of(model), lambda *_: None), on_ray(model)
    before = signal.getsignal(signal.SIGTERM)
    answers = []
    for executor in (alone, group):
        begin(executor)
        params = SamplingParams(temperature=0.9)
        row = new_row(0, [5, 9, 77, 31, 4], params, seed=3)
        answers.append(generate(executor, row, chunk=3, num_outputs=10))
    assert answers[0] == answers[1]
    assert signal.getsignal(signal.SIGTERM) is before
    import ray

    agents = [rank._agent for rank in group._ranks]  # type: ignore[attr-defined]
    places = ray.get([agent.place.remote() for agent in agents])
    assert len({node_id for node_id, *_ in places}) == 2
    assert places[0][0] == ray.get_runtime_context().get_node_id()
    alone.shutdown()


@pytest.mark.parametrize("how", ["rank", "actor"])
def test_who_dies_in_a_step_ends_the_group_with_its_cause(
    how: str, on_ray: Callable[..., GroupExecutor]
) -> None:
    import ray

    group = on_ray(step_ms=ENDLESS)
    begin(group)
    victim: Any = group._ranks[1]
    step = run_step(group, PLAN)
    killed_at = time.monotonic()
    if how == "rank":
        os.kill(victim.pid, signal.SIGKILL)
    else:
        ray.kill(victim._agent)
    words = {"rank": "was killed by SIGKILL", "actor": "has ended with its Ray actor"}[how]
    with pytest.raises(DeviceLostError, match=rf"rank 1 \(pid {victim.pid} on .*\) {words}"):
        step.result()
    assert time.monotonic() - killed_at < WAIT_S
    wait_until(
        lambda: not any(alive(rank.pid) for rank in group._ranks),  # type: ignore[attr-defined]
        timeout_s=WAIT_S,
        what="all ranks end",
    )


def test_a_stopped_rank_is_told_of_and_waited_for(
    on_ray: Callable[..., GroupExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever it is, and whichever was before."""
    monkeypatch.setattr(group_module, "TELL_STOPPED_AFTER_S", 2 * FRESH_S)
    group = on_ray()
    begin(group)
    ranks: list[Any] = list(group._ranks)
    wakes = Wakes(lambda: [rank.pid for rank in ranks])
    group_module.LOG.addHandler(wakes)
    try:
        for step, stopped in enumerate(ranks):
            os.kill(stopped.pid, signal.SIGSTOP)
            plan = replace(PLAN, step=step)
            assert len(run_step(group, plan).result().token_ids) == 1
            assert wakes.told == [f"step {step} waits for {stopped}, stopped by a signal"]
            wakes.told.clear()
    finally:
        group_module.LOG.removeHandler(wakes)


def test_too_little_room_is_told_with_what_there_is(
    on_ray: Callable[..., GroupExecutor],
) -> None:
    group = on_ray(size=3, ray_placement_timeout=0.0)
    with pytest.raises(ValueError, match=r"3 ranks need 1 seat each, .* 2 seat .* on 2 nodes"):
        group.start()


def ids_by_two_ranks() -> list[list[int]]:
    """By an engine of the task that this is."""

    async def ids() -> list[list[int]]:
        async with engine(tensor_parallel_size=2, step_ms=0.1, **ON_RAY) as llm:
            return await all_ids(llm)

    return asyncio.run(ids())


async def test_the_placement_group_of_a_program_is_used_and_kept(
    on_ray: Callable[..., GroupExecutor],
) -> None:
    import ray
    from ray.util import placement_group, placement_group_table, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ray.init("auto", log_to_driver=False)
    try:
        room = placement_group([{"CPU": 1}, {SEAT: 1}, {SEAT: 1}], strategy="PACK")
        small = placement_group([{"CPU": 1}])
        assert small.wait(WAIT_S) and room.wait(WAIT_S)
        with pytest.raises(ValueError, match=r"ray_placement_group: 2 .* 1 seat .* 0 of 1: add"):
            on_ray(ray_placement_group=small.id.hex()).start()
        remove_placement_group(small)
        inside = PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=0)
        task = ray.remote(ids_by_two_ranks).options(num_cpus=1, scheduling_strategy=inside)
        assert ray.get(task.remote(), timeout=WAIT_S) == await undisturbed_ids()
        assert placement_group_table(room)["state"] == "CREATED"
        remove_placement_group(room)
    finally:
        ray.shutdown()


async def test_a_node_dies_amid_streams_which_resume_when_it_is_back(
    nodes: TwoNodes, on_ray: Callable[..., GroupExecutor]
) -> None:
    expected = await undisturbed_ids()
    async with engine(tensor_parallel_size=2, **ON_RAY) as llm:
        ranks = ranks_with("RAY_TMPDIR")
        assert len(ranks) == 2
        streams = asyncio.create_task(all_ids(llm))
        await all_running(llm)
        nodes.kill_second()
        nodes.add_second()
        assert await streams == expected
        assert not set(ranks) & set(ranks_with("RAY_TMPDIR"))


async def test_replicas_run_where_there_is_room(on_ray: Callable[..., GroupExecutor]) -> None:
    """Each is a core here and a rank there; one whose rank dies loses nothing."""
    expected = await undisturbed_ids()
    settings = {**ON_RAY, "distributed_executor_backend": "mp", "data_parallel_backend": "ray"}
    async with engine(data_parallel_size=2, **settings) as llm:
        ranks = ranks_with("RAY_TMPDIR")
        assert len(ranks) == 2
        streams = asyncio.create_task(all_ids(llm))
        await all_running(llm)
        os.kill(ranks[0], signal.SIGKILL)
        assert await streams == expected


def test_no_cluster_is_a_mistake_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def find_none(*_: object, **__: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", find_none)
    group = GroupExecutor(config_of("synthetic", 2, load_format="synthetic", **ON_RAY), print)
    with pytest.raises(ValueError, match=r"no Ray cluster is found: start one by `ray start --he"):
        group.start()
    group.shutdown()
