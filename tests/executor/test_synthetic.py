"""The synthetic model: ids depend on every token before and on nothing else; steps take time."""

from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm.config import EngineConfig
from nanovllm.executor import synthetic
from nanovllm.executor.synthetic import SyntheticExecutor
from nanovllm.protocol.plan import KnownTokens, StepPlan, StepResult
from nanovllm.sampling_params import SamplingParams
from tests.worker.planning import make_plan, new_row, run_step

PROMPT = [5, 6, 7, 8]
SEEDED = SamplingParams(seed=3)
GREEDY = SamplingParams(temperature=0.0)


def make_executor(**settings: Any) -> SyntheticExecutor:
    values: dict[str, Any] = {"step_ms": 0.0, "vocab_size": 1000, "max_num_seqs": 8, **settings}
    config = EngineConfig.from_kwargs(load_format="synthetic", **values)
    return SyntheticExecutor(config, lambda phase, progress: None)


def outputs(
    known: list[int], count: int, *, row: int = 0, params: SamplingParams = SEEDED, seed: int = 3
) -> list[int]:
    """`count` ids after `known`, which is admitted at once, one step each."""
    executor = make_executor()
    ids: list[int] = []
    for step in range(count):
        length = len(known) + step
        new = new_row(row, known, params, num_prompt_tokens=len(PROMPT), seed=seed)
        plan = make_plan(step, [(row, length - 1, 1)], new_rows=[] if step else [new])
        ids += run_step(executor, plan).result().token_ids
    return ids


def test_a_sequence_can_be_cut_anywhere_and_continued_in_another_row() -> None:
    whole = outputs(PROMPT, 12)
    assert len(set(whole)) > 8 and all(0 <= token_id < 1000 for token_id in whole)
    for cut in range(12):
        assert outputs(PROMPT + whole[:cut], 12 - cut, row=5) == whole[cut:]


def test_one_wrong_lost_repeated_or_swapped_token_changes_what_follows() -> None:
    whole = outputs(PROMPT, 8)
    known, rest = PROMPT + whole[:4], whole[4:]
    for damaged in (
        [*known[:5], known[5] + 1, *known[6:]],
        known[:-1],
        [*known, known[-1]],
        [*known[:4], known[5], known[4], *known[6:]],
        [0, *known],
    ):
        assert outputs(damaged, 4) != rest


def test_known_tokens_take_the_place_of_what_was_sampled_last() -> None:
    known, forced = outputs(PROMPT, 3), [9, 8, 7]
    executor = make_executor()
    new = new_row(1, PROMPT + known, SEEDED, num_prompt_tokens=len(PROMPT), seed=3)
    run_step(executor, make_plan(0, [(1, 0, 7)], new_rows=[new])).result()
    plan = make_plan(1, [(1, 7, 3)])
    plan.known_tokens.append(KnownTokens(1, 7, forced))
    assert run_step(executor, plan).result().token_ids == outputs(PROMPT + known + forced, 1)


def test_the_seed_counts_unless_it_is_greedy() -> None:
    assert outputs(PROMPT, 8, seed=4) != outputs(PROMPT, 8)
    greedy = outputs(PROMPT, 8, params=GREEDY, seed=4)
    assert greedy == outputs(PROMPT, 8, params=GREEDY, seed=5) != outputs(PROMPT, 8)


def test_log_probabilities_come_only_where_they_were_asked_for() -> None:
    executor = make_executor()
    asking = SamplingParams(logprobs=2, prompt_logprobs=0)
    rows = [new_row(0, PROMPT, asking), new_row(1, PROMPT, SEEDED)]
    result = run_step(executor, make_plan(0, [(0, 0, 4), (1, 0, 4)], new_rows=rows)).result()
    assert list(result.logprobs) == [0] and list(result.prompt_logprobs) == [0]
    one = result.logprobs[0]
    assert one.token_id == result.token_ids[0] == one.top_ids[0] and len(one.top_logprobs) == 2
    assert [entry.token_id for entry in result.prompt_logprobs[0]] == PROMPT[1:]
    # The row's next sequence does not ask.
    again = make_plan(1, [(0, 0, 4)], new_rows=[new_row(0, PROMPT, SEEDED)])
    assert run_step(executor, again).result().logprobs == {}


def test_steps_take_their_time_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    clock = SimpleNamespace(monotonic=lambda: now, sleep=sleep)
    monkeypatch.setattr(synthetic, "time", clock)
    executor = make_executor(step_ms=300.0)
    empty = StepPlan(0, [], [], [], [], [], [])
    handles = [run_step(executor, empty) for _ in range(3)]
    assert now == 100.0, "submitting does not wait"
    results: list[StepResult] = [handle.result() for handle in handles]
    assert now == pytest.approx(100.9)
    assert results[0].token_ids == []


def test_what_it_says_of_itself() -> None:
    info = make_executor(max_model_len=77, num_gpu_blocks_override=9).start()
    assert (info.max_model_len, info.num_blocks, info.vocab_size) == (77, 9, 1000)
