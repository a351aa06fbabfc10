"""The budget of a step, by who decodes and who does not yet."""

import pytest

from nanovllm.config import SchedulerConfig
from nanovllm.core.block_manager import BlockManager
from nanovllm.core.scheduler import Scheduler, token_budget
from nanovllm.core.sequence import Sequence
from nanovllm.protocol.plan import StepResult
from nanovllm.sampling_params import SamplingParams

LIMITS = SchedulerConfig(max_num_batched_tokens=8000, mixed_prefill_tokens=1000).limits("cpu")


def running(*, num_decoding: int, num_prompts: int) -> list[Sequence]:
    sequences = [
        Sequence(0, number, [1, 2, 3], SamplingParams())
        for number in range(num_decoding + num_prompts)
    ]
    for sequence in sequences[:num_decoding]:
        sequence.num_computed = 3
    return sequences


@pytest.mark.parametrize(
    ("num_decoding", "num_prompts", "num_admissible", "budget"),
    [
        (0, 0, 5, 8000),
        (0, 3, 0, 8000),
        (2, 0, 1, 4002),
        (64, 0, 1, 1064),  # a newcomer must not hold up 64 others for long
        (16, 16, 0, 8000),  # half still wait for their first token
        (17, 16, 0, 4017),
        (33, 0, 16, 2033),
        (65, 0, 16, 1065),
        (4000, 4000, 0, 8000),  # never more than a step holds
    ],
)
def test_halved_for_each_time_that_the_others_are_fewer(
    num_decoding: int, num_prompts: int, num_admissible: int, budget: int
) -> None:
    sequences = running(num_decoding=num_decoding, num_prompts=num_prompts)
    num_prompts += num_admissible
    assert token_budget(LIMITS, sequences, num_prompts=num_prompts) == budget


def test_who_has_sampled_its_last_token_counts_no_more() -> None:
    sequences = running(num_decoding=8, num_prompts=2)
    for sequence in sequences[:7]:
        sequence.max_total = 4
    assert token_budget(LIMITS, sequences, num_prompts=2) == 8000


def test_prompts_are_never_squeezed_out() -> None:
    sequences = running(num_decoding=7000, num_prompts=1)
    assert token_budget(LIMITS, sequences, num_prompts=1) == 8000


def test_who_is_resumed_within_its_prompt_counts_again() -> None:
    limits = SchedulerConfig(max_num_batched_tokens=64, mixed_prefill_tokens=8).limits("cpu")
    blocks = BlockManager(num_blocks=100, block_size=16)
    scheduler = Scheduler(limits, blocks, max_model_len=512)

    def next_budget() -> int:
        step = scheduler.schedule()
        assert step is not None
        scheduler.update(step, StepResult(step.plan.step, [7] * len(step.sampled)))
        return step.budget

    for number in range(4):
        scheduler.add(Sequence(0, number, [1, 2, 3], SamplingParams(max_tokens=None)))
    assert [next_budget(), next_budget()] == [64, 64]  # the prompts, and then nobody's prompt
    scheduler.add(Sequence(1, 4, [1] * 200, SamplingParams()))
    beside_four = 4 + 64 // 4
    assert [next_budget(), next_budget()] == [beside_four, beside_four]
    scheduler.pause(1)
    assert [next_budget(), next_budget()] == [64, 64]
    scheduler.resume(1)
    assert [next_budget(), next_budget()] == [beside_four, beside_four]
