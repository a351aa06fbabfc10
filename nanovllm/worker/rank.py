"""A worker that is one of several: it meets the others, takes its own device, and shares the model.

`executor.rank` makes one in each process. Groups are torch.distributed's: NCCL between GPUs, gloo
between CPUs. Nothing times out here: who waits for a dead rank is ended by the group's owner.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import msgspec
import torch
from torch import distributed
from torch._C._distributed_c10d import TCPStore

from nanovllm.config import EngineConfig
from nanovllm.protocol.plan import ProgressCallback, StepPlan, WorkerInfo
from nanovllm.worker.device import choose_device, num_usable_cores
from nanovllm.worker.parallel import Exchange, TensorParallel
from nanovllm.worker.worker import Worker

HOST = "127.0.0.1"
MEASURED_KIB = (8, 64, 512)  # of a message
NUM_MEASURED = 20
FOREVER = timedelta(days=30)


class RankWorker(Worker):
    """local_rank: of the `local_size` ranks that this host has of the group. meet: told the port of
    the first rank, or asked for it with None; returns the first rank's host and port.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_progress: ProgressCallback,
        rank: int,
        size: int,
        *,
        meet: Callable[[int | None], tuple[str, int]],
        local_rank: int,
        local_size: int,
    ) -> None:
        num_stages = config.parallel.pipeline_parallel_size
        stage_size = size // num_stages
        stage, rank_in_stage = divmod(rank, stage_size)
        parallel = TensorParallel(
            rank_in_stage,
            stage_size,
            spreads_experts=config.parallel.enable_expert_parallel,
            stage=stage,
            num_stages=num_stages,
        )
        super().__init__(config, on_progress, parallel=parallel)
        self._meet = meet
        self._local_rank = local_rank
        self._local_size = local_size

    def start(self) -> WorkerInfo:
        """Meet the others, then load this rank's part of the model."""
        device = take_device(self._config, self._local_rank, self._local_size)
        self._on_progress("ranks", 0.0)
        join(self._parallel, device, self._meet)
        if not self._parallel.is_only_stage:
            self._parallel = replace(self._parallel, group=group_of_stage(self._parallel))
            greet_neighbours(self._parallel, device)
        note, tries = None, not self._config.parallel.disable_custom_all_reduce
        if device.type == "cuda" and tries and self._parallel.is_only_stage:
            is_one_host = self._local_size == self._parallel.size
            exchange, note = fastest_exchange(self._parallel, device, is_one_host=is_one_host)
            self._parallel = replace(self._parallel, exchange=exchange)
        info = super().start()
        return info if note is None else msgspec.structs.replace(info, notes=[*info.notes, note])

    def ids_begun(self, plan: StepPlan) -> list[int]:
        """The ids of the tokens of a plan that has just been submitted; waits for the device."""
        assert self._runner is not None
        held = self._runner.token_ids.cpu()
        spans = zip(plan.rows, plan.num_computed, plan.num_scheduled, strict=True)
        parts = [held[row, at : at + count] for row, at, count in spans]
        ids: list[int] = torch.cat(parts).tolist()
        return ids

    def shutdown(self) -> None:
        """Graphs hold on to the group's communicator: they go first."""
        super().shutdown()
        self._parallel = replace(self._parallel, exchange=None)
        if distributed.is_initialized():
            distributed.destroy_process_group()


def take_device(config: EngineConfig, local_rank: int, local_size: int) -> torch.device:
    """The GPU of this rank's number on its host, or its share of the host's cores.

    Raises `ValueError` if there are fewer GPUs than ranks.
    """
    if config.model.device != "cpu" and torch.cuda.is_available():
        num_gpus = torch.cuda.device_count()
        if num_gpus < local_size:
            sizes = ("tensor_parallel_size", "pipeline_parallel_size")
            asked = [name for name in sizes if getattr(config.parallel, name) > 1]
            raise ValueError(
                f"{' and '.join(asked)}: {local_size} ranks need a GPU each, and {num_gpus} "
                f"{'is' if num_gpus == 1 else 'are'} visible: use {num_gpus}, or device 'cpu'"
            )
        torch.cuda.set_device(local_rank)
    device = choose_device(config.model.device)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        cores = config.model.threads or num_usable_cores()
        torch.set_num_threads(max(1, cores // local_size))
    return device


def join(
    parallel: TensorParallel, device: torch.device, meet: Callable[[int | None], tuple[str, int]]
) -> None:
    """Make the default group of torch.distributed; returns when all ranks are in it."""
    is_first = parallel.number == 0
    if is_first:
        store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=FOREVER)
        meet(store.port)
    else:
        host, port = meet(None)
        store = TCPStore(host, port, is_master=False, timeout=FOREVER)
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=parallel.number,
        world_size=parallel.num_ranks,
        timeout=FOREVER,
        device_id=device if device.type == "cuda" else None,
    )
    distributed.barrier()


def group_of_stage(parallel: TensorParallel) -> distributed.ProcessGroup | None:
    """The ranks that share this one's layers; None where it has no other. All ranks call it."""
    if parallel.size == 1:
        return None
    firsts = range(0, parallel.num_ranks, parallel.size)
    groups: list[distributed.ProcessGroup] = [
        distributed.new_group(list(range(at, at + parallel.size))) for at in firsts
    ]
    return groups[parallel.stage]


def greet_neighbours(parallel: TensorParallel, device: torch.device) -> None:
    """Open the ways between stages now: what runs a step by itself, as warm-up does, cannot."""
    word = torch.zeros(1, device=device)
    if parallel.stage > 0:
        distributed.recv(word, parallel.number - parallel.size)
    if parallel.stage < parallel.num_stages - 1:
        distributed.send(word, parallel.number + parallel.size)


def fastest_exchange(
    parallel: TensorParallel, device: torch.device, *, is_one_host: bool
) -> tuple[Exchange | None, str | None]:
    """GPUs that write into each other's memory, up to the size of message where that is as fast as
    NCCL; else None. All ranks find the same. Also returns what to tell about it."""
    from nanovllm.worker.kernels.triton.exchange import Exchange as Direct
    from nanovllm.worker.kernels.triton.launch import unusable

    others = [rank for rank in range(parallel.size) if rank != parallel.rank]
    is_possible = is_one_host and unusable(device) is None  # then a rank is its device's number
    is_possible = is_possible and all(
        torch.cuda.can_device_access_peer(device, rank) for rank in others
    )
    if not _least(is_possible, device):
        return None, "sums over ranks by NCCL: GPUs do not reach each other's memory"
    direct = Direct.open(parallel.rank, parallel.size, device)
    most_bytes, times = 0, []
    for kib in MEASURED_KIB:
        values = torch.zeros(kib * 512, dtype=torch.bfloat16, device=device)
        by_nccl = seconds_of(lambda: distributed.all_reduce(values))  # noqa: B023  # called here
        by_writing = seconds_of(lambda: direct.reduce(values))  # noqa: B023
        times.append(f"{kib} KiB {by_writing * 1e6:.1f} instead of {by_nccl * 1e6:.1f} µs")
        if not _least(by_writing <= by_nccl, device):
            break
        most_bytes = values.nbytes
    told = f"({'; '.join(times)})"
    if not most_bytes:
        return None, f"sums over ranks by NCCL, which is faster {told}"
    note = f"sums of up to {most_bytes >> 10} KiB by GPUs writing to each other {told}"
    return replace(direct, most_bytes=most_bytes), note


def _least(claim: bool, device: torch.device) -> bool:
    """Whether it holds on all ranks."""
    claims = torch.tensor(int(claim), device=device)
    distributed.all_reduce(claims, distributed.ReduceOp.MIN)
    return bool(claims)


def seconds_of(run: Callable[[], Any]) -> float:
    """What one takes within a CUDA graph, as steps run it; all ranks ask at once."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(NUM_MEASURED):
            run()
    took = []
    for _ in range(5):
        distributed.barrier()
        torch.cuda.synchronize()
        started = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
    return min(took) / NUM_MEASURED
