"""A worker that is one of several does nothing of its own accord that the others might not."""

import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.config import EngineConfig
from nanovllm.executor.channel import Channel
from nanovllm.executor.rank import Rank
from nanovllm.executor.rank_process import Seat
from nanovllm.worker import worker as worker_module
from nanovllm.worker.parallel import TensorParallel
from nanovllm.worker.rank import take_device
from nanovllm.worker.warmup import driver
from nanovllm.worker.warmup.precompile import Precompiler
from nanovllm.worker.worker import Worker
from tests.worker.models.test_parallel import Meeting, Thread


@pytest.mark.parametrize("parallel", [TensorParallel(), Thread(0, 2, meeting=Meeting(1))])
def test_only_a_single_rank_warms_up_by_the_clock(
    parallel: TensorParallel,
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warmed_up: list[Worker] = []

    def warm_up(worker: Worker) -> bool:
        warmed_up.append(worker)
        return False

    monkeypatch.setattr(worker_module, "num_usual", lambda runner: 3)
    monkeypatch.setattr(Precompiler, "has_found_all", True)  # else nobody warms up
    monkeypatch.setattr(Worker, "warm_up", warm_up)
    config = EngineConfig.from_kwargs(
        model=str(tiny_checkpoint("llama")), device="cpu", dtype="float32", max_model_len=64
    )
    worker = Worker(config, lambda phase, progress: None, parallel=parallel)
    worker.allocate(worker.start().num_blocks)
    assert len(warmed_up) == (parallel.size == 1)
    worker.shutdown()


@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    ],
)
def test_too_few_gpus_are_told_with_the_fields_that_ask_for_more(
    sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = EngineConfig.from_kwargs(model="m", **sizes)
    num_ranks = config.parallel.num_ranks
    named = f"{' and '.join(sizes)}: {num_ranks} ranks need a GPU each, and 1 is visible: use 1"
    with pytest.raises(ValueError, match=named):
        take_device(config, 0, num_ranks)


def test_a_rank_has_its_own_gpu_woken_while_it_loads_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[int] = []
    monkeypatch.setattr(driver, "is_likely", lambda device: device == "auto")
    monkeypatch.setattr(driver, "wake", woken.append)
    for device in ("auto", "cpu"):
        ours, theirs = socket.socketpair()
        config = EngineConfig.from_kwargs(model="m", device=device, tensor_parallel_size=4)
        with theirs, closing(Channel(ours)) as channel:
            Rank(config, Seat(rank=3, local_rank=1, local_size=2), channel)._make_executor()
    assert woken == [1]
