"""`nanovllm generate` beside processes that never rest: slow, but nothing gets into the answer."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.waiting import WAIT_S

PROMPT = "Tell me a very short story about a lighthouse keeper."
# What is said besides an answer: phases of the start, how long that took, and figures at the end.
# How long the answer is depends on the processor: kernels of each kind round differently.
STARTING = re.compile(r"([a-z ]+ …\n)+ready after [\d.]+ s\n")
FIGURES = re.compile(r"\[\d+ prompt tokens, 0 cached \| \d+ tokens, \w+ \| [^\n]+ tokens/s\]\n")


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """With so many processes beside, each as in a terminal of its own."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def generate(model: Path, stderr: int) -> "subprocess.CompletedProcess[str]":
    flags = ("--model", str(model), "--temperature", "0", "--max-tokens", "64")
    command = [sys.executable, "-m", "nanovllm", "generate", *flags, PROMPT]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=4 * WAIT_S,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done


@pytest.mark.model
def test_nothing_gets_into_an_answer_beside_busy_processes(smollm2_path: Path) -> None:
    """All else is said before and after it, where both go to one file, as on a terminal."""
    quiet = generate(smollm2_path, subprocess.PIPE)
    assert STARTING.match(quiet.stderr) and quiet.stdout.endswith("\n")
    with neighbours(2):
        beside = generate(smollm2_path, subprocess.STDOUT)
    before, answer, after = beside.stdout.partition(quiet.stdout)
    assert answer, beside.stdout
    assert STARTING.fullmatch(before) and FIGURES.fullmatch(after), beside.stdout
