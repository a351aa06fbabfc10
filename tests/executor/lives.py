"""Lives of the core's property test with a model: on one rank, and on real ones over gloo.

`benchmarks/ranks_alike.py` lives many of them; `test_group` some with each of its models.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from msgspec.structs import replace

from nanovllm.config import EngineConfig
from nanovllm.executor.base import Executor
from nanovllm.executor.group import GroupExecutor
from nanovllm.executor.inline import inline_executor
from nanovllm.executor.synthetic import SyntheticExecutor
from nanovllm.protocol.plan import StepHandle, StepMasks, StepPlan, WorkerInfo
from tests.core.test_property import Simulation

MOST_SEQS, MOST_TOKENS, MOST_LEN, MOST_STEPS = 6, 64, 64, 4  # of any life
MOST_BLOCKS = 500  # also where layers differ in what they see
SYNTHETIC = "synthetic"
OWN_EOS = {"eos_token_id": 0}  # as the property test's vocabulary has it
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0, "n": 1},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 0.0, "n": 1, "logprobs": 3, "prompt_logprobs": 2},
    {"logit_bias": {5: 2.0, 130: 3.0}, "logprobs": 0},
)


class Layout(NamedTuple):
    """How ranks share a model."""

    each: int
    stages: int
    spreads: bool

    @classmethod
    def of(cls, text: str) -> "Layout":
        each, _, stages = text.removesuffix("e").partition("x")
        return cls(int(each), int(stages or 1), text.endswith("e"))

    def __str__(self) -> str:
        return f"TP {self.each} × PP {self.stages}{', experts spread' if self.spreads else ''}"


ALONE = Layout(1, 1, False)


@dataclass
class Part:
    """An executor of one life, with its share of the blocks of a larger one."""

    whole: Executor
    info: WorkerInfo

    def start(self) -> WorkerInfo:
        return self.info

    def allocate(self, num_blocks: int) -> None:
        """The whole has its cache."""

    def submit(self, plan: StepPlan) -> StepHandle:
        return self.whole.submit(plan)

    def sample(self, step: int, masks: StepMasks | None) -> None:
        self.whole.sample(step, masks)

    def warm_up(self) -> bool:
        return False

    def check(self) -> None:
        """The next step tells."""

    def shutdown(self) -> None:
        """The whole stays."""


@dataclass
class Model:
    """One on so many ranks, with an executor for each size of blocks, started when it is asked
    for."""

    path: str
    layout: Layout
    settings: dict[str, Any]
    executors: dict[int, tuple[Executor, WorkerInfo]] = field(default_factory=dict)

    def of_life(
        self, config: EngineConfig, *, num_blocks: int, max_model_len: int, **_: Any
    ) -> Part:
        """As `Simulation` makes its executor."""
        executor, info = self.with_blocks(config.cache.block_size)
        assert num_blocks <= info.num_blocks
        return Part(executor, replace(info, num_blocks=num_blocks, max_model_len=max_model_len))

    def with_blocks(self, block_size: int) -> tuple[Executor, WorkerInfo]:
        """Its executor with blocks of that size, and what that says of itself."""
        if block_size not in self.executors:
            self.executors[block_size] = self._start(block_size)
        return self.executors[block_size]

    def _start(self, block_size: int) -> tuple[Executor, WorkerInfo]:
        each, stages, spreads = self.layout
        values: dict[str, Any] = {"dtype": "float32", "device": "cpu", "block_size": block_size}
        values |= {"max_num_seqs": MOST_SEQS, "max_num_batched_tokens": MOST_TOKENS}
        values |= {"max_model_len": MOST_LEN, "max_inflight_steps": MOST_STEPS}
        values |= {"num_gpu_blocks_override": MOST_BLOCKS, "compare_ranks": True}
        values |= {"tensor_parallel_size": each, "pipeline_parallel_size": stages}
        values |= {"enable_expert_parallel": spreads} | self.settings
        config = EngineConfig.from_kwargs(model=self.path, **values)
        is_one = config.parallel.num_ranks == 1
        make = SyntheticExecutor if self.path == SYNTHETIC else inline_executor
        executor: Executor = (make if is_one else GroupExecutor)(config, lambda *_: None)
        info = executor.start()
        executor.allocate(info.num_blocks)
        return executor, info

    def end(self) -> None:
        for executor, _ in self.executors.values():
            executor.shutdown()
        self.executors.clear()


class Life(Simulation):
    """One of the property test's, with a model."""

    samplings = SAMPLINGS

    def __init__(self, seed: int, model: Model, num_stages: int, block_sizes: tuple[int, ...]):
        self._model = model
        self.block_sizes = block_sizes
        windows = model.with_blocks(block_sizes[-1])[1].kv_windows
        super().__init__(
            seed,
            num_stages=num_stages,
            windows=windows,
            constrains=model.path != SYNTHETIC,
        )

    def make_executor(self, **life: Any) -> Part:
        return self._model.of_life(self.config, **life)

    def check_outputs(self) -> None:
        """They are compared with those of the same life on other ranks."""
