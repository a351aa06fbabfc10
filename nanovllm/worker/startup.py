"""What happens once, before the first step: choose a device, load the model, find how much KV fits.

`Worker.start` makes one `Startup` per attempt. What was found on the way (device, precision, block
count, and why) returns in `Loaded.info`; the KV cache is allocated later, by `Loaded.runner`, for
as many blocks as all ranks can have.
"""

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from msgspec.structs import replace
from torch import Tensor

from nanovllm.checkpoint.generation_config import sampling_defaults
from nanovllm.checkpoint.kv_layout import KVLayout, kv_layout
from nanovllm.checkpoint.locate import Checkpoint, locate, locate_tokenizer
from nanovllm.checkpoint.model_size import ModelSize, read_model_size
from nanovllm.checkpoint.num_ranks import check_num_ranks
from nanovllm.checkpoint.quantization import Scheme, scheme_for
from nanovllm.checkpoint.spec import DecoderSpec
from nanovllm.checkpoint.stages import stages_of
from nanovllm.config import EngineConfig, StepLimits
from nanovllm.plan.memory_plan import (
    MemoryPlan,
    cpu_first_blocks,
    cpu_memory_budget,
    fit_blocks,
    free_memory,
)
from nanovllm.protocol.plan import ProgressCallback, WorkerInfo
from nanovllm.worker.attention.base import ModelAttention
from nanovllm.worker.attention.select import attention_specs, select_attention
from nanovllm.worker.device import (
    choose_device,
    choose_dtype,
    choose_kv_dtype,
    describe,
    num_usable_cores,
)
from nanovllm.worker.failures import out_of_memory_at_start
from nanovllm.worker.kernels.native import library as native
from nanovllm.worker.kernels.select import DeviceKernels, select_kernels
from nanovllm.worker.kv_cache import allocate
from nanovllm.worker.model_runner import ModelRunner
from nanovllm.worker.models.decoder import Decoder
from nanovllm.worker.models.native import NativeDecoder, take_as_stored, unsupported
from nanovllm.worker.parallel import SINGLE, TensorParallel
from nanovllm.worker.preflight import plan_memory, precision_of, report
from nanovllm.worker.quant.gguf import reads_packed
from nanovllm.worker.quant.select import describe as describe_weights
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling.sampler import Sampler
from nanovllm.worker.stage_link import RankLink
from nanovllm.worker.warmup.dummy_steps import run_heaviest_step
from nanovllm.worker.warmup.precompile import NUM_LAYERS, Job, Precompiler, is_likely
from nanovllm.worker.weights import load_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model on its device, with all that a runner needs but the KV cache.

    native: runs the model's steps instead of it, if there is one for it.
    """

    model: Decoder
    rows: RequestRows
    kernels: DeviceKernels
    attention: ModelAttention
    limits: StepLimits
    captures: bool
    native: NativeDecoder | None = None

    def runner(self, *, num_blocks: int) -> ModelRunner:
        """One with a new KV cache of so many blocks."""
        own = self.model.vocabulary
        vocabulary = None if own.is_whole else own
        make = self.kernels.row_sampler
        row_sampler = None if make is None else make(self.rows)
        return ModelRunner(
            self.native or self.model,
            self.attention,
            sampler=Sampler(self.rows, row_sampler, vocabulary=vocabulary),
            kv_cache=self._kv_cache(num_blocks),
            limits=self.limits,
            fused=self.kernels.fused,
            captures=self.captures,
        )

    def _kv_cache(self, num_blocks: int) -> Tensor:
        num_layers, spec = self.model.layout.layers_per_block, self.attention.spec
        shape = self.attention.kv_shape(num_layers=num_layers, num_blocks=num_blocks)
        return allocate(shape, dtype=spec.cache_dtype, device=spec.device)

    @property
    def bytes_per_block(self) -> int:
        return self.model.layout.layers_per_block * self.attention.spec.bytes_per_block

    @property
    def max_model_len(self) -> int:
        return self.model.spec.max_position_embeddings


@dataclass(frozen=True, slots=True)
class Choice:
    """What will be loaded, and by what it will run.

    spec: with the positions that are wanted. layout: of the KV cache of this rank's stage.
    is_native: whether whole steps are native calls.
    """

    checkpoint: Checkpoint
    eos_token_ids: list[int]
    size: ModelSize
    spec: DecoderSpec
    scheme: Scheme | None
    attention: ModelAttention
    kernels: DeviceKernels
    layout: KVLayout
    is_native: bool
    notes: list[str]  # why it was chosen so


class Startup:
    """One attempt to start. triton_refused: why Triton's kernels must not be used, if so."""

    def __init__(
        self,
        config: EngineConfig,
        on_progress: ProgressCallback,
        precompiler: Precompiler,
        *,
        parallel: TensorParallel = SINGLE,
        triton_refused: str | None = None,
    ) -> None:
        """Raises `ValueError` if the device asked for cannot be had."""
        self.device = choose_device(config.model.device)
        self._config = config
        self._on_progress = on_progress
        self._precompiler = precompiler
        self._parallel = parallel
        self._triton_refused = triton_refused
        self._phase_seconds: dict[str, float] = {}
        self._memory_bytes: dict[str, int] = {}

    def run(self) -> tuple[Loaded, WorkerInfo]:
        """Load everything. The block count that returns is how many fit on this device.

        Raises `ValueError` naming the field and the remedy if the configuration cannot work.
        """
        choice = self._choose()
        self._compile_ahead(choice)
        plan = plan_memory(
            self._config,
            choice.size,
            device=self.device,
            precision=precision_of(
                choice.spec,
                choice.scheme,
                choice.attention.spec,
                num_ranks=self._parallel.size,
                is_native=choice.is_native,
            ),
            max_model_len=choice.spec.max_position_embeddings,
            parallel=self._parallel,
            layout=choice.layout,
        )
        with self.phase("build"):
            loaded = self._build(choice)
        with self.phase("weights"):
            loaded = self._load(loaded, choice)
        self._await_kernels(choice.kernels)
        with self.phase("kv cache"):
            num_blocks = self._count_blocks(loaded, plan)
        self._memory_bytes["KV cache"] = num_blocks * loaded.bytes_per_block
        found = report(plan, self._memory_bytes, num_blocks=num_blocks)
        logger.info("memory of %s: %s", describe(self.device), "; ".join(found))
        has_kernels = choice.kernels.fused is not None
        linears = loaded.model.linears()
        kept = describe_weights(linears, choice.scheme, has_kernels=has_kernels)
        notes = [*choice.notes, *kept, *found]
        if loaded.native is not None:
            notes.insert(len(choice.notes), loaded.native.describe())
        return loaded, self._info(choice, loaded, num_blocks, notes)

    def _choose(self) -> Choice:
        """What will be loaded and by what it will run; nothing is on the device yet."""
        wanted, device = self._config.model, self.device
        with self.phase("locate"):
            checkpoint = locate(wanted.source, on_progress=self._on_progress)
            size = read_model_size(checkpoint)
            spreads_experts = self._parallel.spreads_experts
            check_num_ranks(size.spec, self._parallel.size, spreads_experts=spreads_experts)
            other = None if wanted.tokenizer is None else wanted.tokenizer_source
            ends = find_ends(checkpoint, other, vocab_size=size.spec.vocab_size)
        max_model_len = wanted.choose_max_model_len(size.spec.max_position_embeddings)
        spec = replace(size.spec, max_position_embeddings=max_model_len)
        is_gpu = device.type == "cuda"
        scheme = scheme_for(checkpoint, spec, wanted.quantization, is_gpu=is_gpu)
        if scheme is not None and wanted.load_format == "dummy":
            scheme = scheme.quantizing()
        dtype, why_dtype = choose_dtype(wanted.dtype, device, spec.dtype)
        specs = attention_specs(
            spec,
            block_size=self._config.cache.block_size,
            dtype=dtype,
            device=device,
            kv_dtype=choose_kv_dtype(
                self._config.cache.kv_cache_dtype,
                device,
                has_scales=scheme is not None and scheme.has_kv_scales,
            ),
            parallel=self._parallel,
        )
        backend = wanted.attention_backend if self._triton_refused is None else "torch"
        attention, why_attention = select_attention(backend, specs)
        stage = stages_of(spec, self._parallel.num_stages)[self._parallel.stage]
        kernels = select_kernels(device, refused=self._triton_refused)
        is_native, why_kernels = self._choose_native(spec, scheme, attention)
        notes = [why_dtype, why_attention]
        notes += [why_kernels] if is_native else [f"{kernels.why}{why_kernels}"]
        return Choice(
            checkpoint=checkpoint,
            eos_token_ids=ends,
            size=size,
            spec=spec,
            scheme=scheme,
            attention=attention,
            kernels=kernels,
            layout=kv_layout(spec, num_ranks=self._parallel.size, stage=stage),
            is_native=is_native,
            notes=notes,
        )

    def _choose_native(
        self, spec: DecoderSpec, scheme: Scheme | None, attention: ModelAttention
    ) -> tuple[bool, str]:
        """Whether a CPU runs whole steps by native kernels, and by which; else why not."""
        if self.device.type != "cpu":
            return False, ""
        if not self._parallel.is_alone:
            return False, "; no native steps: ranks share the model"
        unusable = native.unusable()
        if unusable is not None:
            logger.warning(unusable)
            return False, f"; {unusable}"
        threads = self._config.model.threads or num_usable_cores()
        native.use(native.choose_isa(), num_threads=threads)
        reason = unsupported(spec, attention)
        if scheme is not None and not reads_packed(scheme):
            reason = "its weights have a form of their own"
        return reason is None, native.in_use() if reason is None else f"; no native steps: {reason}"

    def _build(self, choice: Choice) -> Loaded:
        """The model with memory for its weights, and the record of its rows."""
        kernels, attention, parallel = choice.kernels, choice.attention, self._parallel
        if parallel.exchange is not None and kernels.fused is not None:
            like = torch.empty(
                choice.spec.hidden_size, dtype=attention.spec.dtype, device=self.device
            )
            shared = parallel.exchange.for_rows(like, self._limits.max_num_batched_tokens)
            parallel = dataclasses.replace(parallel, rows=shared)
        model = Decoder(
            choice.spec,
            kernels=kernels.layers,
            attention=attention,
            dtype=attention.spec.dtype,
            device=self.device,
            scheme=choice.scheme,
            parallel=parallel,
        )
        model.lay_out(choice.layout)
        if not self._parallel.is_only_stage:
            model.link = self._link_of(model)
        if choice.is_native:
            take_as_stored(model)
        rows = RequestRows(
            num_rows=self._config.scheduler.max_num_seqs,
            max_model_len=choice.spec.max_position_embeddings,
            block_size=self._config.cache.block_size,
            vocab_size=choice.spec.vocab_size,
            eos_token_ids=choice.eos_token_ids,
            device=self.device,
            blocks=choice.layout.blocks,
        )
        captures = kernels.fused is not None and not self._config.model.enforce_eager
        captures = captures and attention.is_capturable and not model.waits_for_routers
        return Loaded(model, rows, kernels, attention, self._limits, captures)

    def _link_of(self, model: Decoder) -> RankLink:
        """To the stages before and behind the model's."""
        received, limits = None, self._limits
        if not model.stage.is_first:
            num_tokens = max(limits.max_num_batched_tokens, limits.max_num_seqs)
            shape = num_tokens, model.spec.hidden_size
            received = torch.zeros(shape, dtype=model.dtype, device=self.device)
        return RankLink(received, self._parallel)

    def _info(
        self, choice: Choice, loaded: Loaded, num_blocks: int, notes: list[str]
    ) -> WorkerInfo:
        defaults: dict[str, int | float] = {}
        if self._config.model.generation_config == "auto":
            defaults = sampling_defaults(choice.checkpoint)
        if defaults:
            named = ", ".join(f"{name} {value:g}" for name, value in defaults.items())
            notes = [*notes, f"defaults of sampling, by generation_config.json: {named}"]
        first_blocks = None
        if self.device.type == "cpu" and self._measures_memory:
            first_blocks = cpu_first_blocks(
                loaded.bytes_per_block, weight_bytes=self._memory_bytes["weights"]
            )
        return WorkerInfo(
            device=describe(self.device),
            dtype=name_of(loaded.model.dtype),
            attention_backend=str(loaded.attention),
            architecture=choice.spec.architecture,
            num_blocks=num_blocks,
            max_model_len=loaded.max_model_len,
            vocab_size=choice.spec.vocab_size,
            eos_token_ids=choice.eos_token_ids,
            num_parameters=loaded.model.num_parameters,
            kv_cache_bytes=self._memory_bytes["KV cache"],
            kv_windows=choice.layout.windows,
            num_first_blocks=first_blocks,
            sampling_defaults=defaults,
            notes=notes,
            phase_seconds=self._phase_seconds,
            memory_bytes=self._memory_bytes,
        )

    def _compile_ahead(self, choice: Choice) -> None:
        """Where Triton compiles, have it begin while the rest of the start takes its time."""
        gpu, attention = choice.kernels.gpu, choice.attention.spec
        # Kernels of ranks are those of other sizes.
        if gpu is None or not self._parallel.is_alone or not is_likely(self._config):
            self._precompiler.end()
            return
        self._precompiler.ask(
            Job(
                spec=choice.spec.shortened(NUM_LAYERS),
                block_size=attention.block_size,
                dtype=name_of(attention.dtype),
                kv_dtype=None if attention.kv_dtype is None else name_of(attention.kv_dtype),
                scheme=choice.scheme,
                limits=self._limits,
                gpu=gpu,
            )
        )

    def _await_kernels(self, kernels: DeviceKernels) -> None:
        """What Triton does ahead of the first launch, which else would do the same once more."""
        if kernels.naming is not None:
            with self.phase("kernels"):
                kernels.naming.join()
                self._precompiler.wait(partial(self._on_progress, "kernels"))

    def _load(self, loaded: Loaded, choice: Choice) -> Loaded:
        model = loaded.model
        load_weights(
            model,
            choice.checkpoint,
            load_format=self._config.model.load_format,
            seed=self._config.model.seed,
            on_progress=self._on_progress,
            prepacks=not choice.is_native,
        )
        if choice.is_native:
            step = NativeDecoder(model)
            self._memory_bytes["weights"] = step.weight_bytes
            return dataclasses.replace(loaded, native=step)
        linears = (model.embedding, *model.linears())
        held = chain.from_iterable(linear.method.tensors(linear) for linear in linears)
        sizes = {id(weight): weight.numel() * weight.element_size() for weight in held}
        self._memory_bytes["weights"] = sum(sizes.values())
        return loaded

    def _count_blocks(self, loaded: Loaded, plan: MemoryPlan) -> int:
        """How many blocks fit beside the model and the heaviest step, which on CUDA is run here."""
        cache, measured = self._config.cache, self._measures_memory
        memory_bytes = 0
        if measured and self.device.type == "cuda":
            runner = loaded.runner(num_blocks=1)
            reserved = torch.cuda.memory_reserved(self.device)
            run_heaviest_step(runner, self._limits, max_model_len=loaded.max_model_len)
            reserved = torch.cuda.memory_reserved(self.device) - reserved
            self._memory_bytes["heaviest step"] = reserved
            memory_bytes = cuda_memory_budget(self.device, share=cache.gpu_memory_utilization)
        elif measured:
            memory_bytes = cpu_memory_budget(free_memory()) // self._parallel.num_ranks
        return fit_blocks(
            cache,
            bytes_per_block=loaded.bytes_per_block,
            memory_bytes=memory_bytes,
            max_model_len=loaded.max_model_len,
            blocks_for=plan.blocks_for,
            max_num_seqs=loaded.rows.num_rows,
        )

    @property
    def _measures_memory(self) -> bool:
        """Whether nobody has said how large the KV cache shall be."""
        cache = self._config.cache
        return cache.num_gpu_blocks_override is None and cache.kv_cache_memory_bytes is None

    @property
    def _limits(self) -> StepLimits:
        return self._config.limits(self.device.type)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Tells of a part of the start, and times it. Raises `ValueError` if memory runs out."""
        self._on_progress(name, 0.0)
        started = time.perf_counter()
        with explaining_want_of_memory(name, self.device):
            yield
        seconds = time.perf_counter() - started
        self._phase_seconds[name] = self._phase_seconds.get(name, 0.0) + seconds
        self._on_progress(name, 1.0)


@contextmanager
def explaining_want_of_memory(phase: str, device: torch.device) -> Iterator[None]:
    """If memory runs out, a `ValueError` that says in which phase, and what would do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise out_of_memory_at_start(phase, device) from error


def name_of(dtype: torch.dtype) -> str:
    """As torch has it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def find_ends(checkpoint: Checkpoint, tokenizer: str | None, *, vocab_size: int) -> list[int]:
    """The ids that end an output: the model's, and the EOS of the tokenizer in use.

    tokenizer: a name, if it is not the model's own, which may know tokens the model cannot say.
    """
    path = None if tokenizer is None else locate_tokenizer(tokenizer)
    return [token_id for token_id in checkpoint.eos_token_ids(path) if 0 <= token_id < vocab_size]


def cuda_memory_budget(device: torch.device, *, share: float) -> int:
    """Bytes left for KV of `share` of the GPU's memory.

    What the allocator still holds after the heaviest step counts as taken: steps will need it.
    """
    free, total = torch.cuda.mem_get_info(device)
    return int(total * share) - (total - free)
