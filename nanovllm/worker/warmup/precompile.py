"""Kernels compiled beside the engine, before steps ask for them.

An executor begins `triton_precompile.py` before this process loads torch, as that program has to;
`Worker` tells it what for once that is known. It compiles into Triton's cache on disk: whoever
launches a kernel then only loads it. All that can go wrong with it costs time, and bounded time.
"""

import hashlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from nanovllm.checkpoint.quantization import Scheme
from nanovllm.checkpoint.spec import DecoderSpec
from nanovllm.config import EngineConfig, StepLimits

PROGRAM = (sys.executable, "-m", "nanovllm.worker.warmup.triton_precompile")
NUM_LAYERS = 2  # of a job at least: one that is the first, and one that is the last
MOST_WAIT_S = 10.0  # longer than compiling takes, unless something is amiss
TELL_EVERY_S = 0.1


class Job(msgspec.Struct, frozen=True):
    """Whose steps are gone through. Precisions by their names in torch."""

    spec: DecoderSpec  # of few layers; as many positions as a sequence may have tokens
    block_size: int
    dtype: str
    kv_dtype: str | None
    scheme: Scheme | None
    limits: StepLimits
    gpu: tuple[tuple[int, int], int]  # a `launch.Gpu`; Triton is not loaded to pass it on


def is_likely(config: EngineConfig) -> bool:
    """Whether a worker that takes a GPU will have a job, as far as that can be told at once."""
    return config.model.attention_backend != "torch"


def stamp_of(job: Job) -> Path:
    """A file beside the kernels, which says that those of the first steps have been compiled.

    It may be wrong (other sources of the same version, a cache cleared in part): then nobody waits
    for what is compiled, and some is compiled twice.
    """
    import triton  # by now whoever asks has loaded it

    told = msgspec.json.encode(job) + triton.__version__.encode()
    name = hashlib.sha256(told).hexdigest()[:32]
    return Path(triton.knobs.cache.dir, f"nanovllm-{name}")


class Precompiler:
    """The program, as whoever waits for its kernels sees it.

    It is told its job on its standard input, and ends when that is closed, be it because this
    process has died. When it has compiled what the first steps launch it writes a line.
    """

    def __init__(
        self, command: Sequence[str] = PROGRAM, *, most_wait_s: float = MOST_WAIT_S
    ) -> None:
        self._command = command
        self._most_wait_s = most_wait_s
        self._program: subprocess.Popen[bytes] | None = None
        self._is_awaited = False

    @property
    def has_found_all(self) -> bool:
        """Whether kernels of the first steps were there when it was asked: an earlier start has
        compiled them, and most others."""
        return self._program is not None and not self._is_awaited

    def begin(self) -> None:
        """Have it load what it needs for any job."""
        if self._program is None:
            with suppress(OSError):  # no memory for a process: kernels can be compiled without it
                self._program = subprocess.Popen(
                    self._command,
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )

    def ask(self, job: Job) -> None:
        """Have it compile what an engine that has chosen these will launch."""
        self.begin()
        if self._program is None:
            return
        assert self._program.stdin is not None
        self._is_awaited = not stamp_of(job).exists()
        line, stdin = msgspec.json.encode(job) + b"\n", self._program.stdin.fileno()
        os.set_blocking(stdin, False)
        try:
            is_told = os.write(stdin, line) == len(line)
        except OSError:  # it has failed by now
            is_told = False
        if not is_told:
            self.end()

    def wait(self, on_progress: Callable[[float], None]) -> None:
        """Until kernels of the first steps are compiled, if they were not when it was asked.

        Compiling them here as well would be slower: the program does several at a time. Returns
        early if the program ends, and late never. on_progress: told often, in [0, 1].
        """
        if self._program is None or not self._is_awaited:
            return
        assert self._program.stdout is not None
        poll, started = select.poll(), time.monotonic()
        poll.register(self._program.stdout)
        while not poll.poll(TELL_EVERY_S * 1e3):
            share = (time.monotonic() - started) / self._most_wait_s
            if share >= 1.0:
                break
            on_progress(share)

    def end(self) -> None:
        """No more is wanted of it. Safe to call twice."""
        if self._program is not None:
            self._program.kill()
            with self._program:  # closes both pipes, and waits
                pass
            self._program = None
