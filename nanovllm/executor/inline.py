"""The worker in this process: one device, no other processes.

On CUDA `submit` returns while the device works; on the CPU the step has run when it returns.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from nanovllm.config import EngineConfig
from nanovllm.executor.base import DeviceLostError, ProgressCallback, StepHandle
from nanovllm.protocol import StepPlan, StepResult, WorkerInfo
from nanovllm.worker import driver, precompile


class InlineExecutor:
    """An `executor.base.Executor` around one `Worker`."""

    def __init__(self, config: EngineConfig, on_progress: ProgressCallback) -> None:
        precompiler = precompile.Precompiler()
        if driver.is_likely(config.model.device):
            if precompile.is_likely(config):
                precompiler.begin()
            driver.wake()
        # Loads torch, which takes seconds: the others do not wait for it.
        from nanovllm.worker.worker import Worker

        self._worker = Worker(config, on_progress, precompiler)

    def start(self) -> WorkerInfo:
        """Load the model; `ValueError` if the configuration is at fault."""
        return self._worker.start()

    def submit(self, plan: StepPlan) -> StepHandle:
        """Queue one step; plans run in the order they are submitted."""
        with _telling_losses():
            return InlineHandle(self._worker.execute(plan))

    def rehearse(self) -> bool:
        """Run a step of a kind that has not occurred yet."""
        with _telling_losses():
            return self._worker.rehearse()

    def shutdown(self) -> None:
        """Free the device. Safe to call twice, and after a failed start."""
        self._worker.shutdown()


class InlineHandle:
    """A step the worker has queued."""

    __slots__ = ("_step",)

    def __init__(self, step: StepHandle) -> None:
        self._step = step

    def result(self) -> StepResult:
        """Wait for the device. Raises what the step raised, or `DeviceLostError`."""
        with _telling_losses():
            return self._step.result()


@contextmanager
def _telling_losses() -> Iterator[None]:
    """An error of the device itself leaves a CUDA context unusable; running out of memory, or any
    other exception, does not."""
    try:
        yield
    except RuntimeError as error:
        import torch

        lost = isinstance(error, torch.AcceleratorError) or any(
            sign in str(error) for sign in ("CUDA error:", "Triton Error [CUDA]")
        )
        if not lost:
            raise
        raise DeviceLostError(f"the device failed: {error}") from error
