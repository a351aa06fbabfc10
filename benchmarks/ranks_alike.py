"""Do ranks end with the same ids, and with those of one rank, whatever becomes of requests?

    python benchmarks/ranks_alike.py --layouts 2,1x2 --lives 1000 --models synthetic,qwen3
    python benchmarks/ranks_alike.py --layouts 2x2 --lives 4 --models families,files
    python benchmarks/ranks_alike.py --layouts 2e --lives 8 --models mixtures   # spreads experts

Lives are those of the core's property test (requests that share beginnings, fork, are aborted,
paused, preempted, resumed and constrained by grammars; limits of every size), with every kind of
sampling. Each is lived once with a small random model on one rank and once on real ranks over gloo:
those of one stage, or times stages; "e" spreads experts. At every step all ranks compare what they
computed with and what they sampled. `families`: every architecture that tests know. `files`: packed
and fused layouts of weights. `synthetic` computes nothing: its ids hash the tokens before them, as
each rank has them, and it knows no grammars.
Targets: no step differs between ranks, and no id from one rank's.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from msgspec.structs import replace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for what tests have: small models, and lives

from nanovllm.config import EngineConfig  # noqa: E402
from nanovllm.executor.base import Executor  # noqa: E402
from nanovllm.executor.group import GroupExecutor  # noqa: E402
from nanovllm.executor.inline import inline_executor  # noqa: E402
from nanovllm.executor.synthetic import SyntheticExecutor  # noqa: E402
from nanovllm.protocol.plan import (  # noqa: E402
    DeviceLostError,
    StepHandle,
    StepMasks,
    StepPlan,
    WorkerInfo,
)
from tests.conftest import TINY, save_tiny  # noqa: E402
from tests.core.fake_executor import VOCAB_SIZE  # noqa: E402
from tests.core.test_property import Simulation  # noqa: E402
from tests.moe_models import TINY_MOE  # noqa: E402
from tests.worker.quant.layouts import FORMATS, write  # noqa: E402

MOST_SEQS, MOST_TOKENS, MOST_LEN, MOST_STEPS = 6, 64, 64, 4  # of any life
MOST_BLOCKS = 500  # also where layers differ in what they see
TELL_EVERY = 50  # lives
SYNTHETIC = "synthetic"
MANY = 50  # lives, of which it pays to start executors with blocks of other sizes, too
OWN_EOS = {"eos_token_id": 0}  # as the property test's vocabulary has it
# Halves are whole groups and blocks, and heads turn whole.
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128}
WIDE |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0, "n": 1},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 0.0, "n": 1, "logprobs": 3, "prompt_logprobs": 2},
    {"logit_bias": {5: 2.0, 130: 3.0}, "logprobs": 0},
)
FILES = ("awq 16", "gptq 4 ordered", "gptq 8 16", "compressed 4 16 zeros", "fp8 blocks 16")
FILES += ("compressed fp8 channel, plain tokens",)


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


@dataclass
class Found:
    """What lives of one model and layout have shown."""

    num_lives: int = 0
    num_tokens: int = 0
    num_preemptions: int = 0
    differ: list[str] = field(default_factory=list)  # of which life what
    seconds: float = 0.0


def compare(alone: Model, ranks: Model, num_lives: int, until: float) -> Found:
    """Live all of them, or as many as begin in time, on both."""
    found, started = Found(), time.monotonic()
    num_stages = ranks.layout.stages  # on one rank, too: it decides how steps are planned
    block_sizes = Simulation.block_sizes if num_lives >= MANY else (4,)
    for seed in range(num_lives):
        if time.monotonic() > until:
            break
        expected = Life(seed, alone, num_stages, block_sizes)
        expected.run()
        try:
            several = Life(seed, ranks, num_stages, block_sizes)
            several.run()
        except DeviceLostError as error:  # also of ranks that differ among themselves
            found.differ.append(f"life {seed}: {error}")
            ranks.end()
            continue
        found.num_lives += 1
        found.num_tokens += sum(map(len, several.got.values()))
        found.num_preemptions += several.num_preemptions
        if (several.got, several.finished) != (expected.got, expected.finished):
            first = next(n for n, ids in expected.got.items() if several.got.get(n) != ids)
            found.differ.append(f"life {seed}: of output {first} other ids than one rank's")
        if found.num_lives % TELL_EVERY == 0:
            print(f"{found.num_lives} lives, {len(found.differ)} differ", file=sys.stderr)
    found.seconds = time.monotonic() - started
    return found


def models_of(names: str, place: Path) -> Iterator[tuple[str, str | Path, dict[str, Any]]]:
    """Name, directory and settings of what --models asks for, one after the other."""
    for name in names.split(","):
        if name == SYNTHETIC:
            yield name, name, {"load_format": name, "step_ms": 0.0, "vocab_size": VOCAB_SIZE}
            continue
        groups = {"families": list(TINY), "mixtures": [*TINY_MOE, "gemma4_moe"]}
        for one in groups.get(name, [name] if name != "files" else []):
            sizes = {name: VOCAB_SIZE for name in TINY[one][2] if name.startswith("vocab_size")}
            more = {"vocab_size": VOCAB_SIZE, **sizes, **OWN_EOS}
            yield one, save_tiny(one, place / one, **more), {}
        for one in ("llama", "phi3") if name == "files" else ():  # phi3's are fused, too
            plain = save_tiny(one, place / f"wide-{one}", vocab_size=VOCAB_SIZE, **OWN_EOS, **WIDE)
            for file in FILES:
                path = place / f"{one}-{file}".replace(" ", "-").replace(",", "")
                path.mkdir()
                write(plain, path, *FORMATS[file])
                yield f"{one}, {file}", path, {}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layouts", default="2,1x2", help="2, 1x2, 2x2, 2e, with commas")
    parser.add_argument("--models", default="qwen3", help="families, mixtures, files, or names")
    parser.add_argument("--lives", type=int, default=1000, help="of each model")
    parser.add_argument("--seconds", type=float, default=1e6, help="when no life begins any more")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    until, num_wrong = time.monotonic() + arguments.seconds, 0
    print("| model | ranks | lives | tokens | preemptions | differ | seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="alike-") as place:
        for name, path, settings in models_of(arguments.models, Path(place)):
            for layout in map(Layout.of, arguments.layouts.split(",")):
                ones = {**settings, "compare_ranks": False}
                alone = Model(str(path), Layout(1, 1, False), ones)
                ranks = Model(str(path), layout, settings)
                try:
                    found = compare(alone, ranks, arguments.lives, until)
                except ValueError as error:  # cannot be shared so
                    print(f"| {name} | {layout} | refused: {str(error)[:150]} |", flush=True)
                    continue
                finally:
                    alone.end()
                    ranks.end()
                print(
                    f"| {name} | {layout} | {found.num_lives} | {found.num_tokens} | "
                    f"{found.num_preemptions} | {len(found.differ)} | {found.seconds:.0f} |",
                    *found.differ[:3],
                    sep="\n    ",
                    flush=True,
                )
                num_wrong += len(found.differ)
    assert not num_wrong, "a target is missed"


if __name__ == "__main__":
    main()
