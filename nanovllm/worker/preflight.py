"""Whether a configuration can fit its device, before anything is loaded, and what it took after.

`Worker.start` asks. The arithmetic is that of `nanovllm plan` (`memory_plan`), with the device's
own figures for how much memory there is.
"""

import torch

from nanovllm.checkpoint.kv_layout import KVLayout, kv_layout
from nanovllm.checkpoint.model_size import ModelSize
from nanovllm.checkpoint.quantization import (
    Scheme,
    bytes_per_end_weight,
    bytes_per_linear_weight,
)
from nanovllm.checkpoint.spec import DecoderSpec
from nanovllm.checkpoint.stages import stages_of
from nanovllm.config import EngineConfig
from nanovllm.plan.memory_plan import GIB, Machine, MemoryPlan, explain, free_memory
from nanovllm.plan.precision import Precision
from nanovllm.worker.attention.base import AttentionSpec
from nanovllm.worker.parallel import SINGLE, TensorParallel
from nanovllm.worker.quant.fp8 import has_native_fp8


def plan_memory(
    config: EngineConfig,
    size: ModelSize,
    *,
    device: torch.device,
    precision: Precision,
    max_model_len: int,
    parallel: TensorParallel = SINGLE,
    layout: KVLayout | None = None,
) -> MemoryPlan:
    """The plan of `config` on this very device.

    parallel: which rank this is. layout: as `MemoryPlan.layout`. Raises `ValueError` with the
    remedies if weights and KV of one sequence cannot fit, however little a step takes.
    """
    stages = stages_of(size.spec, parallel.num_stages)
    stage = None if parallel.is_only_stage else stages[parallel.stage]
    plan = MemoryPlan(
        size=size,
        machine=machine_of(device, num_ranks=parallel.num_ranks),
        precision=precision,
        cache=config.cache,
        limits=config.limits(device.type),
        max_model_len=max_model_len,
        num_ranks=parallel.size,
        spreads_experts=config.parallel.enable_expert_parallel,
        stage=stage,
        layout=layout or kv_layout(size.spec, num_ranks=parallel.size, stage=stage),
    )
    if plan.is_hopeless:
        raise ValueError(explain(plan))
    return plan


def precision_of(
    spec: DecoderSpec,
    scheme: Scheme | None,
    attention: AttentionSpec,
    *,
    num_ranks: int = 1,
    is_native: bool = False,
) -> Precision:
    """What weights and keys take once `scheme` has been applied, by each of so many ranks.
    is_native: as of `Precision`."""
    value_bytes = attention.dtype.itemsize
    return Precision.of(
        str(attention.dtype).removeprefix("torch."),
        linear_bytes=bytes_per_linear_weight(
            spec,
            scheme,
            value_bytes=value_bytes,
            num_ranks=num_ranks,
            copies=has_native_fp8(attention.device) and attention.dtype == torch.bfloat16,
        ),
        end_bytes=bytes_per_end_weight(spec, scheme, value_bytes=value_bytes),
        fp8_cache=attention.cache_dtype != attention.dtype,
        is_native=is_native,
    )


def machine_of(device: torch.device, *, num_ranks: int = 1) -> Machine:
    """A device and its memory; what other programs hold of it is taken. Ranks share a CPU's."""
    if device.type != "cuda":
        share = free_memory() // num_ranks
        return Machine(name="this CPU", memory_bytes=share, taken_bytes=0, is_gpu=False)
    free, total = torch.cuda.mem_get_info(device)
    return Machine(
        name=torch.cuda.get_device_name(device),
        memory_bytes=total,
        taken_bytes=total - free,
        is_gpu=True,
    )


def report(plan: MemoryPlan, measured: dict[str, int], *, num_blocks: int) -> list[str]:
    """What was foreseen beside what was measured, then what fits; a few lines for a log.

    measured: "weights", "heaviest step" and "KV cache" in bytes, those that were measured.
    """
    foreseen = {
        "weights": sum(plan.weight_bytes.values()),
        "heaviest step": plan.activation_bytes,
        "KV cache": plan.kv_cache_bytes,
    }
    lines = [
        f"{name}: {measured[name] / GIB:.2f} GiB ({foreseen[name] / GIB:.2f} foreseen)"
        for name in foreseen
        if name in measured
    ]
    num_sequences = plan.num_sequences_in(num_blocks, plan.max_model_len)
    # Where windows free blocks, more tokens fit the longer sequences are.
    num_tokens = max(num_sequences * plan.max_model_len, plan.num_tokens_in(num_blocks))
    lines.append(
        f"room for {num_tokens:,} tokens: {num_sequences:,} sequences of {plan.max_model_len:,}"
    )
    return lines
