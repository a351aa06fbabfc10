"""The launcher `ray`: each rank is started by an actor of a Ray cluster, on the actor's node.

`launcher` makes it in the core's process, and nothing else of an engine imports Ray, which finds
room, starts and ends. Plans and results never pass through it: they go over a TCP connection from
the core to each rank, as frames of `channel`.
"""

import logging
import math
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util import placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nanovllm.config import EngineConfig
from nanovllm.executor.channel import Channel, has_ended
from nanovllm.executor.launcher import Death
from nanovllm.executor.rank_process import (
    DEFAULT_ENVIRONMENT,
    LAST_WORDS_S,
    Seat,
    is_stopped,
    start_rank,
    what_became_of,
)
from nanovllm.executor.reception import KEY_S, Reception, connect
from nanovllm.executor.seats import Place, interface_of, passed_environment, seat_by_node
from nanovllm.protocol.plan import DeviceLostError, ProgressCallback

START_S = 120.0  # for all actors to start, and once more for their ranks to connect
LOOK_S = 0.1  # between two looks at what is waited for
FRESH_S = 0.5  # between two looks at whether a rank is stopped: more, and they are of two waits
GONE_S = 5.0  # for a rank to end that has been killed, or its host is out of reach


class RankAgent:
    """The actor: starts a rank on its node, and says what becomes of it. The rank ends with it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def place(self) -> tuple[str, str, list[str]]:
        """The fields of a `Place`."""
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return context.get_node_id(), ray.util.get_node_ip_address(), gpus

    def start(
        self,
        seat: tuple[int, int, int],
        config_json: str,
        core: tuple[str, int],
        keys: list[bytes],
        environment: dict[str, str],
    ) -> int:
        """Connect to the core, once with each key, and start the rank with these connections.

        seat: the fields of a `Seat`. environment: what is set for the rank. Returns its pid.
        """
        connections = [connect(core, key) for key in keys]
        own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        interface = interface_of(connections[0].getsockname()[0])
        found = {} if interface is None else {"GLOO_SOCKET_IFNAME": interface}
        found |= {} if interface is None else {"NCCL_SOCKET_IFNAME": interface}
        self._process = start_rank(
            Seat(*seat),
            config_json,
            [connection.fileno() for connection in connections],
            {**DEFAULT_ENVIRONMENT, **found, **own, **environment},
        )
        for connection in connections:
            connection.close()  # the rank's copies stay: their end is the rank's end
        return self._process.pid

    def is_stopped(self) -> bool:
        """Whether a signal has stopped the rank."""
        assert self._process is not None
        return is_stopped(self._process.pid)

    def what_became(self) -> Death:
        """Of the rank, whose channel has closed; its cause is the end of a sentence."""
        assert self._process is not None
        return what_became_of(self._process)


class RayLauncher:
    """An `executor.launcher.Launcher` that asks a running Ray cluster for room."""

    def __init__(self, config: EngineConfig, on_progress: ProgressCallback) -> None:
        self._config = config
        self._on_progress = on_progress
        self._size = config.parallel.num_ranks
        self._has_connected = False
        self._made: PlacementGroup | None = None
        self._agents: list[Any] = []

    def start(self) -> "Iterator[RayRank]":
        """All at once; ranks of a node have successive numbers, the core's node comes first."""
        self._connect()
        asked = self._asked_for()
        group, bundles = self._find_room(asked)
        self._agents = [
            ray.remote(RankAgent)
            .options(
                num_cpus=asked.get("CPU", 0),
                num_gpus=asked.get("GPU", 0),
                resources={name: 1 for name in asked if name not in ("CPU", "GPU")},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=bundle
                ),
            )
            .remote()
            for bundle in bundles
        ]
        asked_where = [agent.place.remote() for agent in self._agents]
        places = [Place(*place) for place in self._wait_for(asked_where, "their actors to start")]
        own_node = ray.get_runtime_context().get_node_id()
        seated = seat_by_node(places, own_node)
        yield from self._start_ranks([(self._agents[i], places[i], seat) for i, seat in seated])

    def _start_ranks(self, seated: list[tuple[Any, Place, Seat]]) -> "Iterator[RayRank]":
        config_json = msgspec.json.encode(self._config).decode()
        passed = passed_environment(os.environ)
        with Reception(ray.util.get_node_ip_address(), 2 * self._size) as reception:
            starting = []
            for agent, place, seat in seated:
                near = [other.gpus for _, other, _ in seated if other.node_id == place.node_id]
                visible = ",".join(gpu for gpus in near for gpu in gpus)
                starting.append(
                    agent.start.remote(
                        (seat.rank, seat.local_rank, seat.local_size),
                        config_json,
                        reception.address,
                        reception.keys[2 * seat.rank :][:2],
                        {**passed, "CUDA_VISIBLE_DEVICES": visible},
                    )
                )
            pids = self._wait_for(starting, "their processes to start")
            connections = reception.receive(time.monotonic() + KEY_S * (1 + 2 * self._size))
        for (agent, place, seat), pid in zip(seated, pids, strict=True):
            yield RayRank(seat.rank, place.host, pid, agent, *connections[2 * seat.rank :][:2])

    def close(self) -> None:
        """End the actors and free what was asked for, but for a group that was there before."""
        for agent in self._agents:
            ray.kill(agent)
        self._agents = []
        if self._made is not None:
            remove_placement_group(self._made)
            self._made = None
        if self._has_connected:
            ray.shutdown()
            self._has_connected = False

    def _connect(self) -> None:
        """To the cluster of RAY_ADDRESS, or that of this host. Raises `ValueError` if there is
        none."""
        if ray.is_initialized():
            return
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init("auto", log_to_driver=False, logging_level=logging.WARNING)
        except ConnectionError as error:
            raise ValueError(
                "distributed_executor_backend: no Ray cluster is found: start one by `ray start "
                f"--head`, or name one in RAY_ADDRESS ({first_line(error)})"
            ) from None
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)  # Ray sets its own, which drains nothing
        self._has_connected = True

    def _asked_for(self) -> dict[str, float]:
        """The resources of a rank: a GPU if the cluster has any and they may be used, else a CPU;
        and one of `ray_resource`, which is asked for in place of a CPU."""
        model, custom = self._config.model, self._config.parallel.ray_resource
        on_gpu = model.load_format != "synthetic" and (
            model.device == "cuda"
            or (model.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
        )
        asked: dict[str, float] = {"GPU": 1} if on_gpu else {}
        if custom is not None:
            asked[custom] = 1
        return asked or {"CPU": 1}

    def _find_room(self, asked: dict[str, float]) -> tuple[PlacementGroup, list[int]]:
        """A placement group and the bundles of it to use. Raises `ValueError` if there is too
        little of something, or others do not give it back in time."""
        if (named := self._config.parallel.ray_placement_group) is not None:
            return self._room_in(named, asked)
        self._made = placement_group([asked] * self._size, strategy="PACK")
        until = time.monotonic() + self._config.parallel.ray_placement_timeout
        while not self._made.wait(LOOK_S):
            self._on_progress("placement", 0.0)
            if time.monotonic() > until:
                raise ValueError(f"distributed_executor_backend: {self._too_little(asked)}")
        return self._made, list(range(self._size))

    def _room_in(self, named: str, asked: dict[str, float]) -> tuple[PlacementGroup, list[int]]:
        group = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(named)))
        bundles: dict[int, dict[str, float]] = placement_group_table(group).get("bundles", {})
        fitting = [
            index
            for index, bundle in sorted(bundles.items())
            if all(bundle.get(name, 0) >= amount for name, amount in asked.items())
        ]
        first = self._config.parallel.data_parallel_rank * self._size
        if len(fitting) < first + self._size:
            raise ValueError(
                f"ray_placement_group: {first + self._size} ranks need a bundle with "
                f"{in_words(asked)} each, and {named} has {len(fitting)} of {len(bundles)}: "
                "add bundles to it, use fewer ranks, or omit it, so that a group is made"
            )
        return group, fitting[first:][: self._size]

    def _too_little(self, asked: dict[str, float]) -> str:
        there, free = ray.cluster_resources(), ray.available_resources()
        found = [f"{there.get(name, 0):g} {name} ({free.get(name, 0):g} free)" for name in asked]
        num_nodes = sum(node["Alive"] for node in ray.nodes())
        return (
            f"{self._size} ranks need {in_words(asked)} each, and the Ray cluster has "
            f"{' and '.join(found)} on {num_nodes} node{'s' if num_nodes != 1 else ''}, after "
            f"{self._config.parallel.ray_placement_timeout:g} s (ray_placement_timeout): add nodes "
            "or use fewer ranks"
        )

    def _wait_for(self, calls: Sequence[Any], what: str) -> list[Any]:
        """What they return. Raises `DeviceLostError` if one fails, or all are not there in time."""
        left, until = list(calls), time.monotonic() + START_S
        try:
            while left:
                done, left = ray.wait(left, num_returns=len(left), timeout=LOOK_S)
                ray.get(done)
                self._on_progress("ray", 1 - len(left) / len(calls))
                if left and time.monotonic() > until:
                    raise DeviceLostError(
                        f"{len(left)} of {len(calls)} ranks are still waited for after "
                        f"{START_S:g} s: Ray was asked for {what}"
                    )
            return list(ray.get(list(calls)))
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            raise DeviceLostError(f"a rank could not be started: {first_line(cause)}") from error


class RayRank:
    """An `executor.launcher.StartedRank` on a node of the cluster."""

    def __init__(
        self,
        rank: int,
        host: str,
        pid: int,
        agent: Any,
        frames: socket.socket,
        lifeline: socket.socket,
    ) -> None:
        self.rank = rank
        self.host = host
        self.pid = pid
        self.channel = Channel(frames, lifeline)
        self._agent = agent
        self._lifeline = lifeline
        self._asked: Any = None  # whether it is stopped, not answered yet
        self._looked_at = -math.inf
        self._has_ended = False

    @property
    def is_stopped(self) -> bool:
        """What its actor has said of it since the last look, which is asked once more. What was
        said in an earlier wait is of that time."""
        looked_at, self._looked_at = self._looked_at, time.monotonic()
        if self._looked_at - looked_at > FRESH_S:
            self._asked = None
        answered = False
        if self._asked is not None:
            if not ray.wait([self._asked], timeout=0)[0]:
                return False
            try:
                answered = ray.get(self._asked)
            except RayError:  # its actor has died, and the rank with it: its channel tells
                return False
        self._asked = self._agent.is_stopped.remote()
        return answered

    def cause_of_death(self) -> Death:
        """Its channel has been closed."""
        if self.channel.is_out_of_reach:  # and so is its actor
            return Death(f"{self} is out of reach: its host does not answer", True)
        try:
            death: Death = ray.get(self._agent.what_became.remote(), timeout=LAST_WORDS_S)
            return death._replace(cause=f"{self} {death.cause}")
        except RayActorError:
            return Death(f"{self} has ended with its Ray actor, which has died", True)
        except GetTimeoutError:
            return Death(f"{self} does not answer any more, nor does its Ray actor", True)

    def kill(self) -> None:
        """By its actor's end, with which it ends. Safe to call twice."""
        ray.kill(self._agent)

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, within that time: its system closes its connections then."""
        until = time.monotonic() + timeout_s
        ready = select.poll()
        ready.register(self._lifeline, select.POLLIN)
        while not self._has_ended and ready.poll(max(0.0, until - time.monotonic()) * 1e3):
            self._has_ended = has_ended(self._lifeline)  # else it had an answer to give
        return self._has_ended

    def end(self, timeout_s: float) -> None:
        """Kill it, unless it ends by itself in that time, and close its channel. Safe to call
        twice."""
        if not self.wait(timeout_s):
            self.kill()
            self.wait(GONE_S)
        self._has_ended = True
        self.channel.close()

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


def in_words(resources: dict[str, float]) -> str:
    """As in "1 GPU and 1 rack"."""
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
