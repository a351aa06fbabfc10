"""The keywords of `LLM` and `AsyncLLM`, for type checkers and editors.

They are `EngineConfig`'s fields, which say what each means and may be. A type checker reads no
struct as keywords, so they are written here once more; a test compares the two.
"""

from typing import Literal, TypedDict

from nanovllm.config import (
    AttentionBackendName,
    Device,
    DistributedExecutorBackend,
    DType,
    KVCacheDType,
    LoadFormat,
    LogLevel,
    OnCoreDeath,
    Quantization,
    SchedulingPolicy,
)


class SupervisionKeywords(TypedDict, total=False):
    """What may be said where the core is somebody else's (`AsyncLLM.connect`)."""

    on_core_death: OnCoreDeath
    max_core_restarts: int
    core_return_timeout_s: float


class EngineKeywords(SupervisionKeywords, total=False):
    """All of them but `model`, which is the first argument."""

    revision: str | None
    tokenizer: str | None
    tokenizer_revision: str | None
    skip_tokenizer_init: bool
    dtype: DType
    load_format: LoadFormat
    quantization: Quantization | None
    max_model_len: int | None
    allow_long_max_model_len: bool
    seed: int
    generation_config: Literal["auto", "vllm"]
    served_model_name: str | list[str] | None
    device: Device
    threads: int | None
    enforce_eager: bool
    attention_backend: AttentionBackendName
    block_size: int
    kv_cache_dtype: KVCacheDType
    num_gpu_blocks_override: int | None
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None
    enable_prefix_caching: bool
    max_num_seqs: int
    max_num_batched_tokens: int | None
    mixed_prefill_tokens: int | None
    long_prefill_token_threshold: int
    scheduling_policy: SchedulingPolicy
    max_inflight_steps: int | None
    allow_debug: bool
    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int
    data_parallel_backend: DistributedExecutorBackend
    data_parallel_rank: int
    distributed_executor_backend: DistributedExecutorBackend
    ray_resource: str | None
    ray_placement_group: str | None
    ray_placement_timeout: float
    enable_expert_parallel: bool
    disable_custom_all_reduce: bool
    compare_ranks: bool
    step_ms: float
    vocab_size: int
    grammar_timeout_s: float
    grammar_preload: bool
    client_lease_s: float
    max_clients: int
    client_buffer_tokens: int
    max_queued_requests: int | None
    max_queued_tokens: int | None
    max_frame_bytes: int
    stall_timeout: float
    drain_timeout: float
    log_level: LogLevel | None
