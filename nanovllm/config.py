"""Every setting of the engine, frozen; flags and keywords are derived from these fields.

Owns names, defaults, bounds and one-line descriptions. Everyone reads it, nobody writes it: facts
found at start (block count, chosen backend) come back in `protocol.WorkerInfo` instead.
"""

import difflib
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16", "float", "half"]
LoadFormat = Literal["auto", "safetensors", "gguf", "dummy", "synthetic"]
DistributedExecutorBackend = Literal["mp", "ray"]
LogLevel = Literal["debug", "info", "warning", "error"]
OnCoreDeath = Literal["resume", "fail"]
SchedulingPolicy = Literal["fair", "fcfs", "priority"]
Quantization = Literal["int4", "int8", "fp8"]
KVCacheDType = Literal["auto", "fp8", "fp8_e4m3"]
AttentionBackendName = Literal["auto", "torch", "native", "triton", "flash_attn"]
Name = Annotated[str, Meta(min_length=1)]
Revision = Annotated[str, Meta(pattern=r"^[\w./-]+$")]
HexId = Annotated[str, Meta(pattern="^([0-9a-f]{2})+$")]
AtLeast1 = Annotated[int, Meta(ge=1)]
AtLeast2 = Annotated[int, Meta(ge=2)]
Positive = Annotated[float, Meta(gt=0)]


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What runs, where and in which precision."""

    model: Annotated[
        str,
        Meta(
            description="alias (smollm2), directory, .gguf file, or Hugging Face id (with :Q4_K_M "
            "or /FILE.gguf for one of its GGUF files)"
        ),
    ] = "smollm2"
    revision: Annotated[
        Revision | None,
        Meta(description="branch, tag or commit of a Hugging Face id; default: its main branch"),
    ] = None
    tokenizer: Annotated[
        str | None, Meta(description="tokenizer to use instead of the model's own")
    ] = None
    tokenizer_revision: Annotated[
        Revision | None, Meta(description="branch, tag or commit of the Hugging Face id tokenizer")
    ] = None
    skip_tokenizer_init: Annotated[
        bool, Meta(description="load no tokenizer; prompts and outputs are token ids only")
    ] = False
    dtype: Annotated[
        DType, Meta(description="computing precision; auto: what the checkpoint and device favour")
    ] = "auto"
    load_format: Annotated[
        LoadFormat,
        Meta(description="dummy: random weights; synthetic: no model at all, made-up tokens"),
    ] = "auto"
    quantization: Annotated[
        Quantization | None,
        Meta(
            description="quantize linear layers at load: int4 and int8 weights alone, in groups, "
            "fp8 with tokens; default: as the checkpoint has them"
        ),
    ] = None
    max_model_len: Annotated[
        AtLeast2 | None, Meta(description="prompt + output tokens; default: the model's own")
    ] = None
    allow_long_max_model_len: Annotated[
        bool,
        Meta(description="let max_model_len go beyond the positions the model was made for"),
    ] = False
    seed: Annotated[int, Meta(description="seed of requests that bring none")] = 0
    generation_config: Annotated[
        Literal["auto", "vllm"],
        Meta(
            description="where defaults of sampling come from: auto, the checkpoint's "
            "generation_config.json; vllm, those of SamplingParams alone"
        ),
    ] = "auto"
    served_model_name: Annotated[
        Name | Annotated[list[Name], Meta(min_length=1)] | None,
        Meta(
            description="the names by which clients may call the model, of which answers give the "
            "first; default: the value of model"
        ),
    ] = None
    device: Annotated[Device, Meta(description="auto: CUDA if there is one, else the CPU")] = "auto"
    threads: Annotated[
        AtLeast1 | None,
        Meta(description="threads that compute on a CPU; default: the cores it may use"),
    ] = None
    enforce_eager: Annotated[bool, Meta(description="never capture CUDA graphs")] = False
    attention_backend: Annotated[
        AttentionBackendName, Meta(description="auto: the fastest that supports the model")
    ] = "auto"

    def __post_init__(self) -> None:
        if self.tokenizer_revision is not None and self.tokenizer is None:
            raise ValueError("tokenizer_revision: is for a tokenizer of its own: set revision")

    @property
    def source(self) -> str:
        """`model` at its revision, as `locate` takes it."""
        return self.model if self.revision is None else f"{self.model}@{self.revision}"

    @property
    def tokenizer_source(self) -> str:
        """Likewise where the tokenizer is."""
        if self.tokenizer is None:
            return self.source
        mark = "" if self.tokenizer_revision is None else f"@{self.tokenizer_revision}"
        return f"{self.tokenizer}{mark}"

    @property
    def served_names(self) -> list[str]:
        """`served_model_name` as a list, or the model's own name."""
        names = self.served_model_name or self.model
        return [names] if isinstance(names, str) else list(dict.fromkeys(names))

    def choose_max_model_len(self, most: int) -> int:
        """`max_model_len`, or `most`: all the positions that the model was made for.

        Raises `ValueError` if more are wanted and nobody insists.
        """
        wanted = self.max_model_len
        if wanted is not None and wanted > most and not self.allow_long_max_model_len:
            raise ValueError(
                f"max_model_len: {wanted} is more than the {most} positions the model was made "
                f"for: set at most {most}, or allow_long_max_model_len if nonsense beyond will do"
            )
        return wanted or most


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The paged KV cache."""

    block_size: Annotated[int, Meta(ge=1, le=1024, description="tokens per KV block")] = 16
    kv_cache_dtype: Annotated[
        KVCacheDType,
        Meta(description="how keys and values are stored; auto: in the precision of dtype"),
    ] = "auto"
    num_gpu_blocks_override: Annotated[
        AtLeast2 | None, Meta(description="exactly this many KV blocks, measured or not")
    ] = None
    gpu_memory_utilization: Annotated[
        float, Meta(gt=0, le=1, description="share of device memory the engine may fill")
    ] = 0.92
    kv_cache_memory_bytes: Annotated[
        AtLeast1 | None, Meta(description="exactly this much memory for KV")
    ] = None
    enable_prefix_caching: Annotated[
        bool, Meta(description="reuse the KV of equal leading blocks")
    ] = True


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one step may hold."""

    max_num_seqs: Annotated[int, Meta(ge=1, description="sequences running at once")] = 256
    max_num_batched_tokens: Annotated[
        AtLeast1 | None, Meta(description="tokens per step; default: CUDA 8192, CPU 2048")
    ] = None
    mixed_prefill_tokens: Annotated[
        AtLeast1 | None,
        Meta(
            description="prompt tokens that a step may always hold beside sequences that decode; "
            "more, up to max_num_batched_tokens, the more others have yet to decode; "
            "default: CUDA 2048, CPU 512"
        ),
    ] = None
    long_prefill_token_threshold: Annotated[
        int, Meta(ge=0, description="most tokens of one prompt per step; 0: no cap of its own")
    ] = 0
    scheduling_policy: Annotated[
        SchedulingPolicy,
        Meta(
            description="fair: tenants share by tokens, each in order of arrival (fcfs if there is "
            "one); fcfs: order of arrival alone; priority: lower value first"
        ),
    ] = "fair"
    max_inflight_steps: Annotated[
        Annotated[int, Meta(ge=1, le=8)] | None,
        Meta(
            description="steps under way at once; default: CUDA 2, CPU 1, or as many as stages of "
            "a pipeline"
        ),
    ] = None

    allow_debug: Annotated[
        bool,
        Meta(
            description="let operators hold the engine, take it step by step and slow it down; "
            "one step is over before the next is planned"
        ),
    ] = False

    def __post_init__(self) -> None:
        if self.allow_debug and (self.max_inflight_steps or 1) > 1:
            raise ValueError(
                "max_inflight_steps: is 1 with allow_debug, where a step is over before the next "
                "is planned: leave one of them out"
            )

    def limits(self, device: str, *, num_stages: int = 1) -> "StepLimits":
        """With the defaults of that device ("cuda…", or any other), for a pipeline of so many
        stages."""
        on_gpu = device.startswith("cuda")
        most_steps = 1 if self.allow_debug else max(num_stages, 2 if on_gpu else 1)
        return StepLimits(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens or (8192 if on_gpu else 2048),
            mixed_prefill_tokens=self.mixed_prefill_tokens or (2048 if on_gpu else 512),
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            scheduling_policy=self.scheduling_policy,
            max_inflight_steps=self.max_inflight_steps or most_steps,
            awaits_ids=num_stages > 1,
        )


class StepLimits(msgspec.Struct, frozen=True, kw_only=True):
    """`SchedulerConfig` once the device is known.

    awaits_ids: a sequence is planned again only once its last id is back, and the steps in flight
    share the sequences out among them. Where one device samples and reads ids, it does not.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    mixed_prefill_tokens: int
    long_prefill_token_threshold: int
    scheduling_policy: SchedulingPolicy
    max_inflight_steps: int
    awaits_ids: bool = False


class ParallelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The devices that run one model between them."""

    tensor_parallel_size: Annotated[
        int, Meta(ge=1, le=64, description="ranks that share every layer, each a process")
    ] = 1
    pipeline_parallel_size: Annotated[
        int,
        Meta(
            ge=1,
            le=64,
            description="stages that share the layers out among them, each of "
            "tensor_parallel_size ranks",
        ),
    ] = 1
    data_parallel_size: Annotated[
        int, Meta(ge=1, le=64, description="replicas of the engine, each with ranks of its own")
    ] = 1
    data_parallel_backend: Annotated[
        DistributedExecutorBackend,
        Meta(description="where replicas run: this host, or wherever a Ray cluster has room"),
    ] = "mp"
    data_parallel_rank: Annotated[
        int, Meta(ge=0, description="which replica a core is: it takes its share of a Ray group")
    ] = 0
    distributed_executor_backend: Annotated[
        DistributedExecutorBackend,
        Meta(description="what starts ranks: processes of this host, or actors of a Ray cluster"),
    ] = "mp"
    ray_resource: Annotated[
        str | None, Meta(description="a custom Ray resource; a rank takes 1 of it, and no CPU")
    ] = None
    ray_placement_group: Annotated[
        HexId | None,
        Meta(
            description="id of the Ray placement group for ranks (default: that of the program's "
            "own actor or task, else a new one)"
        ),
    ] = None
    ray_placement_timeout: Annotated[
        float, Meta(ge=0, description="seconds that Ray may take to find room for all ranks")
    ] = 60.0
    enable_expert_parallel: Annotated[
        bool, Meta(description="tensor-parallel ranks hold whole experts, not a part of each")
    ] = False
    disable_custom_all_reduce: Annotated[
        bool, Meta(description="sums over ranks by NCCL alone, never by GPUs writing to each other")
    ] = False
    compare_ranks: Annotated[
        bool,
        Meta(description="for debugging: end the engine if two ranks have different ids"),
    ] = False

    @property
    def num_ranks(self) -> int:
        """Of one replica, stage by stage."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def launcher(self) -> DistributedExecutorBackend:
        """What starts ranks. Replicas on a Ray cluster are ranks there, be it one each."""
        backends = self.distributed_executor_backend, self.data_parallel_backend
        return "ray" if "ray" in backends else "mp"

    @property
    def answering_rank(self) -> int:
        """The first of the last stage, whose ranks sample."""
        return self.num_ranks - self.tensor_parallel_size


class SyntheticConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model that load_format="synthetic" stands for: it loads everything but a device."""

    step_ms: Annotated[float, Meta(ge=0, description="what every step takes")] = 10.0
    vocab_size: Annotated[AtLeast2, Meta(description="token ids are below this")] = 32_000


class SupervisionConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a frontend does about the death of its core."""

    on_core_death: Annotated[
        OnCoreDeath, Meta(description="resume every stream on a new core, or fail them all")
    ] = "resume"
    max_core_restarts: Annotated[
        int, Meta(ge=0, description="more deaths of an owned core within a minute are final")
    ] = 5
    core_return_timeout_s: Annotated[
        float, Meta(ge=0, description="how long a core that somebody else starts is waited for")
    ] = 60.0


class GrammarConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Structured outputs."""

    grammar_timeout_s: Annotated[
        float,
        Meta(
            gt=0, description="most seconds of processor time that compiling one grammar may take"
        ),
    ] = 2.0
    grammar_preload: Annotated[
        bool,
        Meta(
            description="load the vocabulary before ready, not with the first grammar, when all "
            "streams would stand still for it"
        ),
    ] = False


class ServiceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a core grants its clients, and what it bears from them."""

    client_lease_s: Annotated[
        Positive, Meta(description="a client silent for so long is gone: its requests are aborted")
    ] = 10.0
    max_clients: Annotated[AtLeast1, Meta(description="clients attached at once")] = 1024
    client_buffer_tokens: Annotated[
        AtLeast1,
        Meta(description="tokens kept for a client that does not read, before its requests pause"),
    ] = 32_768
    max_queued_requests: Annotated[
        AtLeast1 | None,
        Meta(description="output sequences that may wait to start; more are refused for now"),
    ] = 8192
    max_queued_tokens: Annotated[
        AtLeast1 | None,
        Meta(description="prompt tokens that may wait to start; more are refused for now"),
    ] = 1 << 23
    max_frame_bytes: Annotated[
        int, Meta(ge=1024, description="a client that sends a larger message is disconnected")
    ] = 16 * 2**20
    stall_timeout: Annotated[
        Positive, Meta(description="seconds without a finished step, with work, that are a stall")
    ] = 5.0
    drain_timeout: Annotated[
        float, Meta(ge=0, description="seconds that requests may still run after SIGTERM")
    ] = 30.0


class LogConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the processes write to stderr of their work."""

    log_level: Annotated[
        LogLevel | None,
        Meta(description="what is logged; default: info by servers and lone cores, else warning"),
    ] = None

    def threshold(self, usual: LogLevel) -> str:
        """As `logging` names it."""
        return (self.log_level or usual).upper()


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it. Crosses to the core process as JSON (`msgspec.json`)."""

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    parallel: ParallelConfig = ParallelConfig()
    synthetic: SyntheticConfig = SyntheticConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    grammar: GrammarConfig = GrammarConfig()
    service: ServiceConfig = ServiceConfig()
    log: LogConfig = LogConfig()

    def limits(self, device: str) -> StepLimits:
        """Of steps on such a device, as `SchedulerConfig.limits`."""
        return self.scheduler.limits(device, num_stages=self.parallel.pipeline_parallel_size)

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> "EngineConfig":
        """Build from flat keywords (`block_size=32`).

        Raises `ValueError` naming the field and the remedy: unknown names get the nearest known
        one, wrong types and out-of-range values get the bound they broke.
        """
        nested: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        for name, value in kwargs.items():
            nested[section_of(name)][name] = value
        sections: dict[str, Any] = {
            section: _convert(nested[section], config_type)
            for section, config_type in SECTIONS.items()
        }
        return cls(**sections)


SECTIONS: dict[str, type[msgspec.Struct]] = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "parallel": ParallelConfig,
    "synthetic": SyntheticConfig,
    "supervision": SupervisionConfig,
    "grammar": GrammarConfig,
    "service": ServiceConfig,
    "log": LogConfig,
}
_T = TypeVar("_T")


def field_names() -> list[str]:
    """All flat keywords, in the order the sections list them."""
    return [name for section in SECTIONS.values() for name in section.__struct_fields__]


def section_of(name: str) -> str:
    """The section a flat keyword belongs to; `ValueError` with the nearest name if none."""
    for section, config_type in SECTIONS.items():
        if name in config_type.__struct_fields__:
            return section
    raise ValueError(unknown_name("config field", name, field_names()))


def unknown_name(kind: str, name: str, known: list[str]) -> str:
    """An error text for a name nobody knows, with the nearest known one."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    return f"unknown {kind} {name!r}: {remedy}"


def _convert(values: dict[str, Any], config_type: type[_T]) -> _T:
    try:
        return msgspec.convert(values, config_type)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        raise ValueError(f"{path.rstrip('`')}: {message}" if path else message) from None
