"""Cores as processes of their own: what each is told, which GPUs it sees, and how it is ended."""

import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm.config import EngineConfig
from nanovllm.frontend import core_process
from nanovllm.frontend.core_process import CoreHandle, start_core, start_cores, visible_gpus
from tests.waiting import WAIT_S

# A core that writes down what it was told, and ends when its owner does, at a signal, or never.
STAND_IN = """
import json, os, pathlib, signal, socket, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
how = os.environ["HOW"]
if how != "polite":
    signal.signal(signal.SIGTERM, signal.SIG_DFL if how == "told" else signal.SIG_IGN)
file = pathlib.Path(os.environ["TOLD"])
file.with_suffix(".new").write_text(json.dumps([options, os.environ.get("EXTRA", "")]))
file.with_suffix(".new").rename(file)
with socket.socket(fileno=int(options["--owner-fd"])) as pipe:
    while pipe.recv(1):
        pass
    if how != "polite":
        signal.pause()
        signal.pause()
"""
CPU = EngineConfig.from_kwargs(device="cpu")


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where stand-ins write, which from here on are started."""
    path = tmp_path / "told"
    monkeypatch.setattr(core_process, "PROGRAM", ["-c", STAND_IN])
    monkeypatch.setenv("TOLD", str(path))
    return path


def begun(path: Path) -> str:
    deadline = time.monotonic() + WAIT_S
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return path.read_text()


@pytest.mark.parametrize(("how", "code"), [("polite", 0), ("told", -15), ("stubborn", -9)])
def test_a_core_is_ended_as_gently_as_it_lets_itself_be(
    told: Path, monkeypatch: pytest.MonkeyPatch, how: str, code: int
) -> None:
    monkeypatch.setenv("HOW", how)
    handle = start_core(CPU)
    assert handle.address.startswith("ipc:///") and '"--address": "' + handle.address in begun(told)
    assert '"--config-json": "{' in told.read_text()
    directory = Path(handle.address.removeprefix("ipc://")).parent
    assert directory.stat().st_mode & 0o777 == 0o700
    assert handle.end(timeout_s=WAIT_S if how == "polite" else 0.4) == code
    assert directory.exists(), "it may be started again"
    assert handle.close() == code and not directory.exists()
    assert handle.close() == code, "once more, and whoever else has tidied up"


def test_it_is_started_again_as_it_was(
    told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOW", "polite")
    address = f"ipc://{tmp_path}/core.sock"
    handle = start_core(CPU, address=address, variables={"EXTRA": "more"})
    first, process = begun(told), handle.process
    assert address in first and first.endswith('"more"]')
    with pytest.raises(AssertionError, match="end"):
        handle.restart()
    assert handle.end() == 0
    told.unlink()
    handle.restart()
    assert begun(told).endswith('"more"]') and handle.process.pid != process.pid
    assert handle.close() == 0 and tmp_path.exists()


def config(**fields: Any) -> EngineConfig:
    return EngineConfig.from_kwargs(model="m", **fields)


def test_which_gpus_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,,5")
    assert visible_gpus(config()) == ["3", "5"]
    assert visible_gpus(config(device="cpu")) == visible_gpus(config(load_format="synthetic")) == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    there = SimpleNamespace(glob=lambda pattern: ["/dev/nvidia0", "/dev/nvidia7"])
    monkeypatch.setattr(core_process, "Path", lambda path: there)
    assert visible_gpus(config()) == ["0", "1"], "as CUDA counts them"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The cores that would have been started, by what they were given."""
    found: list[dict[str, Any]] = []

    def start(config: EngineConfig, **given: Any) -> CoreHandle:
        found.append({"config": config, **given})
        return SimpleNamespace()  # type: ignore[return-value]

    monkeypatch.setattr(core_process, "start_core", start)
    return found


def test_each_replica_has_gpus_of_its_own(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7,9")
    assert len(start_cores(config(data_parallel_size=2, tensor_parallel_size=2))) == 2
    shares = [one["variables"] for one in started]
    assert shares == [{"CUDA_VISIBLE_DEVICES": "3,5"}, {"CUDA_VISIBLE_DEVICES": "7,9"}]
    with pytest.raises(ValueError, match="3 replicas of 2 ranks need 6 GPUs, and 4 are visible: "):
        start_cores(config(data_parallel_size=3, tensor_parallel_size=2))
    assert len(start_cores(config(data_parallel_size=2, device="cpu"))) == 2
    assert [one["variables"] for one in started[2:]] == [{}, {}]
    start_cores(config())
    assert "variables" not in started[4], "one alone sees all"


def test_replicas_on_a_cluster_are_told_where_it_is(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = SimpleNamespace(id=SimpleNamespace(hex=lambda: "ab"))
    ray = SimpleNamespace(
        is_initialized=lambda: True,
        get_runtime_context=lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"),
        util=SimpleNamespace(get_current_placement_group=lambda: group),
    )
    on_ray = config(data_parallel_size=2, distributed_executor_backend="ray")
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    start_cores(on_ray)
    monkeypatch.setitem(sys.modules, "ray", ray)
    start_cores(on_ray)
    named = config(distributed_executor_backend="ray", ray_placement_group="ff")
    start_cores(named)
    ray.is_initialized = lambda: False
    start_cores(on_ray)
    parallel = [one["config"].parallel for one in started]
    assert [one.data_parallel_rank for one in parallel] == [0, 1, 0, 1, 0, 0, 1]
    groups = [one.ray_placement_group for one in parallel]
    assert groups == [None, None, "ab", "ab", "ff", None, None]
    told = {"RAY_ADDRESS": "10.0.0.1:6379"}
    assert [one["variables"] for one in started] == [{}, {}, told, told, told, {}, {}]


@pytest.mark.parametrize(
    ("num_stubborn", "expected"),
    [
        (0, ["wait 5", "wait"]),
        (1, ["wait 5", "terminate", "wait 5", "wait"]),
        (2, ["wait 5", "terminate", "wait 5", "kill", "wait"]),
    ],
)
def test_a_core_has_half_the_time_for_each_way_to_end(
    num_stubborn: int, expected: list[str]
) -> None:
    done: list[str] = []

    def wait(timeout_s: float | None = None) -> int:
        done.append("wait" if timeout_s is None else f"wait {timeout_s:g}")
        if timeout_s is not None and len(done) <= 2 * num_stubborn:
            raise subprocess.TimeoutExpired("core", timeout_s)
        return 7

    process: Any = SimpleNamespace(
        wait=wait, terminate=lambda: done.append("terminate"), kill=lambda: done.append("kill")
    )
    ours, cores = socket.socketpair()
    with cores:
        assert CoreHandle(CPU, "ipc:///x", process, ours).end() == 7
        assert done == expected and cores.recv(1) == b"", "its owner has let go"
