"""Owns one device: runs plans there, and makes it fit for the next one after a step that failed.

An executor makes one per device and calls `start`, `allocate`, then `submit` and `sample` for each
plan in turn, and `shutdown`.
"""

import gc
import logging
import time
from collections.abc import Iterator

import torch

from nanovllm.config import EngineConfig
from nanovllm.protocol.plan import (
    DeviceLostError,
    ProgressCallback,
    StepHandle,
    StepMasks,
    StepPlan,
    WorkerInfo,
)
from nanovllm.worker.failures import (
    KERNEL_REMEDY,
    describe_kernel_failure,
    failed_kernel,
    loss_of,
    meaning,
)
from nanovllm.worker.model_runner import ModelRunner, PendingStep
from nanovllm.worker.parallel import SINGLE, TensorParallel
from nanovllm.worker.startup import Loaded, Startup, explaining_want_of_memory
from nanovllm.worker.warmup.dummy_steps import num_usual, warm_up_steps
from nanovllm.worker.warmup.precompile import Precompiler

logger = logging.getLogger(__name__)
WARM_UP_S = 0.3  # spent on what first requests will want, before any can come


class Worker:
    """One device's model, KV cache and rows. `on_progress` is told of each phase of `start`."""

    def __init__(
        self,
        config: EngineConfig,
        on_progress: ProgressCallback,
        precompiler: Precompiler | None = None,
        *,
        parallel: TensorParallel = SINGLE,
    ) -> None:
        """precompiler: one that has begun, if any. parallel: which of the ranks this is."""
        self._config = config
        self._on_progress = on_progress
        self._precompiler = precompiler or Precompiler()
        self._parallel = parallel
        self._device = torch.device("cpu")
        self._loaded: Loaded | None = None
        self._runner: ModelRunner | None = None
        self._unsampled: PendingStep | None = None  # the last step, between its halves
        self._warm_up_steps: Iterator[None] = iter(())

    def start(self) -> WorkerInfo:
        """Load everything but the KV cache; tells how many blocks of it fit.

        Raises `ValueError` naming the field and the remedy if the configuration cannot work. If a
        Triton kernel fails, all is done again without Triton, unless the configuration insists.
        """
        try:
            return self._start()
        except Exception as error:
            kernel = failed_kernel(error)
            if kernel is None or loss_of(self._device) is not None:
                raise
            refusal = describe_kernel_failure(kernel, error, self._device)
        if self._config.model.attention_backend not in ("auto", "torch"):
            raise ValueError(f"attention_backend: {refusal}: {KERNEL_REMEDY}")
        logger.warning("%s; doing without Triton, which is slow", refusal)
        self.shutdown()
        return self._start(triton_refused=refusal)

    def _start(self, *, triton_refused: str | None = None) -> WorkerInfo:
        startup = Startup(
            self._config,
            self._on_progress,
            self._precompiler,
            parallel=self._parallel,
            triton_refused=triton_refused,
        )
        self._device = startup.device
        self._loaded, info = startup.run()
        return info

    def allocate(self, num_blocks: int) -> None:
        """Make the KV cache, of as many blocks as `start` found or fewer: `submit` may come.

        Raises `ValueError` if there is no memory for it.
        """
        loaded = self._loaded
        assert loaded is not None, "start() first"
        with explaining_want_of_memory("kv cache", self._device):
            self._runner = loaded.runner(num_blocks=num_blocks)
        self._warm_up_steps = warm_up_steps(
            self._runner, loaded.limits, max_model_len=loaded.max_model_len
        )
        # Ranks would not stop at the same step by their clocks: their group has them warm up.
        # And kernels that must still be compiled would take longer than the whole start.
        warms_up = self._parallel.is_alone and self._precompiler.has_found_all
        num_steps = num_usual(self._runner) if warms_up else 0
        until = time.monotonic() + WARM_UP_S
        for _ in range(num_steps):
            if not self.warm_up() or time.monotonic() > until:
                break

    def submit(self, plan: StepPlan) -> StepHandle:
        """Queue a step's forward pass; see `ModelRunner.forward`.

        Raises `DeviceLostError` if nothing can run any more. After any other exception the next
        plan may come: rows, staging and graphs of a failed step are written anew by its successors.
        """
        assert self._runner is not None, "start(), allocate() first"
        self._unsampled = None
        try:
            self._unsampled = self._runner.forward(plan)
        except Exception as error:
            raise self._recover(error) from error
        return self._unsampled

    def sample(self, step: int, masks: StepMasks | None) -> None:
        """Queue what picks the ids of the step submitted last. What fails for one row is in its
        result. Raises as `submit` does."""
        pending, self._unsampled = self._unsampled, None
        assert self._runner is not None and pending is not None and pending.step == step
        try:
            self._runner.sample(pending, masks)
        except Exception as error:
            raise self._recover(error) from error

    def warm_up(self) -> bool:
        """Run one kind of step that requests may want later; False if there are no more.

        Raises `DeviceLostError`. After any other failure there is no more warm-up.
        """
        try:
            return next(self._warm_up_steps, False) is None
        except Exception as error:
            self._warm_up_steps = iter(())
            found = self._recover(error)
            # Other ranks have run the step, or wait in it.
            if isinstance(found, DeviceLostError) or not self._parallel.is_alone:
                raise found from error
            logger.warning("a warm-up step failed, and is the last one", exc_info=error)
            return False

    def check(self) -> None:
        """A device without a step cannot be asked cheaply; the next step tells."""

    def _recover(self, error: Exception) -> Exception:
        """Make ready for the next step after one that raised; returns what that means."""
        if self._device.type == "cuda":
            # A capture that failed leaves its own stream current; plans run in order on one.
            torch.cuda.set_stream(torch.cuda.default_stream(self._device))
        found = meaning(error, self._device)
        if not isinstance(found, DeviceLostError):
            torch.cuda.empty_cache()  # the next step may need other sizes than this one held
        return found

    def shutdown(self) -> None:
        """Free the device's memory. Safe to call twice, and after a failed start."""
        self._runner = self._loaded = self._unsampled = None
        self._warm_up_steps = iter(())
        self._precompiler.end()
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where CUDA was not used
