"""The stages of a pipeline as workers of this process, one behind the other, with what runs them.

What passes between processes is `executor.test_group`'s; on a GPU each stage runs by graphs.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.config import EngineConfig
from nanovllm.core.engine_core import EngineCore
from nanovllm.executor.group import SampledElsewhere
from nanovllm.executor.inline import inline_executor
from nanovllm.protocol.messages import AddRequest
from nanovllm.protocol.plan import StepHandle, StepMasks, StepPlan, StepResult, WorkerInfo
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.parallel import TensorParallel
from nanovllm.worker.worker import Worker
from tests.executor.test_group import begin, config_of, live, numbers
from tests.worker.planning import CUDA

NUM_LIVES = 2
NUM_WARM_UP_STEPS = 40


@dataclass
class LocalLink:
    """A `StageLink` within a process. before, after: what is on its way from and to neighbours."""

    received: Tensor | None
    is_last: bool
    before: deque[Tensor]
    after: deque[Tensor]
    as_received: Tensor | None = None

    def receive(self, num_tokens: int) -> None:
        hidden = self.before.popleft()
        assert self.received is not None and len(hidden) == num_tokens
        if self.as_received is not None:
            assert torch.equal(self.received, self.as_received), "a step has written there"
        self.received[:num_tokens] = hidden
        self.as_received = self.received.clone()

    def send(self, hidden: Tensor) -> None:
        self.after.append(hidden.clone())


@dataclass
class LocalStep:
    """A step of all stages: the last one's, of which the others learn."""

    last: StepHandle
    sampled: SampledElsewhere

    def result(self) -> StepResult:
        result = self.last.result()
        self.sampled.take(result)
        return result


class LocalStages:
    """An `executor.base.Executor` of workers that are stages."""

    def __init__(self, config: EngineConfig) -> None:
        size = config.parallel.pipeline_parallel_size
        self.workers = [
            Worker(config, lambda *_: None, parallel=TensorParallel(stage=stage, num_stages=size))
            for stage in range(size)
        ]
        self._sampled = SampledElsewhere()

    def start(self) -> WorkerInfo:
        infos = [worker.start() for worker in self.workers]
        before = deque[Tensor]()
        for worker in self.workers:
            assert worker._loaded is not None
            model, after = worker._loaded.model, deque[Tensor]()
            assert model.link is not None
            model.link = LocalLink(model.link.received, model.link.is_last, before, after)
            before = after
        assert len({info.kv_windows for info in infos}) == 1
        return infos[-1]

    def allocate(self, num_blocks: int) -> None:
        for worker in self.workers:
            worker.allocate(num_blocks)

    def submit(self, plan: StepPlan) -> LocalStep:
        plan = self._sampled.told_in(plan)
        *_, last = [worker.submit(plan) for worker in self.workers]
        return LocalStep(last, self._sampled)

    def sample(self, step: int, masks: StepMasks | None) -> None:
        for worker in self.workers:
            worker.sample(step, masks)

    def warm_up(self) -> bool:
        return all([worker.warm_up() for worker in self.workers])

    def check(self) -> None:
        """All are in this process."""

    def shutdown(self) -> None:
        for worker in self.workers:
            worker.shutdown()


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(
    ("name", "num_stages", "settings"),
    [
        ("llama3", 3, {}),  # a tied head; a stage between others
        # Layers that share keys and are given vectors; blocks of several groups.
        ("gemma4_small", 2, {"num_gpu_blocks_override": 50}),
    ],
)
def test_stages_get_the_ids_of_one_device(
    name: str,
    num_stages: int,
    settings: dict[str, Any],
    device: str,
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    """In random lives of chunks, prefixes, preemption, and every kind of sampling."""
    model, settings = str(tiny_checkpoint(name)), {"device": device, **settings}
    one = config_of(model, **settings)
    many = config_of(model, pipeline_parallel_size=num_stages, **settings)
    alone, stages = inline_executor(one, lambda *_: None), LocalStages(many)
    begin(alone)
    info = begin(stages)
    for _ in range(NUM_WARM_UP_STEPS if device == "cuda" else 0):
        stages.warm_up()
    preempted: list[int] = []
    for seed in range(NUM_LIVES):
        expected = live(alone, one, info, seed, preempted)
        assert expected == numbers(live(stages, many, info, seed, preempted)), f"seed {seed}"
    assert sum(preempted), "lives must preempt to mean something"
    if device == "cuda":
        runners = [worker._runner for worker in stages.workers]
        assert all(runner and runner._graphs and runner._graphs._captured for runner in runners)
    alone.shutdown()
    stages.shutdown()


@pytest.mark.model
def test_stages_read_their_layers_of_a_gguf_file() -> None:
    """SmolLM2, whose head is the embedding."""
    got: list[dict[int, list[int]]] = []
    for config in (config_of("smollm2"), config_of("smollm2", pipeline_parallel_size=3)):
        is_cut = config.parallel.pipeline_parallel_size > 1
        executor = LocalStages(config) if is_cut else inline_executor(config, lambda *_: None)
        core = EngineCore(config, executor, begin(executor))
        ids: dict[int, list[int]] = {0: [], 1: []}
        for number, temperature in enumerate((0.0, 0.9)):
            params = SamplingParams(temperature=temperature, seed=3, max_tokens=10)
            core.add(0, AddRequest(number, [504, 3575, 282, 4649, 314], params))
        while core.busy:
            outputs = core.step()
            if outputs is not None:
                for sequence, token_id in zip(outputs.sequences, outputs.token_ids, strict=True):
                    ids[sequence.number].append(token_id)
        got.append(ids)
        executor.shutdown()
    assert got[0] == got[1] and all(len(ids) == 10 for ids in got[0].values())
