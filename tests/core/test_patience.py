"""How long a step may take before it counts as stalled: by its tokens, and by the steps before."""

import pytest

from nanovllm.core.patience import FAR_BEYOND, SLOW_CPU, SLOW_GPU, Patience
from nanovllm.protocol.plan import WorkerInfo

NUM_PARAMETERS = 10**9


def make_patience(device: str = "cpu", *, depth: int = 1) -> Patience:
    info = WorkerInfo(
        device=device,
        dtype="float32",
        attention_backend="torch",
        architecture="Large",
        num_blocks=2,
        max_model_len=4096,
        vocab_size=1,
        eos_token_ids=[0],
        num_parameters=NUM_PARAMETERS,
    )
    return Patience(info, depth=depth)


@pytest.mark.parametrize(("device", "rate"), [("cpu", SLOW_CPU), ("cuda", SLOW_GPU)])
def test_many_tokens_may_take_long_before_there_is_a_step_to_go_by(
    device: str, rate: float
) -> None:
    patience = make_patience(device)
    assert patience.seconds == 0.0
    assert patience.begin(2000)
    assert patience.seconds == pytest.approx(2000 * NUM_PARAMETERS / rate)


def test_steps_tell_what_larger_ones_may_take() -> None:
    """In proportion to their tokens, by the quickest: a slow one may have been a stall."""
    patience = make_patience()
    for seconds in (9.0, 0.5):
        patience.begin(100)
        patience.note(seconds, 100)
    patience.begin(400)
    assert patience.seconds == pytest.approx(FAR_BEYOND * 4 * 0.5)
    patience.begin(1)
    assert patience.seconds == pytest.approx(FAR_BEYOND * 0.5)


def test_steps_of_few_tokens_say_little_about_many() -> None:
    """A token alone takes nearly as long as some: what a slow device takes is the bound."""
    patience = make_patience()
    for _ in range(2):
        patience.note(0.5, 1)
    patience.begin(2000)
    assert patience.seconds == pytest.approx(2000 * NUM_PARAMETERS / SLOW_CPU)


def test_a_large_step_counts_while_it_may_be_in_flight() -> None:
    patience = make_patience(depth=2)
    assert patience.begin(2000) and not patience.begin(3) and patience.seconds > 100
    assert not patience.begin(3) and patience.seconds < 1
    assert patience.begin(4)
