"""Compile all kernels that steps of a model launch, for a GPU that this process never touches.

A program (`worker/precompile.py` starts it). It goes through steps of all sizes on tensors without
memory, with launches left out: Triton is asked to compile asynchronously, and what it hands over is
compiled by as many processes as leave the engine enough processors.
"""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from nanovllm.config import StepLimits
from nanovllm.worker.attention.base import AttentionSpec
from nanovllm.worker.attention.triton_attention import TritonAttention
from nanovllm.worker.cuda_graph import StepShape, Variant
from nanovllm.worker.kernels import triton_launch
from nanovllm.worker.kernels.select import ExpandView, FusedStep
from nanovllm.worker.kernels.triton_batch import expand_view
from nanovllm.worker.kernels.triton_kernels import TritonKernels
from nanovllm.worker.kernels.triton_sampler import sample_tokens
from nanovllm.worker.model_runner import ModelRunner
from nanovllm.worker.models.decoder import Decoder, DecoderSpec
from nanovllm.worker.models.registry import spec_from_config
from nanovllm.worker.precompile import Job
from nanovllm.worker.quant.select import Scheme, allocate_linears
from nanovllm.worker.request_rows import RequestRows

NOWHERE = torch.device("meta")
NUM_LAYERS = 2  # one that is the first, and one that is the last
MAX_PROCESSES = 8
POLITENESS = 10  # added to the niceness
VARIANTS = [Variant(truncates, shares) for shares in (False, True) for truncates in (False, True)]


class Target:
    """What compiling asks of `triton.runtime.driver.active`, without a device behind it."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def leave_launches_out(gpu: triton_launch.Gpu) -> None:
    """From now on in this process: kernels are compiled for that GPU, and none runs."""
    triton_launch.stand_in(gpu)
    triton.runtime.driver.set_active(Target(gpu.capability))
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only


class Collector(Executor):
    """Keeps what Triton wants compiled, one entry per kernel, until somebody does it."""

    def __init__(self) -> None:
        self.tasks: list[tuple[Callable[[], Any], Future[Any]]] = []

    def submit(self, fn: Any, /, *args: Any, **options: Any) -> Future[Any]:
        """Called by Triton; neither arguments nor options come."""
        future: Future[Any] = Future()
        self.tasks.append((fn, future))
        return future

    def share_out(self, num_processes: int) -> None:
        """Have it all done in children, as long as the process that asked for it lives."""
        asker = os.getppid()
        children = [
            _fork([task for task, _ in self.tasks[first::num_processes]], asker)
            for first in range(num_processes)
        ]
        for child in children:
            os.waitpid(child, 0)
        for _, future in self.tasks:
            future.set_result(None)


def _fork(tasks: list[Callable[[], Any]], asker: int) -> int:
    """A child that does these, one after the other; this process has no thread that it would miss.

    Returns the child's id.
    """
    if child := os.fork():
        return child
    try:
        for task in tasks:
            os.kill(asker, 0)  # raises if there is no such process any more
            with suppress(Exception):  # whoever launches it will be told
                task()
    finally:
        os._exit(0)


def go_through_steps(job: Job) -> None:
    """Launch, or what stands for it, all that steps of any size would."""
    spec = spec_from_config(job.checkpoint_config)
    spec = replace(spec, num_layers=NUM_LAYERS, max_position_embeddings=job.max_model_len)
    attention_spec = spec.attention_spec(
        block_size=job.block_size,
        dtype=getattr(torch, job.dtype),
        device=NOWHERE,
        kv_dtype=None if job.kv_dtype is None else getattr(torch, job.kv_dtype),
    )
    runner = runner_without_weights(spec, attention_spec, job.limits)
    for variant in VARIANTS:
        if not variant.shares_prefix or spec.sliding_window is None:
            for step in typical(runner.graph_shapes):
                runner.graph_step(step, variant)


def runner_without_weights(
    spec: DecoderSpec,
    attention_spec: AttentionSpec,
    limits: StepLimits,
    *,
    scheme: Scheme | None = None,
    expand: ExpandView = expand_view,
) -> ModelRunner:
    """Whose steps launch what an engine's would. On the attention's device; its cache is small."""
    device, dtype = attention_spec.device, attention_spec.dtype
    attention = TritonAttention(attention_spec)
    model = Decoder(spec, kernels=TritonKernels(), attention=attention, dtype=dtype, device=device)
    allocate_linears(model, scheme)
    rows = RequestRows(
        num_rows=limits.max_num_seqs,
        max_model_len=spec.max_position_embeddings,
        block_size=attention_spec.block_size,
        vocab_size=spec.vocab_size,
        eos_token_ids=[],
        device=device,
    )
    shape = attention.kv_shape(attention_spec, num_layers=spec.num_layers, num_blocks=8)
    return ModelRunner(
        model,
        attention,
        rows=rows,
        kv_cache=torch.zeros(shape, dtype=attention_spec.cache_dtype, device=device),
        limits=limits,
        fused=FusedStep(expand, sample_tokens),
        captures=True,
    )


def typical(shapes: list[StepShape]) -> Iterator[StepShape]:
    """One of those whose sizes lie between the same powers of two: they launch the same kernels."""
    seen = set()
    for shape in shapes:
        kind = *((size - 1).bit_length() for size in shape), shape.num_tokens == shape.num_rows
        if kind not in seen:
            seen.add(kind)
            yield shape


@torch.inference_mode()
def compile_all(job: Job) -> None:
    """In processes of their own, while the one that asked for it lives."""
    leave_launches_out(triton_launch.Gpu(*job.gpu))
    with triton.AsyncCompileMode(collector := Collector()):
        go_through_steps(job)
        collector.share_out(min(MAX_PROCESSES, max(1, (os.cpu_count() or 2) // 2)))


def main() -> None:
    os.nice(POLITENESS)
    compile_all(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))


if __name__ == "__main__":
    main()
