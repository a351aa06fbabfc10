"""Compiles Triton kernels in threads, all at once, while the caller does something else.

`Worker` goes through steps once inside `collecting`: a launch of a kernel that is not compiled yet
is skipped and its compilation queued, so what was to be launched is known by launching it. Most of
the work is LLVM's, ptxas's and the C compiler's, which hold no GIL.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Self

import torch
from triton.runtime import _async_compile

from nanovllm.executor.base import ProgressCallback

MAX_THREADS = 16
POLL_S = 0.2


class Unlaunched:
    """Stands for a kernel on its way to being compiled: launching it does nothing."""

    function = packed_metadata = None

    def result(self) -> Self:
        return self

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        return None


UNLAUNCHED = Unlaunched()


class CompileAhead:
    """A pool of compilations; leaving it as a context drops those not begun.

    To Triton it is the mode of asynchronous compilation (`triton.AsyncCompileMode`) of whoever is
    inside `collecting`, but for one thing: Triton's own would wait for a kernel to launch it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = ThreadPoolExecutor(
            min(MAX_THREADS, os.cpu_count() or 1),
            thread_name_prefix="compile",
            initializer=self._prepare_thread,
        )
        self._pending: dict[str, Future[None]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside, this thread's launches compile instead of running, unless they are compiled.

        What such launches would have written stays as it was: results are to be thrown away.
        """
        token = _async_compile.active_mode.set(self)
        try:
            yield
        finally:
            _async_compile.active_mode.reset(token)

    def submit(
        self, key: str, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]
    ) -> Unlaunched:
        """Triton's request to compile; finalize_fn enters the kernel where launches find it."""

        def compile_and_load() -> None:
            kernel = compile_fn()
            kernel.run  # noqa: B018 (builds the launcher and loads the binary, which takes as long)
            finalize_fn(kernel)

        if key not in self._pending:
            self._pending[key] = self._pool.submit(compile_and_load)
        return UNLAUNCHED

    def wait(self, on_progress: ProgressCallback) -> None:
        """Until all is compiled. Raises what the first compilation that failed raised."""
        pending = set(self._pending.values())
        while pending:
            done, pending = wait(pending, timeout=POLL_S, return_when=FIRST_COMPLETED)
            for compilation in done:
                compilation.result()
            on_progress("compile", 1 - len(pending) / len(self._pending))

    def _prepare_thread(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
