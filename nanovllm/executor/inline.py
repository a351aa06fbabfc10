"""The worker in this process: one device, no other processes.

On CUDA `submit` returns while the device works; on the CPU the step has run when it returns.
"""

from nanovllm.config import EngineConfig
from nanovllm.protocol.plan import ProgressCallback, StepHandle, StepMasks, StepPlan, WorkerInfo
from nanovllm.worker.warmup import driver, precompile


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

    def allocate(self, num_blocks: int) -> None:
        """Make the KV cache."""
        self._worker.allocate(num_blocks)

    def submit(self, plan: StepPlan) -> StepHandle:
        """Queue the forward pass of a step. See `Worker.submit`."""
        return self._worker.submit(plan)

    def sample(self, step: int, masks: StepMasks | None) -> None:
        """Queue what picks the ids of the step submitted last. See `Worker.sample`."""
        self._worker.sample(step, masks)

    def warm_up(self) -> bool:
        """Run a step of a kind that has not occurred yet."""
        return self._worker.warm_up()

    def shutdown(self) -> None:
        """Free the device. Safe to call twice, and after a failed start."""
        self._worker.shutdown()
