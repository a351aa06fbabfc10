"""The budget of a step, by who decodes and who does not yet."""

import pytest

from nanovllm.config import SchedulerConfig
from nanovllm.core.scheduler import token_budget
from nanovllm.core.sequence import Sequence
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
        (1, 0, 0, 8000),  # nobody wants it
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
    assert token_budget(LIMITS, sequences, num_admissible=num_admissible) == budget


def test_who_has_sampled_its_last_token_counts_no_more() -> None:
    sequences = running(num_decoding=8, num_prompts=2)
    for sequence in sequences[:7]:
        sequence.max_total = 4
    assert token_budget(LIMITS, sequences, num_admissible=0) == 8000


def test_prompts_are_never_squeezed_out() -> None:
    sequences = running(num_decoding=7000, num_prompts=1)
    assert token_budget(LIMITS, sequences, num_admissible=0) == 8000
