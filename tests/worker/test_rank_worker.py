"""A worker that is one of several does nothing of its own accord that the others might not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nanovllm.config import EngineConfig
from nanovllm.worker import worker as worker_module
from nanovllm.worker.parallel import TensorParallel
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
