"""What a step holds: budget, order, chunks, preemption, forks, and how sequences end."""

from typing import Any

import pytest

from nanovllm.config import EngineConfig
from nanovllm.core.block_manager import BlockManager
from nanovllm.core.scheduler import Scheduler
from nanovllm.core.sequence import (
    ScheduledStep,
    SchedulingFailedError,
    Sequence,
    Status,
    StepOutputs,
)
from nanovllm.protocol.plan import PositionLogprobs, StepResult, TokenLogprobs
from nanovllm.sampling_params import SamplingParams

EOS = 0


def make_scheduler(*, num_blocks: int = 100, max_model_len: int = 64, **limits: Any) -> Scheduler:
    config = EngineConfig.from_kwargs(block_size=4, **limits)
    blocks = BlockManager(
        num_blocks=num_blocks,
        block_size=4,
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )
    return Scheduler(
        config.limits("cpu"),
        blocks,
        max_model_len=max_model_len,
        eos_token_ids=frozenset([EOS]),
    )


def add(
    scheduler: Scheduler, prompt: list[int], *, number: int = 0, priority: int = 0, **params: Any
) -> Sequence:
    params = {"max_tokens": 8, **params}
    sequence = Sequence(0, number, list(prompt), SamplingParams(**params))
    scheduler.add(sequence, priority=priority)
    return sequence


def answer(scheduler: Scheduler, step: ScheduledStep, *token_ids: int) -> StepOutputs:
    outputs = scheduler.update(step, StepResult(step.plan.step, list(token_ids)))
    scheduler.check_invariants()
    return outputs


def schedule(scheduler: Scheduler) -> ScheduledStep:
    step = scheduler.schedule()
    assert step is not None
    scheduler.check_invariants()
    return step


def test_a_long_prompt_is_chunked_because_the_budget_ends() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    sequence = add(scheduler, list(range(1, 26)))
    counts, samples = [], []
    for _ in range(3):
        step = schedule(scheduler)
        counts.append(step.plan.num_scheduled)
        samples.append(step.plan.sampling)
        answer(scheduler, step, *[5] * len(step.sampled))
    assert counts == [[10], [10], [5]]
    assert samples == [[], [], [0]]
    assert sequence.token_ids[-1] == 5


def test_decodes_and_chunks_share_a_step_running_first() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, [1, 2, 3])
    answer(scheduler, schedule(scheduler), 9)
    add(scheduler, list(range(1, 21)), number=1)
    step = schedule(scheduler)
    assert step.plan.num_scheduled == [1, 7]
    assert step.plan.sampling == [0]


def test_the_share_of_one_prompt_can_be_capped() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16, long_prefill_token_threshold=6)
    add(scheduler, list(range(1, 21)))
    add(scheduler, list(range(31, 51)), number=1)
    assert schedule(scheduler).plan.num_scheduled == [6, 6]


def test_seats_are_limited() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for number in range(3):
        add(scheduler, [number + 1], number=number)
    step = schedule(scheduler)
    assert len(step.plan.rows) == 2 and len(scheduler.waiting) == 1


def test_counts_run_ahead_of_ids_and_limits_hold() -> None:
    scheduler = make_scheduler()
    sequence = add(scheduler, [1, 2, 3], max_tokens=2)
    first, second = schedule(scheduler), schedule(scheduler)
    assert second.plan.num_computed == [3] and sequence.num_pending == 2
    assert scheduler.schedule() is None, "max_tokens are under way: there is no third step"
    answer(scheduler, first, 7)
    outputs = answer(scheduler, second, 8)
    assert outputs.finished == [sequence] and sequence.finish_reason == "length"
    assert sequence.token_ids == [1, 2, 3, 7, 8]


def test_results_after_the_end_are_dropped() -> None:
    scheduler = make_scheduler()
    sequence = add(scheduler, [1, 2, 3])
    first, second = schedule(scheduler), schedule(scheduler)
    assert answer(scheduler, first, EOS).finished == [sequence]
    late = answer(scheduler, second, 9)
    assert late.token_ids == [] and late.finished == []
    assert sequence.token_ids == [1, 2, 3, EOS]


def test_eos_has_no_stop_reason_and_stop_token_ids_have() -> None:
    scheduler = make_scheduler()
    by_eos = add(scheduler, [1], number=0, stop_token_ids=[9])
    by_id = add(scheduler, [1], number=1, stop_token_ids=[9])
    ignoring = add(scheduler, [1], number=2, ignore_eos=True)
    answer(scheduler, schedule(scheduler), EOS, 9, EOS)
    assert (by_eos.finish_reason, by_eos.stop_reason) == ("stop", None)
    assert (by_id.finish_reason, by_id.stop_reason) == ("stop", 9)
    assert ignoring.finish_reason is None


def test_nothing_stops_before_min_tokens() -> None:
    scheduler = make_scheduler()
    sequence = add(scheduler, [1], min_tokens=2)
    answer(scheduler, schedule(scheduler), EOS)
    assert sequence.status is Status.RUNNING
    answer(scheduler, schedule(scheduler), EOS)
    assert sequence.finish_reason == "stop"


def test_max_model_len_ends_what_max_tokens_does_not() -> None:
    scheduler = make_scheduler(max_model_len=6)
    sequence = add(scheduler, [1, 2, 3, 4], max_tokens=None)
    answer(scheduler, schedule(scheduler), 5)
    assert answer(scheduler, schedule(scheduler), 5).finished == [sequence]
    assert sequence.finish_reason == "length"


def test_the_last_to_come_is_preempted_and_recomputed() -> None:
    # 5 usable blocks of 4: two sequences of 7 and 8 tokens fit until both have grown.
    scheduler = make_scheduler(num_blocks=6, max_model_len=16, enable_prefix_caching=False)
    old = add(scheduler, list(range(1, 8)), number=0)
    young = add(scheduler, list(range(11, 18)), number=1)
    while young.num_preemptions == 0:
        step = schedule(scheduler)
        answer(scheduler, step, *[5] * len(step.sampled))
    assert old.status is Status.RUNNING and young.status is Status.WAITING
    assert young.block_ids == [] and young.num_computed == 0
    generated = list(young.token_ids)
    while old.status is Status.RUNNING:
        step = schedule(scheduler)
        answer(scheduler, step, *[5] * len(step.sampled))
    step = schedule(scheduler)
    assert step.plan.new_rows[0].token_ids == generated
    assert step.plan.new_rows[0].num_prompt_tokens == 7


def test_a_preempted_sequence_waits_for_its_pending_ids() -> None:
    scheduler = make_scheduler(max_num_seqs=1, scheduling_policy="priority")
    sequence = add(scheduler, [1, 2], priority=1)
    inflight = schedule(scheduler)
    urgent = add(scheduler, [3, 4], number=1, priority=0, max_tokens=1)
    step = schedule(scheduler)
    assert step.sequences == [urgent] and sequence.num_pending == 1
    answer(scheduler, inflight, 7)
    answer(scheduler, step, 7)
    assert schedule(scheduler).plan.new_rows[0].token_ids == [1, 2, 7]


def test_a_higher_priority_preempts_and_an_equal_one_waits() -> None:
    scheduler = make_scheduler(max_num_seqs=1, scheduling_policy="priority")
    low = add(scheduler, [1], priority=5)
    answer(scheduler, schedule(scheduler), 7)
    same = add(scheduler, [2], number=1, priority=5)
    answer(scheduler, schedule(scheduler), 7)
    assert same.status is Status.WAITING
    high = add(scheduler, [3], number=2, priority=1)
    assert schedule(scheduler).sequences == [high]
    assert low.status is Status.WAITING and low.num_preemptions == 1


def test_fcfs_ignores_priority() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    first = add(scheduler, [1], priority=5)
    add(scheduler, [2], number=1, priority=0)
    assert schedule(scheduler).sequences == [first]


def test_forks_share_the_full_blocks_of_the_prompt_even_without_the_cache() -> None:
    scheduler = make_scheduler(enable_prefix_caching=False, max_num_batched_tokens=8)
    leader = add(scheduler, list(range(1, 11)))
    fork = Sequence(0, 1, list(range(1, 11)), SamplingParams(max_tokens=8))
    scheduler.add(fork, leader=leader)
    answer(scheduler, schedule(scheduler))
    assert fork.row == -1, "the prompt is not computed yet"
    step = schedule(scheduler)
    assert step.sequences == [leader, fork]
    assert fork.block_ids[:2] == leader.block_ids[:2] and fork.block_ids[2] != leader.block_ids[2]
    assert step.plan.num_computed == [8, 8]


@pytest.mark.parametrize("length", range(3, 14))
def test_forks_run_the_last_token_of_the_prompt_and_what_is_no_full_block(length: int) -> None:
    scheduler = make_scheduler(enable_prefix_caching=False)
    prompt = list(range(1, length + 1))
    leader = add(scheduler, prompt)
    forks = [Sequence(0, number, list(prompt), SamplingParams(max_tokens=8)) for number in (1, 2)]
    for fork in forks:
        scheduler.add(fork, leader=leader)
    answer(scheduler, schedule(scheduler), 5, 5, 5)
    shared = (length - 1) // 4
    for fork in forks:
        assert fork.num_cached_tokens == 4 * shared
        assert fork.block_ids[:shared] == leader.block_ids[:shared]
        assert not set(fork.block_ids[shared:]) & set(leader.block_ids)


def test_forks_go_on_without_their_leader() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    leader = add(scheduler, list(range(1, 11)))
    fork = Sequence(0, 1, list(range(1, 11)), SamplingParams(max_tokens=8))
    scheduler.add(fork, leader=leader)
    step = schedule(scheduler)
    scheduler.finish(leader, "abort")
    answer(scheduler, step)
    assert schedule(scheduler).sequences == [fork]


def test_prefix_hits_need_no_result_and_are_counted_once() -> None:
    scheduler = make_scheduler()
    add(scheduler, list(range(1, 11)))
    add(scheduler, list(range(1, 11)), number=1)
    step = schedule(scheduler)
    assert step.plan.num_computed == [0, 8] and step.plan.num_scheduled == [10, 2]
    assert [s.num_cached_tokens for s in answer(scheduler, step, 5, 5).started] == [0, 8]
    answer(scheduler, schedule(scheduler), 6, 6)
    blocks = scheduler._blocks
    assert (blocks.num_queries, blocks.num_hits, scheduler.num_prompt_tokens) == (20, 8, 20)


def test_a_prefix_of_a_plan_that_was_given_up_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = make_scheduler()
    first = add(scheduler, list(range(1, 11)))
    add(scheduler, [20, 21], number=1)
    advance = scheduler._advance

    def fail_at_the_second(step: ScheduledStep, sequence: Sequence, num_new: int) -> None:
        if sequence is not first:
            raise RuntimeError("no")
        advance(step, sequence, num_new)

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "_advance", fail_at_the_second)
        with pytest.raises(SchedulingFailedError):
            scheduler.schedule()
    scheduler.check_invariants()
    assert first.num_pending == 0 and first.status is Status.WAITING
    scheduler.finish(first, "abort")
    add(scheduler, list(range(1, 11)), number=2)
    step = schedule(scheduler)
    assert sorted(step.plan.num_scheduled) == [2, 10] and step.plan.num_computed == [0, 0]


def test_prompt_logprobs_compute_every_position() -> None:
    scheduler = make_scheduler()
    add(scheduler, list(range(1, 11)))
    schedule(scheduler)
    add(scheduler, list(range(1, 11)), number=1, prompt_logprobs=0)
    step = schedule(scheduler)
    assert step.plan.num_computed == [10, 0]


def test_prompt_logprobs_are_not_repeated_after_preemption() -> None:
    scheduler = make_scheduler(
        max_num_seqs=1, max_num_batched_tokens=4, scheduling_policy="priority"
    )
    sequence = add(scheduler, [1, 2, 3, 4, 5, 6], priority=1, prompt_logprobs=0)
    reported: list[int] = []

    def run(step: ScheduledStep) -> None:
        """Answer as a worker would: one entry per prompt token that the chunk predicts."""
        (start,), (count,) = step.plan.num_computed, step.plan.num_scheduled
        entries = [
            TokenLogprobs(position, -1.0, 1, [], [])
            for position in range(start + 1, min(start + count, 5) + 1)
        ]
        mine = {0: PositionLogprobs.of(entries)} if step.sequences == [sequence] else {}
        result = StepResult(step.plan.step, [9] * len(step.sampled), prompt_logprobs=mine)
        for owner, logprobs in scheduler.update(step, result).prompt_logprobs:
            assert owner is sequence
            reported.extend(entry.token_id for entry in logprobs)

    run(schedule(scheduler))
    add(scheduler, [7], number=1, priority=0, max_tokens=1)
    for _ in range(4):
        run(schedule(scheduler))
    assert sequence.num_preemptions == 1
    assert reported == [1, 2, 3, 4, 5]


def test_who_does_not_read_makes_room_before_who_runs() -> None:
    """However long he has been there."""
    scheduler = make_scheduler(num_blocks=5)
    older = Sequence(1, 0, [1, 2, 3, 4], SamplingParams(max_tokens=20))
    scheduler.add(older, priority=0)
    younger = add(scheduler, [5, 6, 7, 8], max_tokens=16)
    answer(scheduler, schedule(scheduler), 9, 9)
    scheduler.pause(1)
    assert older.status is Status.PAUSED
    for _ in range(11):
        if not younger.is_queued or younger.status is not Status.RUNNING:
            break
        answer(scheduler, schedule(scheduler), 9)
    assert younger.num_preemptions == 0 and older.num_preemptions == 1


def test_the_steps_of_a_pipeline_share_the_sequences() -> None:
    """Each in one step at a time: whose id is pending waits, and leaves room for no other."""
    scheduler = make_scheduler(pipeline_parallel_size=2)
    first, second, third = (add(scheduler, [number] * 5, number=number) for number in (1, 2, 3))
    step = schedule(scheduler)
    assert step.sampled == [first, second, third]
    assert scheduler.schedule() is None
    answer(scheduler, step, 7, 7, 7)
    one, other = schedule(scheduler), schedule(scheduler)
    assert (one.sequences, other.sequences) == ([first, second], [third])
    assert scheduler.schedule() is None
    answer(scheduler, one, 8, 8)
    again = schedule(scheduler)
    assert again.sequences == [first, second]


def test_chunks_of_a_prompt_follow_each_other_through_a_pipeline() -> None:
    scheduler = make_scheduler(pipeline_parallel_size=2, max_num_batched_tokens=4)
    sequence = add(scheduler, list(range(1, 11)))
    steps = [schedule(scheduler) for _ in range(3)]
    assert [step.plan.num_scheduled for step in steps] == [[4], [4], [2]]
    assert scheduler.schedule() is None
    answer(scheduler, steps[0])
    answer(scheduler, steps[1])
    answer(scheduler, steps[2], 7)
    assert schedule(scheduler).plan.num_computed == [10] and sequence.num_pending == 1


def test_an_output_that_waits_for_the_prompt_of_its_first_may_leave() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    leader = add(scheduler, list(range(1, 11)))
    forks = [
        Sequence(0, number, list(range(1, 11)), SamplingParams(max_tokens=8)) for number in (1, 2)
    ]
    for fork in forks:
        scheduler.add(fork, leader=leader)
    answer(scheduler, schedule(scheduler))
    num_queued = scheduler.num_queued
    scheduler.finish(forks[0], "abort")
    scheduler.finish(forks[0], "abort")
    assert leader.forks == forks[1:] and scheduler.num_queued == num_queued - 1
    assert schedule(scheduler).sequences == [leader, forks[1]]


def test_who_stands_behind_a_spent_budget_waits_for_the_next_step() -> None:
    """One of a higher priority has come between two chunks, and takes all of it."""
    scheduler = make_scheduler(max_num_batched_tokens=4, scheduling_policy="priority")
    low = add(scheduler, list(range(1, 8)), priority=1)
    answer(scheduler, schedule(scheduler))
    high = add(scheduler, list(range(11, 20)), number=1, priority=0)
    step = schedule(scheduler)
    assert step.sequences == [low, high] and step.plan.num_scheduled == [3, 1]
    answer(scheduler, step, 9)
    step = schedule(scheduler)
    assert step.sequences == [high], "low has to decode one, and none is left for it"
    assert step.plan.num_scheduled == [4]


def test_who_does_not_read_makes_room_for_whoever_waits() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    idle = [Sequence(1, number, [number + 1], SamplingParams(max_tokens=20)) for number in (0, 1)]
    for one in idle:
        scheduler.add(one, priority=0)
    answer(scheduler, schedule(scheduler), 9, 9)
    scheduler.pause(1)
    new = add(scheduler, [5])
    step = schedule(scheduler)
    assert step.sequences == [new]
    assert [one.num_preemptions for one in idle] == [0, 1], "the last to come, and no more of them"
    assert scheduler.paused == [idle[0]]
