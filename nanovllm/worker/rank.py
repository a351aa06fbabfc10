"""A worker that is one of several: it meets the others, takes its own device, and shares the model.

`executor.rank` makes one in each process. Groups are torch.distributed's: NCCL between GPUs, gloo
between CPUs. Nothing times out here: who waits for a dead rank is ended by the group's owner.
"""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import distributed
from torch._C._distributed_c10d import TCPStore

from nanovllm.config import EngineConfig
from nanovllm.protocol.plan import ProgressCallback, WorkerInfo
from nanovllm.worker.device import choose_device, num_usable_cores
from nanovllm.worker.parallel import TensorParallel
from nanovllm.worker.worker import Worker

HOST = "127.0.0.1"
FOREVER = timedelta(days=30)


class RankWorker(Worker):
    """meet: told the port of the first rank, or asked for it with None; returns it."""

    def __init__(
        self,
        config: EngineConfig,
        on_progress: ProgressCallback,
        rank: int,
        size: int,
        *,
        meet: Callable[[int | None], int],
    ) -> None:
        super().__init__(config, on_progress, parallel=TensorParallel(rank, size))
        self._meet = meet

    def start(self) -> WorkerInfo:
        """Meet the others, then load this rank's part of the model."""
        device = take_device(self._config, self._parallel)
        self._on_progress("ranks", 0.0)
        join(self._parallel, device, self._meet)
        return super().start()

    def shutdown(self) -> None:
        """Graphs hold on to the group's communicator: they go first."""
        super().shutdown()
        if distributed.is_initialized():
            distributed.destroy_process_group()


def take_device(config: EngineConfig, parallel: TensorParallel) -> torch.device:
    """The GPU of this rank's number, or its share of the CPU's cores.

    Raises `ValueError` if there are fewer GPUs than ranks.
    """
    if config.model.device != "cpu" and torch.cuda.is_available():
        num_gpus = torch.cuda.device_count()
        if num_gpus < parallel.size:
            raise ValueError(
                f"tensor_parallel_size: {parallel.size} ranks need a GPU each, and {num_gpus} "
                f"{'is' if num_gpus == 1 else 'are'} visible: use {num_gpus}, or device 'cpu'"
            )
        torch.cuda.set_device(parallel.rank)
    device = choose_device(config.model.device)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        cores = config.model.threads or num_usable_cores()
        torch.set_num_threads(max(1, cores // parallel.size))
    return device


def join(parallel: TensorParallel, device: torch.device, meet: Callable[[int | None], int]) -> None:
    """Make the default group of torch.distributed; returns when all ranks are in it."""
    is_first = parallel.rank == 0
    if is_first:
        store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=FOREVER)
        meet(store.port)
    else:
        store = TCPStore(HOST, meet(None), is_master=False, timeout=FOREVER)
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=parallel.rank,
        world_size=parallel.size,
        timeout=FOREVER,
        device_id=device if device.type == "cuda" else None,
    )
    distributed.barrier()
