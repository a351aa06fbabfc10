"""Groups of ranks: the ids of one rank, and nothing left behind by whatever becomes of a rank."""

import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from nanovllm.config import EngineConfig
from nanovllm.core.engine_core import EngineCore
from nanovllm.executor.base import Executor
from nanovllm.executor.group import GroupExecutor
from nanovllm.executor.inline import inline_executor
from nanovllm.protocol.messages import AddRequest
from nanovllm.protocol.plan import DeviceLostError, WorkerInfo
from nanovllm.sampling_params import SamplingParams
from tests.conftest import save_tiny
from tests.core.fake_executor import VOCAB_SIZE
from tests.e2e.processes import alive, rank_children
from tests.executor.lives import ALONE, OWN_EOS, Layout, Life, Model
from tests.executor.test_inline import generate
from tests.worker.planning import make_masks, make_plan, new_row, run_step
from tests.worker.quant.layouts import FORMATS, write
from tests.worker.quant.test_layouts import WIDE

BLOCK_SIZE = 4
NUM_BLOCKS = 18  # few: sequences are preempted
NUM_LIVES = 2  # of each kind and model; seeds are fixed
NUM_REQUESTS = 6  # of a life of the property test
KINDS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 2},
    {"temperature": 1.0, "logit_bias": {5: 2.0, 130: 3.0}, "min_tokens": 2},
]


def config_of(model: str, size: int = 1, **settings: Any) -> EngineConfig:
    values: dict[str, Any] = {"dtype": "float32", "device": "cpu", "block_size": 4}
    values |= {"max_num_seqs": 4, "max_model_len": 64, "num_gpu_blocks_override": NUM_BLOCKS}
    values |= {"max_num_batched_tokens": 16, "max_inflight_steps": 2, "compare_ranks": True}
    values |= settings
    return EngineConfig.from_kwargs(model=model, tensor_parallel_size=size, **values)


def begin(executor: Executor) -> WorkerInfo:
    info = executor.start()
    executor.allocate(info.num_blocks)
    return info


ENGINES: list[tuple[str, str, dict[str, Any]]] = [
    ("qwen3_moe", "2", {}),
    ("olmoe_renormalized", "2e", {}),
    ("olmo2", "4", {}),
    ("llama3", "1x3", {"quantization": "int8"}),
    ("phi3", "2x2", {}),
]
FEW_IDS = "olmo2"  # so few that of 4 ranks two have none


@dataclass
class Engines:
    """One rank and several, of the same model."""

    alone: Model
    ranks: Model

    @property
    def each(self) -> list[tuple[Executor, WorkerInfo]]:
        return [one.with_blocks(BLOCK_SIZE) for one in (self.alone, self.ranks)]


@pytest.fixture(scope="module", params=ENGINES, ids=lambda one: "-".join(one[:2]))
def engines(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Engines]:
    """Of 4 ranks two have the same KV head; of 5 experts that are spread the second rank has three;
    of stages the last has a tied head. What is fused in Phi-3's files is packed besides: ranks of
    stages cut each part along its groups."""
    name, text, settings = request.param
    layout, path = Layout.of(text), tmp_path_factory.mktemp("model")
    if name == FEW_IDS:
        path = tiny_checkpoint(name)
    else:
        wide = WIDE if name == "phi3" else {}
        save_tiny(name, path, vocab_size=VOCAB_SIZE, **OWN_EOS, **wide)
    if name == "phi3":
        packed = tmp_path_factory.mktemp("packed")
        write(path, packed, *FORMATS["gptq 4 16"])
        path = packed
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    alone = Model(str(path), ALONE, {**settings, "compare_ranks": False})
    engines = Engines(alone, Model(str(path), layout, settings))
    (_, one), (_, many) = engines.each
    assert (many.num_blocks, many.kv_windows) == (one.num_blocks, one.kv_windows)
    assert f"{layout.each * layout.stages} ranks" in many.notes[0]
    yield engines
    engines.alone.end()
    engines.ranks.end()


def live(
    executor: Executor, config: EngineConfig, info: WorkerInfo, seed: int, preempted: list[int]
) -> dict[int, list[Any]]:
    """A random life of a core: what each sequence got; apart from it, by -1 less its number, of its
    prompt, as others' chunks may be larger. preempted: takes up how often."""
    rng = random.Random(seed)
    core = EngineCore(config, executor, info)
    prefixes = [[rng.randrange(3, 160) for _ in range(9)] for _ in range(2)]
    got: dict[int, list[Any]] = {}
    left, number = 8, 0
    while left or core.busy:
        if left and rng.random() < 0.4:
            left -= 1
            prompt = rng.choice(prefixes) + [
                rng.randrange(3, 160) for _ in range(rng.choice((1, 25)))
            ]
            params = SamplingParams(
                seed=number, max_tokens=rng.choice((3, 25)), **rng.choice(KINDS)
            )
            core.add(0, AddRequest(number, prompt, params))
            got[number], got[-1 - number] = [], []
            number += 1
        outputs = core.step() if core.busy else None
        if outputs is None:
            continue
        assert not outputs.failed
        for index, (sequence, token_id) in enumerate(
            zip(outputs.sequences, outputs.token_ids, strict=True)
        ):
            got[sequence.number].append(token_id)
            if (found := outputs.logprobs.get(index)) is not None:
                got[sequence.number] += [found.top_ids, pytest.approx(found.logprob, abs=1e-4)]
        for sequence, prompt_logprobs in outputs.prompt_logprobs:
            got[-1 - sequence.number] += [
                pytest.approx(one.logprob, abs=1e-4) for one in prompt_logprobs
            ]
    preempted.append(core.scheduler.num_preemptions)
    return got


def numbers(got: dict[int, list[Any]]) -> dict[int, list[Any]]:
    """With what `approx` expects, which only compares with numbers."""
    return {
        key: [getattr(value, "expected", value) for value in values] for key, values in got.items()
    }


def test_random_lives_get_the_ids_of_one_rank(engines: Engines) -> None:
    """Chunks, prefixes, preemption, every kind of sampling; each step's ids are compared across
    ranks, too."""
    stages = engines.ranks.layout.stages
    configs = config_of(""), config_of("", pipeline_parallel_size=stages)
    preempted: list[int] = []
    for seed in range(NUM_LIVES):
        expected, found = (
            live(executor, config, replace(info, num_blocks=NUM_BLOCKS), seed, preempted)
            for (executor, info), config in zip(engines.each, configs, strict=True)
        )
        assert expected == numbers(found), f"seed {seed}"
    assert sum(preempted), "lives must preempt to mean something"


def test_lives_of_the_property_test_get_the_ids_of_one_rank(engines: Engines) -> None:
    """With grammars, forks, aborts and pauses, and limits of every size."""
    (_, info), _ = engines.each
    lives = range(NUM_LIVES) if info.vocab_size == VOCAB_SIZE else ()  # else grammars know more ids
    num_forced = 0
    for seed in lives:
        expected, found = (
            Life(seed, one, engines.ranks.layout.stages, (BLOCK_SIZE,))
            for one in (engines.alone, engines.ranks)
        )
        expected.run(NUM_REQUESTS)
        found.run(NUM_REQUESTS)
        assert (found.got, found.finished) == (expected.got, expected.finished), f"seed {seed}"
        num_forced += found.num_forced
    assert num_forced or not lives, "grammars must force tokens to mean something"


def test_masks_reach_all_ranks(engines: Engines) -> None:
    results: list[list[int]] = []
    for executor, info in engines.each:
        plan = make_plan(0, [(1, 0, 5)], new_rows=[new_row(1, [5, 6, 7, 8, 9], block_ids=[1, 2])])
        masks = make_masks({0: [77, 131]}, vocab_size=info.vocab_size)
        results.append(run_step(executor, plan, masks).result().token_ids)
    assert results[0] == results[1]
    assert results[0][0] in (77, 131)


def test_sizes_that_do_not_divide_are_refused_with_those_that_would(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    group = GroupExecutor(config_of(str(tiny_checkpoint("llama")), 3), lambda *_: None)
    started_before = rank_children(os.getpid())
    with pytest.raises(ValueError, match=r"tensor_parallel_size: .*4 heads.* use one of 1, 2, 4"):
        group.start()
    group.shutdown()
    assert rank_children(os.getpid()) == started_before


def test_more_stages_than_layers_are_refused_with_how_many_would_do(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    config = config_of(str(tiny_checkpoint("llama")), pipeline_parallel_size=4)
    group = GroupExecutor(config, lambda *_: None)
    with pytest.raises(ValueError, match=r"pipeline_parallel_size: .*3 layers.* use at most 3"):
        group.start()
    group.shutdown()


def test_a_stage_that_dies_while_the_next_waits_for_it(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    config = config_of(str(tiny_checkpoint("llama")), pipeline_parallel_size=2)
    group = GroupExecutor(config, lambda *_: None)
    begin(group)
    first, second = [rank.process.pid for rank in group._ranks]
    os.kill(first, signal.SIGSTOP)  # what it is sent it never runs
    plan = make_plan(0, [(1, 0, 5)], new_rows=[new_row(1, [5, 6, 7, 8, 9], block_ids=[1, 2])])
    step = run_step(group, plan)
    os.kill(first, signal.SIGKILL)
    with pytest.raises(DeviceLostError, match=r"rank 0 .*SIGKILL"):
        step.result()
    group.shutdown()
    assert not alive(first) and not alive(second)


@pytest.mark.model
def test_nine_heads_on_three_ranks() -> None:
    """SmolLM2, whose GGUF file is read in slices; each rank has one of its 3 KV heads."""
    answers = []
    for size in (3, 1):
        config = config_of("smollm2", size)
        executor = (GroupExecutor if size > 1 else inline_executor)(config, lambda *_: None)
        begin(executor)
        kinds = SamplingParams(temperature=0.0), SamplingParams(temperature=0.9)
        answers.append(
            [
                generate(
                    executor,
                    new_row(0, [504, 3575, 282, 4649, 314], params, seed=3),
                    chunk=3,
                    num_outputs=10,
                )
                for params in kinds
            ]
        )
        executor.shutdown()
    assert answers[0] == answers[1]
