"""`nanovllm plan`: what a model would take on a device, from its config and headers alone.

Called by `cli`. Needs no GPU, loads no torch, reads no weights; the arithmetic is `memory_plan`'s.
"""

import argparse
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nanovllm.checkpoint import native_steps
from nanovllm.checkpoint.locate import locate
from nanovllm.checkpoint.model_size import read_model_size
from nanovllm.checkpoint.num_ranks import check_num_ranks
from nanovllm.checkpoint.quantization import (
    bytes_per_end_weight,
    bytes_per_linear_weight,
    scheme_for,
)
from nanovllm.checkpoint.stages import stages_of
from nanovllm.config import EngineConfig, unknown_name
from nanovllm.plan.memory_plan import GIB, Machine, MemoryPlan, explain, free_memory
from nanovllm.plan.precision import VALUE_BYTES, Precision, dtype_for

LENGTHS = (1024, 4096, 8192, 32768, 131072)
# What CUDA itself, its libraries and our kernels take on a GPU, about.
CONTEXT_BYTES = int(0.7 * GIB)
# GiB that CUDA reports of a whole device.
GPUS = {
    "B200": 178.4,
    "H200": 139.8,
    "H100": 79.2,
    "A100-80GB": 79.3,
    "A100-40GB": 39.4,
    "L40S": 44.4,
    "A10G": 22.0,
    "L4": 22.0,
    "RTX 5090": 31.4,
    "RTX 4090": 23.5,
    "RTX 3090": 23.6,
}


def run(arguments: argparse.Namespace, settings: dict[str, Any]) -> int:
    """Print the plan; returns the exit code, 1 if the model does not fit."""
    config = EngineConfig.from_kwargs(**settings)
    machine = choose_machine(config, gpu=arguments.gpu, gpu_memory=arguments.gpu_memory)
    console, plan = Console(), make_plan(config, machine)
    if plan.stage is None:
        plans = [plan]
    else:
        stages = stages_of(plan.spec, plan.stage.size)
        plans = [replace(plan, stage=stage) for stage in stages]
        console.print(stage_table(plans))
    # All stages have as many blocks as the one with the least room.
    tightest = min(plans, key=lambda one: (one.fits, one.num_blocks))
    print_plan(tightest, console)
    return 0 if tightest.fits else 1


def make_plan(config: EngineConfig, machine: Machine) -> MemoryPlan:
    """The plan of `config` on `machine`; of a pipeline, its first stage's. Raises `ValueError`
    naming field and remedy."""
    num_ranks, num_stages = (
        config.parallel.tensor_parallel_size,
        config.parallel.pipeline_parallel_size,
    )
    checkpoint = locate(config.model.source, weights=False)
    size = read_model_size(checkpoint)
    spec = size.spec
    spreads_experts = config.parallel.enable_expert_parallel
    check_num_ranks(spec, num_ranks, spreads_experts=spreads_experts)
    max_model_len = config.model.choose_max_model_len(spec.max_position_embeddings)
    wanted = config.model.quantization
    scheme = scheme_for(checkpoint, spec, wanted, is_gpu=machine.is_gpu)
    dtype, _ = dtype_for(
        config.model.dtype,
        is_gpu=machine.is_gpu,
        has_bfloat16=machine.is_gpu or _cpu_has_bfloat16(),
        stored=spec.dtype,
    )
    return MemoryPlan(
        size=size,
        machine=machine,
        precision=Precision.of(
            dtype,
            linear_bytes=bytes_per_linear_weight(
                spec,
                scheme,
                value_bytes=VALUE_BYTES[dtype],
                num_ranks=num_ranks,
                copies=machine.is_gpu and dtype == "bfloat16",
            ),
            end_bytes=bytes_per_end_weight(spec, scheme, value_bytes=VALUE_BYTES[dtype]),
            fp8_cache=config.cache.kv_cache_dtype != "auto"
            or (machine.is_gpu and scheme is not None and scheme.has_kv_scales),
            is_native=not machine.is_gpu
            and dtype == "bfloat16"
            and num_ranks == num_stages == 1
            and native_steps.unsupported(spec) is None,
        ),
        cache=config.cache,
        limits=config.limits("cuda" if machine.is_gpu else "cpu"),
        max_model_len=max_model_len,
        num_ranks=num_ranks,
        spreads_experts=spreads_experts,
        stage=None if num_stages == 1 else stages_of(spec, num_stages)[0],
    )


def choose_machine(config: EngineConfig, *, gpu: str | None, gpu_memory: float | None) -> Machine:
    """The device to plan for: one named or given by its GiB, else this computer's."""
    if gpu is None and gpu_memory is None:
        found = None if config.model.device == "cpu" else _local_gpu()
        if config.model.device == "cuda" and found is None:
            raise ValueError("device: no GPU is found here: name one by --gpu or --gpu-memory")
        return found or Machine(
            name="this machine", memory_bytes=free_memory(), taken_bytes=0, is_gpu=False
        )
    if config.model.device == "cpu":
        raise ValueError("--gpu and --gpu-memory: omit them to plan for device 'cpu'")
    if gpu is not None:
        names = {name.lower(): name for name in GPUS}
        if gpu.lower() not in names:
            raise ValueError(unknown_name("--gpu", gpu, list(GPUS)) + ", or give --gpu-memory GiB")
        gpu = names[gpu.lower()]
    gib = gpu_memory if gpu_memory is not None else GPUS[str(gpu)]
    if gib <= 0:
        raise ValueError(f"--gpu-memory: {gib} is no amount of memory: give GiB")
    name = gpu or f"a GPU of {gib:g} GiB"
    return Machine(name=name, memory_bytes=int(gib * GIB), taken_bytes=CONTEXT_BYTES, is_gpu=True)


def print_plan(plan: MemoryPlan, console: Console) -> None:
    """Tables of what goes where and of what fits; in words what would do if it does not fit."""
    size, machine = plan.size, plan.machine
    active = ""
    if plan.num_active_parameters < size.num_parameters:
        active = (
            f", of which {plan.num_active_parameters / 1e9:.3f} for each token, "
            f"{plan.active_bytes / GIB:.2f} GiB for one alone"
        )
    where = f"each of {plan.num_ranks} ranks, " if plan.num_ranks > 1 else ""
    if (stage := plan.stage) is not None:
        whose = f"each of the {plan.num_ranks} ranks" if where else "that"
        where = f"{whose} of stage {stage.number + 1} of {stage.size}, which has the least room, "
    mixtures = [found for layer in plan.spec.layers if (found := layer.mixture) is not None]
    if plan.num_ranks > 1 and plan.spreads_experts:
        most = max(map(plan.most_experts, mixtures))
        where += f"with up to {most} of {mixtures[0].num_experts} experts, "
    console.print(
        f"{plan.spec.architecture}, {size.num_parameters / 1e9:.3f} billion parameters "
        f"(by {size.source}){active}, {plan.precision.dtype}, on {where}{machine.name} "
        f"({machine.memory_bytes / GIB:.1f} GiB{'' if machine.is_gpu else ' free'})",
        highlight=False,
        soft_wrap=True,
    )
    console.print(memory_table(plan))
    if plan.fits:
        console.print(length_table(plan))
        each = plan.num_kv_tokens // plan.limits.max_num_seqs
        console.print(
            f"max_num_seqs={plan.limits.max_num_seqs} run at once "
            f"at up to {min(each, plan.max_model_len):,} tokens each on average.",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print(explain(plan), highlight=False, soft_wrap=True)


def stage_table(plans: list[MemoryPlan]) -> Table:
    """What each rank of each stage of a pipeline holds."""
    table = Table("stage", "layers", box=None, pad_edge=False)
    for name in ("weights GiB", "KiB a token", "KV blocks"):
        table.add_column(name, justify="right")
    for plan in plans:
        stage = plan.stage
        assert stage is not None
        table.add_row(
            str(stage.number + 1),
            f"{stage.first}-{stage.end - 1}",
            f"{sum(plan.weight_bytes.values()) / GIB:.2f}",
            f"{plan.bytes_per_token / 1024:g}",
            f"{plan.num_blocks:,}",
        )
    return table


def memory_table(plan: MemoryPlan) -> Table:
    """Where the memory goes, from what is there already to what is left for KV."""
    table = Table("memory", "what", box=None, pad_edge=False)
    table.add_column("GiB", justify="right")

    def add(name: str, what: str, num_bytes: float) -> None:
        table.add_row(name, what, f"{num_bytes / GIB:.2f}")

    weights, limits = plan.weight_bytes, plan.limits
    if plan.machine.taken_bytes:
        add("device", "CUDA's own, other programs'", plan.machine.taken_bytes)
    for group, num_bytes in weights.items():
        if num_bytes:
            add("weights", group, num_bytes)
    add("sequences", f"state of {limits.max_num_seqs}, rotary table", plan.row_bytes)
    step = f"heaviest step: {limits.max_num_batched_tokens} tokens, scratch"
    add("activations", step, plan.activation_bytes)
    per_token = f"{plan.bytes_per_token / 1024:g} KiB a token"
    blocks = f"{plan.num_blocks} blocks of {plan.cache.block_size}, {per_token}"
    add("KV cache", blocks, plan.kv_cache_bytes)
    spare = plan.machine.memory_bytes - plan.machine.taken_bytes
    spare -= plan.fixed_bytes + plan.kv_cache_bytes
    graphs = f", graphs take about {plan.graph_bytes / GIB:.2f}" if plan.graph_bytes else ""
    add("left", f"not used by KV{graphs}", spare)
    return table


def length_table(plan: MemoryPlan) -> Table:
    """How many sequences of which length have room at once."""
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens per sequence", justify="right")
    table.add_column("fit at once", justify="right")
    shorter = [length for length in LENGTHS if length < plan.max_model_len]
    for length in (*shorter, plan.max_model_len):
        table.add_row(f"{length:,}", f"{plan.num_sequences(length):,}")
    return table


def _cpu_has_bfloat16() -> bool:
    """Whether this computer multiplies bfloat16 natively."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_tile" in flags


def _local_gpu() -> Machine | None:
    """The first GPU of this computer that programs may see, or None."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used"]
    command += ["--format=csv,noheader,nounits", "-i", visible]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        name, total, used = shown.stdout.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return Machine(
        name=name,
        memory_bytes=int(total) * 2**20,
        taken_bytes=int(used) * 2**20 + CONTEXT_BYTES,
        is_gpu=True,
    )
