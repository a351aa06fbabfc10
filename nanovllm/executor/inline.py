"""The worker in this process: one device, no other processes.

On CUDA `submit` returns while the device works; on the CPU the step has run when it returns.
"""

from nanovllm.config import EngineConfig
from nanovllm.executor.base import ProgressCallback, StepHandle
from nanovllm.protocol import StepPlan, WorkerInfo
from nanovllm.worker.worker import Worker


class InlineExecutor:
    """An `executor.base.Executor` around one `Worker`."""

    def __init__(self, config: EngineConfig, on_progress: ProgressCallback) -> None:
        self._worker = Worker(config, on_progress)

    def start(self) -> WorkerInfo:
        """Load the model; `ValueError` if the configuration is at fault."""
        return self._worker.start()

    def submit(self, plan: StepPlan) -> StepHandle:
        """Queue one step; plans run in the order they are submitted."""
        return self._worker.execute(plan)

    def shutdown(self) -> None:
        """Free the device. Safe to call twice, and after a failed start."""
        self._worker.shutdown()
