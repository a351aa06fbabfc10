"""The worker in this process: one device, no other processes.

On CUDA its `submit` returns while the device works; on the CPU the step has run when it returns.
"""

from typing import TYPE_CHECKING

from nanovllm.config import EngineConfig
from nanovllm.protocol.plan import ProgressCallback
from nanovllm.worker.warmup import driver, precompile

if TYPE_CHECKING:
    from nanovllm.worker.worker import Worker


def inline_executor(config: EngineConfig, on_progress: ProgressCallback) -> "Worker":
    """A worker is an `executor.base.Executor` for itself. What a GPU wants has begun before it."""
    precompiler = precompile.Precompiler()
    if driver.is_likely(config.model.device):
        if precompile.is_likely(config):
            precompiler.begin()
        driver.wake()
    # Loads torch, which takes seconds: the others do not wait for it.
    from nanovllm.worker.worker import Worker

    return Worker(config, on_progress, precompiler)
