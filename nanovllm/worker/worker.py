"""Owns one device: chooses it, loads the model there, sizes the KV cache, runs plans.

An executor makes one per device and calls `start`, `execute` in plan order, `shutdown`. What was
found on the way (device, precision, block count, and why) returns in `WorkerInfo`.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanovllm.checkpoint import Checkpoint, locate
from nanovllm.config import Device, DType, EngineConfig, KVCacheDType, StepLimits
from nanovllm.executor.base import ProgressCallback
from nanovllm.protocol import NewRow, StepPlan, WorkerInfo
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.attention.base import AttentionBackend, AttentionSpec
from nanovllm.worker.attention.select import select_backend
from nanovllm.worker.kernels.select import DeviceKernels, select_kernels
from nanovllm.worker.kv_cache import allocate, block_bytes, cpu_memory_budget, fit_blocks
from nanovllm.worker.model_runner import ModelRunner, PendingStep
from nanovllm.worker.models.decoder import Decoder
from nanovllm.worker.models.registry import DTYPES, dtype_from_config, spec_from_config
from nanovllm.worker.quant.fp8 import E4M3, has_native_fp8
from nanovllm.worker.quant.select import Scheme, choose_scheme
from nanovllm.worker.quant.select import describe as describe_weights
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.weights import load_weights

# Asks for every operation of the sampler that takes much memory.
HEAVY = SamplingParams(top_p=0.9, top_k=1000, min_p=0.01, repetition_penalty=1.1, logprobs=20)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a runner is put together from, but for the KV cache."""

    model: Decoder
    rows: RequestRows
    kernels: DeviceKernels
    attention: AttentionBackend
    attention_spec: AttentionSpec


class Worker:
    """One device's model, KV cache and rows. `on_progress` is told of each phase of `start`."""

    def __init__(self, config: EngineConfig, on_progress: ProgressCallback) -> None:
        self._config = config
        self._on_progress = on_progress
        self._phase_seconds: dict[str, float] = {}
        self._runner: ModelRunner | None = None

    def start(self) -> WorkerInfo:
        """Load everything; afterwards `execute` works.

        Raises `ValueError` naming the field and the remedy if the configuration cannot work.
        """
        wanted = self._config.model
        device = choose_device(wanted.device)
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
        attention, why_attention = select_backend(wanted.attention_backend, attention_spec)
        kernels = select_kernels(device)
        with self._phase("build"):
            model = Decoder(
                spec, kernels=kernels.layers, attention=attention, dtype=dtype, device=device
            )
        self._load(model, checkpoint, scheme)
        rows = RequestRows(
            num_rows=self._config.scheduler.max_num_seqs,
            max_model_len=max_model_len,
            block_size=attention_spec.block_size,
            vocab_size=spec.vocab_size,
            eos_token_ids=checkpoint.eos_token_ids(),
            device=device,
        )
        parts = Parts(model, rows, kernels, attention, attention_spec)
        with self._phase("kv cache"):
            kv_cache = self._size_cache(parts)
            self._runner = self._make_runner(parts, kv_cache)
        return WorkerInfo(
            device=describe(device),
            dtype=str(dtype).removeprefix("torch."),
            attention_backend=type(attention).__name__,
            architecture=spec.architecture,
            num_blocks=kv_cache.shape[2],
            max_model_len=max_model_len,
            vocab_size=spec.vocab_size,
            eos_token_ids=checkpoint.eos_token_ids(),
            num_parameters=model.num_parameters,
            kv_cache_bytes=kv_cache.nbytes,
            notes=[why_dtype, why_attention, kernels.why, *describe_weights(model, scheme)],
            phase_seconds=self._phase_seconds,
        )

    def execute(self, plan: StepPlan) -> PendingStep:
        """Queue one step; see `ModelRunner.execute`."""
        assert self._runner is not None, "start() first"
        return self._runner.execute(plan)

    def shutdown(self) -> None:
        """Free the device's memory. Safe to call twice, and after a failed start."""
        self._runner = None
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where CUDA was not used

    def _load(self, model: Decoder, checkpoint: Checkpoint, scheme: Scheme | None) -> None:
        with self._phase("weights"):
            load_weights(
                model,
                checkpoint,
                load_format=self._config.model.load_format,
                seed=self._config.model.seed,
                on_progress=self._on_progress,
                scheme=scheme,
            )

    def _make_runner(self, parts: Parts, kv_cache: Tensor) -> ModelRunner:
        fused = parts.kernels.sample_tokens
        return ModelRunner(
            parts.model,
            parts.attention,
            rows=parts.rows,
            kv_cache=kv_cache,
            max_inflight_steps=self._limits(parts).max_inflight_steps,
            sample_tokens=fused,
            captures=fused is not None and not self._config.model.enforce_eager,
        )

    def _size_cache(self, parts: Parts) -> Tensor:
        """The KV cache, [2, num_layers, num_blocks, block_size, num_kv_heads, head_dim]."""
        num_layers, spec = parts.model.spec.num_layers, parts.attention_spec

        def allocate_blocks(num_blocks: int) -> Tensor:
            shape = parts.attention.kv_shape(spec, num_layers=num_layers, num_blocks=num_blocks)
            return allocate(shape, dtype=spec.cache_dtype, device=spec.device)

        cache = self._config.cache
        measured = cache.num_gpu_blocks_override is None and cache.kv_cache_memory_bytes is None
        memory_bytes = 0
        if measured and spec.device.type == "cuda":
            runner = self._make_runner(parts, allocate_blocks(1))
            max_model_len = parts.model.spec.max_position_embeddings
            run_heaviest_step(runner, self._limits(parts), max_model_len=max_model_len)
            memory_bytes = cuda_memory_budget(spec.device, share=cache.gpu_memory_utilization)
        elif measured:
            memory_bytes = cpu_memory_budget()
        num_blocks = fit_blocks(
            cache,
            bytes_per_block=block_bytes(spec, num_layers=num_layers),
            memory_bytes=memory_bytes,
            max_model_len=parts.model.spec.max_position_embeddings,
            max_num_seqs=parts.rows.num_rows,
        )
        return allocate_blocks(num_blocks)

    def _limits(self, parts: Parts) -> StepLimits:
        return self._config.scheduler.limits(parts.attention_spec.device.type)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._on_progress(name, 0.0)
        started = time.perf_counter()
        yield
        self._phase_seconds[name] = time.perf_counter() - started
        self._on_progress(name, 1.0)


def run_heaviest_step(runner: ModelRunner, limits: StepLimits, *, max_model_len: int) -> None:
    """Let the allocator take what the largest step needs. Only the padding row is touched."""
    num_entries = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    # Fewer rows than the budget could fill: the largest step is all of them at full length, with
    # room for the sampled token.
    num_tokens = min(limits.max_num_batched_tokens // num_entries, max_model_len - 1)
    padding = limits.max_num_seqs
    entries = [padding] * num_entries
    zeros, counts = [0] * num_entries, [num_tokens] * num_entries
    heavy, neutral = (
        NewRow(padding, [0], 1, [], params, 0, [])
        for params in (HEAVY, SamplingParams(temperature=0.0))
    )
    sampling = list(range(num_entries))
    runner.execute(StepPlan(0, [heavy], [], entries, zeros, counts, sampling)).result()
    runner.execute(StepPlan(1, [neutral], [], [padding], [0], [1], [0])).result()


def choose_device(device: Device) -> torch.device:
    """The device a configuration means. Raises `ValueError` if it asks for CUDA in vain."""
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        reason = "no GPU is usable" if torch.version.cuda else "this PyTorch is built without CUDA"
        raise ValueError(f"device: 'cuda' was asked for, but {reason}: use 'cpu' or 'auto'")
    if device == "cpu" or not found:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(
    dtype: DType, device: torch.device, stored: torch.dtype | None
) -> tuple[torch.dtype, str]:
    """The computing precision, and why, in a sentence. stored: the checkpoint's, if it says so.

    "auto" is bfloat16 on a CPU that multiplies it natively (twice to three times as fast there:
    decoding reads half the bytes), else float32. On CUDA it is the checkpoint's precision, or half
    of float32, as in vLLM.
    """
    if dtype != "auto":
        return DTYPES[dtype], f"{dtype} as dtype asks"
    if device.type == "cpu":
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return torch.bfloat16, "bfloat16, which this CPU multiplies natively"
        return torch.float32, "float32, as this CPU has no native bfloat16"
    half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if stored in (torch.float16, half):
        return stored, f"{stored} as in the checkpoint".removeprefix("torch.")
    return half, f"{half}, half precision of this GPU".removeprefix("torch.")


def choose_kv_dtype(kv_cache_dtype: KVCacheDType, device: torch.device) -> torch.dtype | None:
    """What keys and values are stored as; None: as computed. e4m3 has no scale, as in vLLM.

    Raises `ValueError` where a GPU's kernels could not write it.
    """
    if kv_cache_dtype == "auto":
        return None
    if device.type == "cuda" and not has_native_fp8(device):
        raise ValueError(
            f"kv_cache_dtype: {kv_cache_dtype!r} needs a GPU of compute capability 8.9 (Ada) or "
            "later: use 'auto'"
        )
    return E4M3


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


def describe(device: torch.device) -> str:
    """The device for `WorkerInfo`: its type first."""
    if device.type == "cpu":
        return "cpu"
    return f"{device} ({torch.cuda.get_device_name(device)})"
