"""Owns one device: chooses it, loads the model there, sizes the KV cache, runs plans.

An executor makes one per device and calls `start`, `execute` in plan order, `shutdown`. What was
found on the way (device, precision, block count, and why) returns in `WorkerInfo`.
"""

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor

from nanovllm.checkpoint.locate import Checkpoint, locate
from nanovllm.checkpoint.model_size import read_model_size
from nanovllm.config import EngineConfig, StepLimits
from nanovllm.plan.memory_plan import cpu_memory_budget, fit_blocks, free_memory
from nanovllm.protocol.plan import (
    DeviceLostError,
    ProgressCallback,
    StepHandle,
    StepPlan,
    StepResult,
    WorkerInfo,
)
from nanovllm.worker.attention.base import AttentionBackend, AttentionSpec
from nanovllm.worker.attention.select import select_backend
from nanovllm.worker.device import choose_device, choose_dtype, choose_kv_dtype, describe
from nanovllm.worker.failures import (
    KERNEL_REMEDY,
    describe_kernel_failure,
    failed_kernel,
    loss_of,
    meaning,
    out_of_memory_at_start,
)
from nanovllm.worker.kernels.select import DeviceKernels, select_kernels
from nanovllm.worker.kv_cache import allocate, block_bytes
from nanovllm.worker.model_runner import ModelRunner, PendingStep
from nanovllm.worker.models.decoder import Decoder
from nanovllm.worker.models.registry import dtype_from_config, spec_from_config
from nanovllm.worker.preflight import plan_memory, precision_of, report
from nanovllm.worker.quant.select import allocate_linears, choose_scheme
from nanovllm.worker.quant.select import describe as describe_weights
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.warmup.dummy_steps import rehearsals, run_heaviest_step
from nanovllm.worker.warmup.precompile import Job, Precompiler, is_likely
from nanovllm.worker.weights import load_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a runner is put together from, but for the KV cache."""

    model: Decoder
    rows: RequestRows
    kernels: DeviceKernels
    attention: AttentionBackend
    attention_spec: AttentionSpec


@dataclass(frozen=True, slots=True)
class PartlyFailedStep:
    """A step in which some rows cannot be sampled from. failures: as in `StepResult`."""

    step: PendingStep
    failures: dict[int, str]

    def result(self) -> StepResult:
        """As `PendingStep.result`."""
        return msgspec.structs.replace(self.step.result(), failures=self.failures)


class Worker:
    """One device's model, KV cache and rows. `on_progress` is told of each phase of `start`."""

    def __init__(
        self,
        config: EngineConfig,
        on_progress: ProgressCallback,
        precompiler: Precompiler | None = None,
    ) -> None:
        """precompiler: one that has begun, if any."""
        self._config = config
        self._on_progress = on_progress
        self._precompiler = precompiler or Precompiler()
        self._phase_seconds: dict[str, float] = {}
        self._memory_bytes: dict[str, int] = {}
        self._device = torch.device("cpu")
        self._triton_refused: str | None = None
        self._runner: ModelRunner | None = None
        self._rehearsals: Iterator[None] = iter(())
        self._rows: RequestRows | None = None

    def start(self) -> WorkerInfo:
        """Load everything; afterwards `execute` works.

        Raises `ValueError` naming the field and the remedy if the configuration cannot work. If a
        Triton kernel fails, all is done again without Triton, unless the configuration insists.
        """
        try:
            return self._start()
        except Exception as error:
            kernel = failed_kernel(error)
            if kernel is None or self._triton_refused is not None:
                raise
            if loss_of(self._device) is not None:
                raise
            refusal = describe_kernel_failure(kernel, error, self._device)
        if self._config.model.attention_backend not in ("auto", "torch"):
            raise ValueError(f"attention_backend: {refusal}: {KERNEL_REMEDY}")
        logger.warning("%s; doing without Triton, which is slow", refusal)
        self._triton_refused = refusal
        self.shutdown()
        return self._start()

    def _start(self) -> WorkerInfo:
        wanted = self._config.model
        device = self._device = choose_device(wanted.device)
        with self._phase("locate"):
            checkpoint = locate(wanted.model, on_progress=self._on_progress)
            checkpoint_config = checkpoint.config()
        spec = spec_from_config(checkpoint_config)
        max_model_len = choose_max_model_len(wanted.max_model_len, spec.max_position_embeddings)
        spec = replace(spec, max_position_embeddings=max_model_len)
        dtype, why_dtype = choose_dtype(wanted.dtype, device, dtype_from_config(checkpoint_config))
        scheme = choose_scheme(wanted.quantization, checkpoint_config)
        attention_spec = spec.attention_spec(
            block_size=self._config.cache.block_size,
            dtype=dtype,
            device=device,
            kv_dtype=choose_kv_dtype(self._config.cache.kv_cache_dtype, device),
        )
        backend = wanted.attention_backend if self._triton_refused is None else "torch"
        attention, why_attention = select_backend(backend, attention_spec)
        kernels = select_kernels(device, refused=self._triton_refused)
        self._compile_ahead(kernels, attention_spec, checkpoint_config, max_model_len)
        plan = plan_memory(
            self._config,
            read_model_size(checkpoint),
            device=device,
            precision=precision_of(attention_spec, scheme),
            max_model_len=max_model_len,
        )
        with self._phase("build"):
            model = Decoder(
                spec, kernels=kernels.layers, attention=attention, dtype=dtype, device=device
            )
            allocate_linears(model, scheme)
        rows = self._rows = self._make_rows(model, checkpoint)
        parts = Parts(model, rows, kernels, attention, attention_spec)
        with self._phase("weights"):
            self._load(model, checkpoint)
        self._await_kernels(kernels)
        with self._phase("kv cache"):
            kv_cache = self._size_cache(parts)
            runner = self._runner = self._make_runner(parts, kv_cache)
        self._rehearsals = rehearsals(runner, self._limits, max_model_len=max_model_len)
        self._memory_bytes["KV cache"] = kv_cache.nbytes
        found = report(plan, self._memory_bytes, num_blocks=kv_cache.shape[2])
        logger.info("memory of %s: %s", describe(device), "; ".join(found))
        return WorkerInfo(
            device=describe(device),
            dtype=name_of(dtype),
            attention_backend=type(attention).__name__,
            architecture=spec.architecture,
            num_blocks=kv_cache.shape[2],
            max_model_len=max_model_len,
            vocab_size=spec.vocab_size,
            eos_token_ids=checkpoint.eos_token_ids(),
            num_parameters=model.num_parameters,
            kv_cache_bytes=kv_cache.nbytes,
            notes=[why_dtype, why_attention, kernels.why, *describe_weights(model, scheme), *found],
            phase_seconds=self._phase_seconds,
            memory_bytes=self._memory_bytes,
        )

    def execute(self, plan: StepPlan) -> StepHandle:
        """Queue one step; see `ModelRunner.execute`. What fails for one row is in the result.

        Raises `DeviceLostError` if nothing can run any more. After any other exception the next
        plan may come: rows, staging and graphs of a failed step are written anew by its successors.
        """
        assert self._runner is not None, "start() first"
        try:
            step = self._runner.execute(plan)
        except Exception as error:
            raise self._recover(error) from error
        failures = self._rows.failures_of(plan) if self._rows is not None else {}
        return PartlyFailedStep(step, failures) if failures else step

    def rehearse(self) -> bool:
        """Run one kind of step that requests may want later; False if there are no more.

        Raises `DeviceLostError`. After any other failure there are no more rehearsals.
        """
        try:
            return next(self._rehearsals, False) is None
        except Exception as error:
            self._rehearsals = iter(())
            found = self._recover(error)
            if isinstance(found, DeviceLostError):
                raise found from error
            logger.warning("a rehearsal failed, and is the last one", exc_info=error)
            return False

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
        self._runner = None
        self._rehearsals = iter(())
        self._precompiler.end()
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where CUDA was not used

    def _compile_ahead(
        self,
        kernels: DeviceKernels,
        spec: AttentionSpec,
        checkpoint_config: dict[str, Any],
        max_model_len: int,
    ) -> None:
        """Where Triton compiles, have it begin while the rest of the start takes its time."""
        if kernels.gpu is None or not is_likely(self._config):
            self._precompiler.end()
            return
        kv_dtype = None if spec.kv_dtype is None else name_of(spec.kv_dtype)
        self._precompiler.ask(
            Job(
                checkpoint_config=checkpoint_config,
                max_model_len=max_model_len,
                block_size=spec.block_size,
                dtype=name_of(spec.dtype),
                kv_dtype=kv_dtype,
                quantization=self._config.model.quantization,
                limits=self._limits,
                gpu=kernels.gpu,
            )
        )

    def _await_kernels(self, kernels: DeviceKernels) -> None:
        """What Triton does ahead of the first launch, which else would do the same once more."""
        if kernels.naming is not None:
            with self._phase("kernels"):
                kernels.naming.join()
                self._precompiler.wait(partial(self._on_progress, "kernels"))

    def _load(self, model: Decoder, checkpoint: Checkpoint) -> None:
        load_weights(
            model,
            checkpoint,
            load_format=self._config.model.load_format,
            seed=self._config.model.seed,
            on_progress=self._on_progress,
        )
        held = (model.embedding, *(linear.weight for linear in model.linears()))
        sizes = {id(weight): weight.numel() * weight.element_size() for weight in held}
        self._memory_bytes["weights"] = sum(sizes.values())

    def _make_rows(self, model: Decoder, checkpoint: Checkpoint) -> RequestRows:
        return RequestRows(
            num_rows=self._config.scheduler.max_num_seqs,
            max_model_len=model.spec.max_position_embeddings,
            block_size=self._config.cache.block_size,
            vocab_size=model.spec.vocab_size,
            eos_token_ids=checkpoint.eos_token_ids(),
            device=model.device,
        )

    def _make_runner(self, parts: Parts, kv_cache: Tensor) -> ModelRunner:
        fused = parts.kernels.fused
        return ModelRunner(
            parts.model,
            parts.attention,
            rows=parts.rows,
            kv_cache=kv_cache,
            limits=self._limits,
            fused=fused,
            captures=fused is not None and not self._config.model.enforce_eager,
        )

    def _size_cache(self, parts: Parts) -> Tensor:
        """The KV cache, [2, num_layers, num_blocks, block_size, num_kv_heads, head_dim]."""
        num_layers, spec = parts.model.spec.num_layers, parts.attention_spec
        cache = self._config.cache
        measured = cache.num_gpu_blocks_override is None and cache.kv_cache_memory_bytes is None
        memory_bytes = 0
        if measured and spec.device.type == "cuda":
            runner = self._make_runner(parts, self._allocate(parts, num_blocks=1))
            max_model_len = parts.model.spec.max_position_embeddings
            reserved = torch.cuda.memory_reserved(spec.device)
            run_heaviest_step(runner, self._limits, max_model_len=max_model_len)
            reserved = torch.cuda.memory_reserved(spec.device) - reserved
            self._memory_bytes["heaviest step"] = reserved
            memory_bytes = cuda_memory_budget(spec.device, share=cache.gpu_memory_utilization)
        elif measured:
            memory_bytes = cpu_memory_budget(free_memory())
        num_blocks = fit_blocks(
            cache,
            bytes_per_block=block_bytes(spec, num_layers=num_layers),
            memory_bytes=memory_bytes,
            max_model_len=parts.model.spec.max_position_embeddings,
            max_num_seqs=parts.rows.num_rows,
        )
        return self._allocate(parts, num_blocks=num_blocks)

    def _allocate(self, parts: Parts, *, num_blocks: int) -> Tensor:
        spec, num_layers = parts.attention_spec, parts.model.spec.num_layers
        shape = parts.attention.kv_shape(spec, num_layers=num_layers, num_blocks=num_blocks)
        return allocate(shape, dtype=spec.cache_dtype, device=spec.device)

    @property
    def _limits(self) -> StepLimits:
        return self._config.scheduler.limits(self._device.type)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._on_progress(name, 0.0)
        started = time.perf_counter()
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise out_of_memory_at_start(name, self._device) from error
        seconds = time.perf_counter() - started
        self._phase_seconds[name] = self._phase_seconds.get(name, 0.0) + seconds
        self._on_progress(name, 1.0)


def name_of(dtype: torch.dtype) -> str:
    """As torch has it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def choose_max_model_len(wanted: int | None, most: int) -> int:
    """`wanted`, or all the positions the model has. Raises `ValueError` if it wants more."""
    if wanted is not None and wanted > most:
        raise ValueError(
            f"max_model_len: {wanted} is more than the {most} positions the model was made for: "
            f"set at most {most}"
        )
    return wanted or most


def cuda_memory_budget(device: torch.device, *, share: float) -> int:
    """Bytes left for KV of `share` of the GPU's memory.

    What the allocator still holds after the heaviest step counts as taken: steps will need it.
    """
    free, total = torch.cuda.mem_get_info(device)
    return int(total * share) - (total - free)
