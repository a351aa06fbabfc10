"""Compile all kernels that steps of a model launch, for a GPU that this process never touches.

A program (`precompile.py` starts it). It goes through steps of all sizes on tensors without memory,
with launches left out: Triton is asked to compile asynchronously, and each kernel it hands over is
compiled by a child, while this process goes on. What the profile run launches comes first, and with
each kernel the C function that launches it, on which Triton spends a C compiler's run.
"""

import os
import select
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import msgspec
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils, libcuda_dirs
from triton.runtime.jit import JITFunction

from nanovllm.checkpoint.kv_layout import kv_layout
from nanovllm.checkpoint.quantization import Scheme
from nanovllm.checkpoint.spec import Attention, DecoderSpec
from nanovllm.config import StepLimits
from nanovllm.worker.attention.base import AttentionSpec, ModelAttention
from nanovllm.worker.attention.select import attention_specs
from nanovllm.worker.attention.triton.backend import TritonAttention
from nanovllm.worker.cuda_graph import StepShape, Variant
from nanovllm.worker.kernels.select import ExpandView, FusedStep
from nanovllm.worker.kernels.triton import launch
from nanovllm.worker.kernels.triton.edit_logits import sample_edited
from nanovllm.worker.kernels.triton.expand_batch import expand_view
from nanovllm.worker.kernels.triton.fused_sampler import sample_tokens
from nanovllm.worker.kernels.triton.layer_kernels import TritonKernels
from nanovllm.worker.kernels.triton.slice_sampler import sample_slices
from nanovllm.worker.kernels.triton.token_logprobs import pack_logprobs, pack_wished
from nanovllm.worker.model_runner import MAX_LOGIT_ROWS, ModelRunner
from nanovllm.worker.models.decoder import Decoder
from nanovllm.worker.quant import fp8
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling.sampler import Sampler
from nanovllm.worker.warmup.dummy_steps import KINDS, heaviest_steps, run_step
from nanovllm.worker.warmup.precompile import Job, stamp_of

NOWHERE = torch.device("meta")
MAX_PROCESSES = 16
POLITENESS = 10  # added to the niceness
FEW_ROWS = 16
DYNAMO = "torch._dynamo"
VARIANTS = [Variant(shares_prefix=False), Variant(shares_prefix=True)]


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


def leave_launches_out(gpu: launch.Gpu) -> None:
    """From now on in this process: kernels are compiled for that GPU, and none runs."""
    launch.stand_in(gpu)
    fp8.has_native_fp8 = lambda device: gpu.capability >= fp8.NATIVE_CAPABILITY
    triton.runtime.driver.set_active(Target(gpu.capability))
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only


def is_awaited() -> bool:
    """Whether whoever started this program still holds the other end of its standard input."""
    poll = select.poll()
    poll.register(0)
    return not poll.poll(0)  # nothing more is ever written there


class Children(Executor):
    """Compiles every kernel that Triton hands over in a child of its own, so many at a time.

    launches: and what launches it.
    """

    def __init__(self, most: int, *, launches: bool = False) -> None:
        self.most = most
        self._launches = launches
        self._running: set[int] = set()
        self._all_succeeded = True

    def submit(self, fn: Any, /, *args: Any, **options: Any) -> Future[Any]:
        """Called by Triton with what compiles a kernel; neither arguments nor options come."""
        self.start(partial(_compile_with_launcher, fn) if self._launches else fn)
        future: Future[Any] = Future()
        future.set_result(None)
        return future

    def start(self, task: Callable[[], Any]) -> None:
        """Waits for a child to end if there are enough. Raises `SystemExit` if nobody is waiting
        for any of it any more."""
        while len(self._running) >= self.most:
            self._wait_for_one()
        if not is_awaited():
            sys.exit()
        self._running.add(_fork(task))

    def wait(self) -> bool:
        """Until all is done; whether all of it succeeded."""
        while self._running:
            self._wait_for_one()
        return self._all_succeeded

    def _wait_for_one(self) -> None:
        child, status = os.wait()
        self._running.discard(child)
        self._all_succeeded = self._all_succeeded and status == 0


def _compile_with_launcher(compile_kernel: Callable[[], Any]) -> None:
    kernel = compile_kernel()
    CudaLauncher(kernel.src, kernel.metadata)


def _fork(task: Callable[[], Any]) -> int:
    """A child that does this; this process has no thread that it would miss. Returns its id."""
    if child := os.fork():
        return child
    failed = 1
    try:
        with suppress(Exception):  # whoever launches it will be told
            task()
            failed = 0
    finally:
        os._exit(failed)


def runner_for(job: Job, device: torch.device = NOWHERE, *, captures: bool = True) -> ModelRunner:
    """Whose steps are those of the job, of a model with few layers."""
    specs = attention_specs(
        job.spec,
        block_size=job.block_size,
        dtype=getattr(torch, job.dtype),
        device=device,
        kv_dtype=None if job.kv_dtype is None else getattr(torch, job.kv_dtype),
    )
    return runner_without_weights(job.spec, specs, job.limits, scheme=job.scheme, captures=captures)


def go_through_first(runner: ModelRunner, job: Job) -> None:
    """What the worker's profile run launches."""
    for params, counts in heaviest_steps(
        job.limits, max_model_len=job.spec.max_position_embeddings
    ):
        # Raised when sampled ids are to be read, which nobody has computed: all is launched then.
        with suppress(NotImplementedError):
            run_step(runner, job.limits, params, counts=counts)


def go_through_kinds(runner: ModelRunner, job: Job) -> None:
    """What rows may ask of the second half of a step. runner: captures nothing."""
    for params, is_masked in KINDS:
        with suppress(NotImplementedError):  # as above
            run_step(runner, job.limits, params, counts=[1], is_masked=is_masked)


def go_through_all(runner: ModelRunner, job: Job) -> None:
    """What steps of any size launch, in about the order in which a server meets them."""
    sharing = all(attention.window is None for attention in job.spec.attentions)
    variants = [variant for variant in VARIANTS if sharing or not variant.shares_prefix]
    steps = [(shape, variant) for shape in typical(runner.graph_shapes) for variant in variants]
    for shape, variant in sorted(steps, key=_lateness):
        runner.graph_step(shape, variant)
    # Log-probabilities of prompts: any number of alternatives is the same, and of four tokens in a
    # row one is aligned.
    dtype = getattr(torch, job.dtype)
    logits = torch.empty(MAX_LOGIT_ROWS, job.spec.vocab_size, dtype=dtype, device=NOWHERE)
    for first in range(4):
        pack_logprobs(logits, runner.token_ids[0, first : first + MAX_LOGIT_ROWS], num_top=1)


def _lateness(step: tuple[StepShape, Variant]) -> tuple[bool, int, bool]:
    """Few rows are met before many, and every request begins with a prompt."""
    (num_tokens, num_rows), variant = step
    return variant.shares_prefix, max(FEW_ROWS, num_rows), num_tokens == num_rows


def runner_without_weights(
    spec: DecoderSpec,
    specs: Mapping[Attention, AttentionSpec],
    limits: StepLimits,
    *,
    scheme: Scheme | None = None,
    expand: ExpandView = expand_view,
    captures: bool = True,
) -> ModelRunner:
    """Whose steps launch what an engine's would. On the attention's device; its cache is small."""
    attention = ModelAttention(specs, {kind: TritonAttention(one) for kind, one in specs.items()})
    device, dtype = attention.spec.device, attention.spec.dtype
    model = Decoder(
        spec,
        kernels=TritonKernels(),
        attention=attention,
        dtype=dtype,
        device=device,
        scheme=scheme,
    )
    layout = kv_layout(spec)
    model.lay_out(layout)
    rows = RequestRows(
        num_rows=limits.max_num_seqs,
        max_model_len=spec.max_position_embeddings,
        block_size=max(one.block_size for one in specs.values()),
        vocab_size=spec.vocab_size,
        eos_token_ids=[],
        device=device,
        blocks=layout.blocks,
    )
    shape = attention.kv_shape(num_layers=layout.layers_per_block, num_blocks=8)
    return ModelRunner(
        model,
        attention,
        sampler=Sampler(rows),
        kv_cache=torch.zeros(shape, dtype=attention.spec.cache_dtype, device=device),
        limits=limits,
        fused=FusedStep(
            expand, sample_tokens, sample_slices, sample_edited, pack_wished, pack_logprobs
        ),
        captures=captures,
    )


def typical(shapes: list[StepShape]) -> Iterator[StepShape]:
    """One of those whose sizes lie between the same powers of two: they launch the same kernels."""
    seen = set()
    for shape in shapes:
        kind = *((size - 1).bit_length() for size in shape), shape.is_decode
        if kind not in seen:
            seen.add(kind)
            yield shape


def has_driver() -> bool:
    """Whether this machine has the library that launchers are linked to: whoever only compiles
    kernels needs none."""
    try:
        return bool(libcuda_dirs())
    except (AssertionError, OSError):
        return False


class NotTracing(ModuleType):
    """Stands in for `torch._dynamo`, whose import takes a second.

    Torch loads it with the first computation on the meta device, only to keep it from tracing that.
    Whoever wants anything else of it gets the module itself.
    """

    def disable(self, fn: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        return fn

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(DYNAMO) is self:
            del sys.modules[DYNAMO]
        return getattr(import_module(DYNAMO), name)


def load_ahead() -> None:
    """What takes a second or two, and is the same for every job."""
    sys.modules.setdefault(DYNAMO, NotTracing(DYNAMO))
    naming = launch.name_kernels_ahead()
    torch.zeros(1, device=NOWHERE) + 1  # the first computation there loads half of torch
    naming.join()


@torch.inference_mode()
def compile_all(job: Job) -> None:
    """In processes of their own; tells by a line when what is waited for is done."""
    leave_launches_out(launch.Gpu(*job.gpu))
    launches, num_processors = has_driver(), os.cpu_count() or 2
    children = Children(min(MAX_PROCESSES, num_processors), launches=launches)
    if launches:
        children.start(CudaUtils)  # what loads kernels is C as well
    with triton.AsyncCompileMode(children):
        runner = runner_for(job)
        go_through_first(runner, job)
        if children.wait():
            with suppress(OSError):  # nobody may write there, and all was found
                stamp_of(job).touch()
        print("the first steps' kernels are compiled", flush=True)
        children.most = min(MAX_PROCESSES, max(1, num_processors // 2))  # the engine now works
        go_through_kinds(runner_for(job, captures=False), job)
        go_through_all(runner, job)
        children.wait()


def main() -> None:
    os.nice(POLITENESS)
    load_ahead()
    if line := sys.stdin.buffer.readline():
        compile_all(msgspec.json.decode(line, type=Job))


if __name__ == "__main__":
    main()
