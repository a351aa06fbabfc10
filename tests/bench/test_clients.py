"""A load test with real processes, small: what was asked for is what is reported."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanovllm.bench import clients as clients_module
from nanovllm.bench.clients import clients, cpu_seconds, listening_pid, memory_mib
from nanovllm.bench.load import ClientsLoad
from tests.waiting import WAIT_S

SYNTHETIC: dict[str, Any] = {"model": "synthetic", "load_format": "synthetic", "step_ms": 2.0}


def test_an_open_loop_with_its_figures_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output, picture = tmp_path / "out.json", tmp_path / "out.png"
    load = ClientsLoad(
        clients=2,
        rate=40.0,
        duration=1.0,
        output_len=20,
        shared_prefix=1.0,
        output=str(output),
        plot=str(picture),
    )
    text = clients(load, dict(SYNTHETIC))
    found = json.loads(output.read_text())
    assert f"2 clients, 40 requests/s for 1 s: {found['overall']['num_requests']} requests" in text
    assert found["overall"]["num_errors"] == 0 and found["errors"] == []
    assert 15 < found["overall"]["num_requests"] < 80
    assert sum(one["num_requests"] for one in found["clients"]) == found["overall"]["num_requests"]
    for name in ("ttft_ms", "inter_token_ms", "e2e_ms"):
        spread = found["overall"][name]
        assert 0 < spread["p50"] <= spread["p90"] <= spread["p99"] <= spread["max"]
    assert found["overall"]["e2e_ms"]["p50"] > 15, "ten steps at the least, of 2 ms each"
    assert found["core"]["num_steps"] >= load.output_len and found["core"]["prefix_hit_share"] > 0.1
    assert 10 < found["core"]["peak_memory_mib"] < 1000 and found["core"]["cpu_share"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_closed_loop_keeps_its_streams_going() -> None:
    load = ClientsLoad(clients=1, streams=3, duration=0.6, input_len=8, output_len=30)
    text = clients(load, dict(SYNTHETIC))
    assert "1 clients, 3 streams each for 0.6 s" in text and "0 errors" in text


def test_more_than_can_be_done_is_refused_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients_module, "DRAIN_S", 0.0)
    load = ClientsLoad(clients=1, rate=50.0, duration=0.2, output_len=1000, length_spread=0.0)
    with pytest.raises(ValueError, match="rate: the core was not done"):
        clients(load, SYNTHETIC | {"step_ms": 50.0})


def test_a_standalone_core_is_watched_as_well(tmp_path: Path) -> None:
    address, output = f"ipc://{tmp_path}/core.sock", tmp_path / "out.json"
    command = [sys.executable, "-m", "nanovllm.launch", "--address", address]
    for name, value in SYNTHETIC.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    core = subprocess.Popen(command)
    try:
        load = ClientsLoad(
            clients=2, rate=20.0, duration=0.6, output_len=20, connect=address, output=str(output)
        )
        text = clients(load, {})
        assert core.poll() is None, "it outlives its clients"
    finally:
        core.terminate()
        assert core.wait(WAIT_S) == 0
    found = json.loads(output.read_text())
    assert found["overall"]["num_errors"] == 0 and 0.5 <= found["fairness"] <= 1
    watched = found["core"]
    assert watched["peak_memory_mib"] > 10
    assert 0 < watched["messaging_share"] < watched["loop_share"] < 1
    assert f"messaging {watched['messaging_share']:.0%}" in text


@pytest.mark.model
def test_a_real_model_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    load = ClientsLoad(clients=2, rate=4.0, duration=1.0, input_len=16, output_len=6)
    text = clients(load, {"model": "smollm2", "max_model_len": 256})
    assert " 0 errors" in text and "peak memory" in text


def test_a_running_core_has_settings_of_its_own() -> None:
    with pytest.raises(ValueError, match=r"--step-ms: the core at ipc:///x has its own settings"):
        clients(ClientsLoad(connect="ipc:///x"), {"step_ms": 1.0, "on_progress": None})


def test_a_process_and_what_it_uses(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        assert listening_pid(f"ipc://{path}") == os.getpid()
    assert listening_pid("tcp://127.0.0.1:1") is None
    assert cpu_seconds(os.getpid()) > 0
    assert memory_mib(os.getpid(), "VmHWM") >= memory_mib(os.getpid(), "VmRSS") - 1 > 5
    with pytest.raises(ValueError, match="no VmNothing"):
        memory_mib(os.getpid(), "VmNothing")
