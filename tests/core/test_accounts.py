"""What an end is told to have taken, counted from what this core did."""

import pytest

from nanovllm.core.clients import why_of
from nanovllm.core.sequence import Sequence
from nanovllm.sampling_params import SamplingParams


@pytest.mark.parametrize("before", [[], [7] * 5], ids=["new", "resumed"])
def test_times_are_of_the_tokens_that_were_made_here(before: list[int]) -> None:
    """What a core before this one had generated is part of the prompt to this one."""
    sequence = Sequence(0, 1, [1, 2, 3], SamplingParams(), output_token_ids=before)
    sequence.queued_at, sequence.started_at = 100.0, 100.5
    waiting = why_of(sequence, 101.0)
    assert (waiting.queued_ms, waiting.ttft_ms, waiting.inter_token_ms) == (500.0, None, None)
    sequence.first_token_at = 101.0
    sequence.token_ids.append(4)
    one = why_of(sequence, 101.0)
    assert (one.ttft_ms, one.inter_token_ms) == (1000.0, None)
    sequence.token_ids += [5, 6]
    sequence.waited_s = (0.125, 0.25, 0.5)
    three = why_of(sequence, 104.0)
    assert (three.ttft_ms, three.inter_token_ms) == (1000.0, 1500.0)
    assert (three.seats_ms, three.budget_ms, three.kv_ms) == (125.0, 250.0, 500.0)


def test_what_never_ran_has_waited_until_now() -> None:
    sequence = Sequence(0, 1, [1], SamplingParams())
    sequence.queued_at = 100.0
    assert why_of(sequence, 102.0).queued_ms == 2000.0
