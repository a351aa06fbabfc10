"""Kernels compile beside other work: what is skipped, what is waited for, what fails."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanovllm.worker.kernels.compile_ahead import UNLAUNCHED, CompileAhead

WAIT_S = 10.0
ROOT = Path(__file__).parents[2]


@pytest.fixture
def ahead() -> Iterator[CompileAhead]:
    with CompileAhead(torch.device("cpu")) as ahead:
        yield ahead


def test_a_launch_of_what_is_not_compiled_does_nothing(ahead: CompileAhead) -> None:
    go_on, entered = threading.Event(), []
    kernel = SimpleNamespace(run=None)

    def compile_slowly() -> SimpleNamespace:
        assert go_on.wait(WAIT_S)
        return kernel

    for _ in range(3):  # a kernel launched again while it compiles is not compiled again
        stand_in = ahead.submit("key", compile_slowly, entered.append)
        assert stand_in is UNLAUNCHED and stand_in.result().run(1, 2, 3) is None
    assert entered == []
    go_on.set()
    seen: list[float] = []
    ahead.wait(lambda phase, progress: seen.append(progress))
    assert entered == [kernel] and seen[-1] == 1.0


def test_what_a_compilation_raises_reaches_who_waits(ahead: CompileAhead) -> None:
    def fail() -> None:
        raise RuntimeError("ptxas died")

    ahead.submit("bad", fail, lambda _: None)
    with pytest.raises(RuntimeError, match="ptxas died"):
        ahead.wait(lambda phase, progress: None)


def test_leaving_early_drops_what_has_not_begun() -> None:
    go_on, entered = threading.Event(), []
    with CompileAhead(torch.device("cpu")) as ahead:
        for number in range(100):
            ahead.submit(
                str(number), lambda: go_on.wait(WAIT_S) and SimpleNamespace(run=0), entered.append
            )
    go_on.set()
    ahead._pool.shutdown(wait=True)
    assert len(entered) <= ahead._pool._max_workers


OPENING = """
import torch
from pretended_gpu import LAUNCHES, pretend
from nanovllm.worker.failures import failed_kernel
from nanovllm.worker.kernels.compile_ahead import CompileAhead
from nanovllm.worker.kernels.triton_kernels import TritonKernels

def launch():
    hidden = torch.ones(4, 512, dtype=torch.bfloat16)
    TritonKernels().rms_norm(hidden, hidden[0], 1e-6)

def wait(ahead):
    ahead.wait(lambda phase, progress: None)

ahead = CompileAhead(torch.device("cpu"))
"""


def run_for_hopper(program: str, cache: Path) -> str:
    """What a program prints whose Triton compiles for a GPU that is not there."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}",
    }
    command = [sys.executable, "-W", "ignore", "-c", OPENING + program]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_what_was_collected_is_launched_without_compiling(tmp_path: Path) -> None:
    program = """
pretend()
with ahead.collecting():
    launch(); launch()
wait(ahead)
print(len(LAUNCHES), len(ahead._pending))
launch()
print(dict(LAUNCHES), len(ahead._pending))
"""
    assert run_for_hopper(program, tmp_path) == "0 1\n{'_rms_norm_kernel': 1} 1\n"


def test_a_kernel_too_large_for_the_device_is_named(tmp_path: Path) -> None:
    program = """
pretend(shared_memory=0)
with ahead.collecting():
    launch()
try:
    wait(ahead)
except Exception as error:
    print(type(error).__name__, failed_kernel(error))
"""
    assert run_for_hopper(program, tmp_path) == "OutOfResources _rms_norm_kernel\n"
