"""DESIGN §4's property: whatever arrives, aborts, preempts or overlaps, every output is the one the
sequence would have produced alone, and no block or row leaks. And the property has teeth: each
deliberately broken invariant makes it fail."""

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from nanovllm.checkpoint.kv_layout import most_blocks
from nanovllm.config import EngineConfig
from nanovllm.core import scheduler as scheduler_module
from nanovllm.core.block_manager import BlockManager
from nanovllm.core.engine_core import EngineCore
from nanovllm.core.grammar import Matcher
from nanovllm.core.kept_masks import SentMasks, Vocabulary
from nanovllm.core.regex_place import RegexMasks
from nanovllm.core.scheduler import Scheduler
from nanovllm.core.sequence import ScheduledStep, Sequence, Status
from nanovllm.core.waiting import WaitingQueue
from nanovllm.executor.base import Executor
from nanovllm.protocol.messages import AddRequest
from nanovllm.protocol.plan import StepResult
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams
from tests.core.fake_executor import FakeExecutor, FakeFirstStage, reference
from tests.core.vocabulary import make_compiler, with_small_table
from tests.waiting import WAIT_S

NUM_SEEDS = 360
# Masks of one are good until its next; those of a core take each other's places all the time.
COMPILER = with_small_table(make_compiler(), num_kept=15, num_spare=6)
REFEREE = make_compiler()
GRAMMARS = [
    StructuredOutputsParams(regex="[a-z]{4,30}"),
    StructuredOutputsParams(regex="([a-z]{1,6} ){1,8}end"),
    StructuredOutputsParams(choice=["yes", "no", "perhaps", "perhaps not"]),
    StructuredOutputsParams(regex="the (first|second) of many: [0-9]{1,3} of them, and so it ends"),
    StructuredOutputsParams(regex="(key: [a-z]; )*"),
    StructuredOutputsParams(grammar='start: "(" start ")" | "[" start "]" | /[0-9]+/'),
    StructuredOutputsParams(json={"type": "array", "items": {"type": "string", "maxLength": 4}}),
]
NUM_CLIENTS = 3


class Simulation:
    """One random life of a core: its limits, its arrivals, its aborts.

    benchmarks/ranks_alike.py has lives with ranks that run a model.
    """

    samplings: tuple[dict[str, Any], ...] = ({},)  # what requests ask besides, in turn
    block_sizes: tuple[int, ...] = (1, 2, 4, 8)

    def __init__(
        self,
        seed: int,
        *,
        share_failing: float = 0.0,
        constrains: bool = True,
        windows: tuple[int | None, ...] = (None,),
        num_stages: int = 1,
    ) -> None:
        self.random = rng = random.Random(seed)
        self.kinds = [None, None, *range(len(GRAMMARS))] if constrains else [None]
        block_size = rng.choice(self.block_sizes)
        max_model_len = rng.choice([16, 40, 64])
        self.config = EngineConfig.from_kwargs(
            block_size=block_size,
            max_num_seqs=rng.randint(1, 6),
            max_num_batched_tokens=rng.choice([1, 3, 8, 64]),
            mixed_prefill_tokens=rng.choice([1, 4, 64]),
            long_prefill_token_threshold=rng.choice([0, 0, 1, 5]),
            scheduling_policy=rng.choice(["fair", "fcfs", "priority"]),
            enable_prefix_caching=rng.random() < 0.75,
            max_inflight_steps=1 + seed % 4,
            grammar_timeout_s=WAIT_S,
            pipeline_parallel_size=num_stages,
        )
        self.max_model_len = max_model_len
        step_tokens = self.config.scheduler.limits("fake").max_num_batched_tokens
        least = 1 + most_blocks(
            windows, max_model_len, block_size=block_size, step_tokens=step_tokens
        )
        executor = self.make_executor(
            num_blocks=least + rng.choice([0, 1, 4, 40]),
            max_model_len=max_model_len,
            fails=lambda plan: (
                rng.choice(["submit", "sample", "result"])
                if share_failing and rng.random() < share_failing
                else ""
            ),
            windows=windows,
        )
        self.info = executor.start()
        self.core = EngineCore(self.config, executor, self.info, COMPILER)
        self.prefixes = [
            [rng.randrange(1, 1000) for _ in range(rng.randint(4, 12))] for _ in range(2)
        ]
        self.expected: dict[int, list[int]] = {}
        self.got: dict[int, list[int]] = {}
        self.client_of: dict[int, int] = {}
        self.finished: dict[int, str] = {}
        self.next_number = 0
        self.num_preemptions = self.num_forced = self.most_freed = 0

    def make_executor(self, **life: Any) -> Executor:
        """life: keywords of `FakeExecutor`."""
        has_stages = self.config.parallel.pipeline_parallel_size > 1
        return (FakeFirstStage if has_stages else FakeExecutor)(self.config, **life)

    def run(self, num_requests: int = 12) -> None:
        rng = self.random
        for _ in range(5000):
            if num_requests and rng.random() < 0.25:
                num_requests -= 1
                self.add()
            self.disturb()
            self.step()
            if not num_requests and not self.core.busy and not self.core.num_unfinished:
                break
        assert not self.core.num_unfinished, "the core never came to rest"
        self.check_outputs()
        status = self.core.status(epoch="", num_clients=0)
        assert status.num_free_blocks == status.num_blocks
        assert (status.num_running, status.num_waiting, status.num_paused) == (0, 0, 0)
        assert (status.num_queued, status.num_queued_tokens) == (0, 0)
        self.num_preemptions = status.num_preemptions
        self.num_forced = status.num_forced_tokens

    def disturb(self) -> None:
        """Something that no sequence but an aborted one may notice."""
        rng = self.random
        if rng.random() < 0.03 and self.expected:
            self.abort(rng.choice(list(self.expected)))
        if rng.random() < 0.01:
            self.core.reset_prefix_cache()
        if rng.random() < 0.05:
            self.core.pause(rng.randrange(NUM_CLIENTS))
        if rng.random() < 0.2 or not self.core.busy:
            self.core.resume(rng.randrange(NUM_CLIENTS))

    def add(self) -> None:
        rng = self.random
        shared = rng.choice([[], *self.prefixes])
        kind = rng.choice(self.kinds)
        room = self.max_model_len - 1 - len(shared)
        prompt = shared + [rng.randrange(1, 1000) for _ in range(rng.randint(1, max(1, room // 2)))]
        asked: dict[str, Any] = {
            "n": rng.choice([1, 1, 1, 3]),
            "max_tokens": rng.choice([None, 1, 4, self.max_model_len]),
            "seed": rng.randrange(100),
            "stop_token_ids": rng.sample(range(1, 1000), 40),
            "structured_outputs": None if kind is None else GRAMMARS[kind],
        }
        params = SamplingParams(**asked | self.samplings[self.next_number % len(self.samplings)])
        length = self.max_model_len - len(prompt)
        num_outputs = min(length, params.max_tokens or length)
        stop = frozenset(params.stop_token_ids) | {0}
        for index in range(params.n):
            number = self.next_number + index
            assert params.seed is not None
            constraint = (
                None if kind is None else (REFEREE, REFEREE.compile(GRAMMARS[kind]).matcher())
            )
            self.expected[number] = reference(
                prompt, params.seed + index, num_outputs, stop, constraint
            )
            self.got[number] = []
        given: list[int] = []
        if params.n == 1 and rng.random() < 0.2:  # the first tokens were generated before
            whole = self.expected[self.next_number]
            given = whole[: rng.randrange(len(whole))]
            self.expected[self.next_number] = whole[len(given) :]
        request = AddRequest(
            self.next_number,
            prompt,
            params,
            output_token_ids=given,
            priority=rng.randint(0, 2),
            cache_salt=rng.choice([None, None, "a"]),
        )
        client_id = self.next_number % NUM_CLIENTS
        for index in range(params.n):
            self.client_of[self.next_number + index] = client_id
        self.core.add(client_id, request)
        self.next_number += params.n
        compilations = self.core.grammars
        while compilations.num_waiting and not compilations.has_news:
            time.sleep(1e-4)  # so that a seed is the same life every time

    def abort(self, number: int) -> None:
        for sequence in self.core.abort(self.client_of[number], [number]):
            assert sequence.number == number
            self.finished[number] = "abort"

    def step(self) -> None:
        outputs = self.core.step()
        scheduler = scheduler_of(self.core)
        scheduler.check_invariants()
        freed = (one.block_ids.count(0) for one in scheduler.running if one.capacity)
        self.most_freed = max(self.most_freed, *freed, 0)
        if outputs is None:
            return
        for sequence, token_id in zip(outputs.sequences, outputs.token_ids, strict=True):
            assert sequence.number not in self.finished, "output after the end"
            self.got[sequence.number].append(token_id)
        for sequence in outputs.finished + outputs.failed:
            assert sequence.finish_reason is not None
            assert bool(sequence.failure) == (sequence in outputs.failed)
            if sequence.failure:
                assert "step" in sequence.failure.message
                self.finished[sequence.number] = "error"
                continue
            self.finished[sequence.number] = sequence.finish_reason

    def check_outputs(self) -> None:
        assert self.finished.keys() == self.expected.keys()
        for number, expected in self.expected.items():
            got = self.got[number]
            if self.finished[number] in ("abort", "error"):
                assert got == expected[: len(got)]
            else:
                assert got == expected


def scheduler_of(core: EngineCore) -> Scheduler:
    return core.scheduler


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_outputs_equal_the_reference_and_nothing_leaks(depth: int) -> None:
    num_preemptions = num_forced = 0
    for seed in range(depth - 1, NUM_SEEDS, 4):
        simulation = Simulation(seed)
        assert simulation.config.scheduler.max_inflight_steps == depth
        try:
            simulation.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        num_preemptions += simulation.num_preemptions
        num_forced += simulation.num_forced
    assert num_preemptions > 50, "the simulations must preempt to mean something"
    assert num_forced > 500, "and force tokens: the reference samples each of them"


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_stages_know_the_ids_of_what_they_run(depth: int) -> None:
    """In the first stage of a pipeline, to which sampled ids come with later plans."""
    num_preemptions = num_forced = 0
    for seed in range(depth - 1, NUM_SEEDS // 2, 4):
        simulation = Simulation(seed, num_stages=2)
        try:
            simulation.run()
        except (AssertionError, IndexError) as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        num_preemptions += simulation.num_preemptions
        num_forced += simulation.num_forced
    assert num_preemptions > 20, "the simulations must preempt to mean something"
    assert num_forced > 200, "and force tokens"


def windows_of(seed: int) -> tuple[int | None, ...]:
    """Of some groups, of which at least one has a window."""
    rng = random.Random(seed)
    windows = [rng.choice([None, 2, 3, 5, 9, 20]) for _ in range(rng.randint(0, 2))]
    return (*windows, rng.choice([2, 3, 5, 9, 20]))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_layers_with_windows_keep_what_they_see(depth: int) -> None:
    num_preemptions = num_hits = num_outlived = 0
    for seed in range(depth - 1, NUM_SEEDS, 4):
        simulation = Simulation(
            seed, constrains=False, share_failing=0.02 * (seed % 3), windows=windows_of(seed)
        )
        try:
            simulation.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        num_preemptions += simulation.num_preemptions
        num_hits += simulation.core.blocks.num_hits
        num_outlived += simulation.most_freed
    assert num_preemptions > 50 and num_hits > 500, (num_preemptions, num_hits)
    assert num_outlived > 200, "sequences must outgrow their windows to mean something"


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_failed_steps_fail_their_sequences_and_nothing_else(depth: int) -> None:
    endings: Counter[str] = Counter()
    for seed in range(depth - 1, NUM_SEEDS // 2, 4):
        simulation = Simulation(seed, share_failing=0.08)
        try:
            simulation.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        endings.update(simulation.finished.values())
    assert min(endings["error"], endings["length"], endings["stop"]) > 20, endings


def keep_results_of_the_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 5: results of finished sequences are dropped."""
    update = Scheduler.update

    def broken(self: Scheduler, step: ScheduledStep, result: StepResult) -> object:
        for sequence in step.sampled:
            if sequence.status is Status.FINISHED:
                sequence.status = Status.RUNNING
        return update(self, step, result)

    monkeypatch.setattr(Scheduler, "update", broken)


def readmit_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 5: a preempted sequence waits until nothing of it is pending."""
    push = WaitingQueue.push

    def broken(self: WaitingQueue, sequence: Sequence) -> None:
        sequence.num_pending = 0
        push(self, sequence)

    monkeypatch.setattr(WaitingQueue, "push", broken)


def register_uncomputed_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 3: only computed blocks are entered in the prefix map."""
    hold = BlockManager.hold

    def broken(
        self: BlockManager, sequence: Sequence, shared: list[int], *, num_tokens: int
    ) -> None:
        hold(self, sequence, shared, num_tokens=num_tokens)
        if self.enable_prefix_caching:
            sequence.num_computed = len(sequence.token_ids)
            self.register(sequence)

    monkeypatch.setattr(BlockManager, "hold", broken)


def hit_whole_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hit is capped at num_tokens - 1: something must be left to sample from."""

    def broken(self: BlockManager, sequence: Sequence) -> list[int]:
        sequence.token_ids.append(1)
        found = cached_prefix(self, sequence)
        sequence.token_ids.pop()
        return found

    cached_prefix = BlockManager.cached_prefix
    monkeypatch.setattr(BlockManager, "cached_prefix", broken)


def believe_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hits compare tokens: with a hash that always collides, trusting it must go wrong."""
    collide(monkeypatch)
    monkeypatch.setattr(BlockManager, "_message", lambda self, sequence, index: b"")


def collide(monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(message: bytes, seed: int) -> bytes:
        return bytes([sum(message) % 2]) * 16

    monkeypatch.setattr("nanovllm.core.block_manager.xxhash.xxh3_128_digest", digest)


def trust_prefixes_of_failed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed step, no prefix may be believed that it was to compute."""
    monkeypatch.setattr(ScheduledStep, "admitted_on_a_prefix", lambda self: [])


def believe_failed_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Likewise for those that come later."""
    monkeypatch.setattr(BlockManager, "reset_prefix_cache", lambda self: True)


@pytest.mark.parametrize("sabotage", [trust_prefixes_of_failed_steps, believe_failed_blocks])
def test_a_careless_recovery_is_noticed(
    sabotage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(NUM_SEEDS):
            Simulation(seed, share_failing=0.3).run()


def forget_to_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """One function frees blocks and row: without it they leak."""
    monkeypatch.setattr(BlockManager, "release", lambda self, sequence: None)


def sample_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 6: the second half of a step waits for the ids that its masks depend on."""
    monkeypatch.setattr(ScheduledStep, "awaits_ids", False)


def forget_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constrained sequence samples only what its grammar allows."""
    take_masks = EngineCore._take_masks
    monkeypatch.setattr(
        EngineCore, "_take_masks", lambda self, step: (None, *take_masks(self, step)[1:])
    )


def keep_what_was_sampled_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tokens are forced, the step's own sample is dropped."""
    update = Scheduler.update

    def broken(self: Scheduler, step: ScheduledStep, result: StepResult) -> object:
        step.forced = frozenset()
        return update(self, step, result)

    monkeypatch.setattr(Scheduler, "update", broken)


def forget_to_tell_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced tokens are sent to the row, which has sampled something of its own there."""
    monkeypatch.setattr(Scheduler, "_tell_known", lambda step, sequence: None)


def take_places_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kept mask is given where the same may follow, and nowhere else."""
    monkeypatch.setattr(RegexMasks, "key", lambda self, what: 0)


def share_one_matcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sequence has a place of its own in its grammar."""
    monkeypatch.setattr(Matcher, "copy", lambda self: self)


def keep_in_lines_that_are_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask is not kept in place of another that the same step needs."""
    keep = Vocabulary.keep
    monkeypatch.setattr(Vocabulary, "keep", lambda *args, in_use: keep(*args, in_use=[]))


def send_lines_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been written again is sent again."""
    monkeypatch.setattr(Vocabulary, "note_write", lambda self, line: None)


def believe_that_lines_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of a step that has failed may not have come."""
    monkeypatch.setattr(SentMasks, "forget", lambda self: None)


@pytest.mark.parametrize(
    "sabotage",
    [
        keep_in_lines_that_are_in_use,
        send_lines_once,
        believe_that_lines_have_come,
        sample_without_waiting,
        forget_the_masks,
        keep_what_was_sampled_instead,
        forget_to_tell_rows,
        share_one_matcher,
        take_places_for_one,
        keep_results_of_the_finished,
        readmit_early,
        register_uncomputed_blocks,
        hit_whole_prompts,
        believe_every_key,
        forget_to_free,
    ],
)
def test_a_broken_invariant_is_noticed(
    sabotage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    share_failing = 0.08 if sabotage is believe_that_lines_have_come else 0.0
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError)):
        for seed in range(NUM_SEEDS):
            Simulation(seed, share_failing=share_failing).run()


def free_within_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the next token sees is kept."""
    slide = BlockManager.slide

    def broken(self: BlockManager, sequence: Sequence) -> None:
        sequence.num_computed += self.block_size
        slide(self, sequence)
        sequence.num_computed -= self.block_size

    monkeypatch.setattr(BlockManager, "slide", broken)


def hit_without_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix is hit where what lies in the windows at its end is there."""
    monkeypatch.setattr(BlockManager, "_places_seen", lambda self, end: iter(()))


def free_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits is counted on blocks being freed."""
    monkeypatch.setattr(BlockManager, "slide", lambda self, sequence: None)


@pytest.mark.parametrize("sabotage", [free_within_the_window, hit_without_the_window, free_nothing])
def test_a_careless_window_is_noticed(
    sabotage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        for seed in range(NUM_SEEDS):
            Simulation(seed, constrains=False, windows=windows_of(seed)).run()


def test_colliding_keys_cost_misses_only(monkeypatch: pytest.MonkeyPatch) -> None:
    collide(monkeypatch)
    for seed in range(60):
        Simulation(seed).run()


def test_the_simulation_uses_the_real_scheduler() -> None:
    assert isinstance(scheduler_of(Simulation(0).core), scheduler_module.Scheduler)
