"""Who is charged with a core's death, acquitted, and found guilty; without a core."""

import pytest

from nanovllm.frontend.request import TRIAL_TOKENS, Request
from nanovllm.frontend.suspects import Suspects
from nanovllm.protocol.messages import AddRequest
from nanovllm.sampling_params import SamplingParams


def request(number: int, *, n: int = 1) -> Request:
    message = AddRequest(number, [1, 2, 3], SamplingParams(n=n, max_tokens=100))
    made = Request(str(number), None, message, None)
    made.note_sent("life 1")
    return made


def bring(one: Request, num_tokens: int, *, index: int = 0) -> None:
    one.completions[index].arrived += [7] * num_tokens


def send_again(requests: list[Request], epoch: str) -> None:
    for one in requests:
        one.note_sent(epoch)


def suspected(requests: list[Request]) -> list[int]:
    return [one.number for one in requests if one.is_suspect]


def test_a_poison_that_has_made_tokens_is_found_at_the_second_death() -> None:
    suspects, both = Suspects(), [request(0), request(1)]
    innocent, poison = both
    for one in both:
        bring(one, 40)
    assert suspects.charge(both, "life 1", is_crash=True) is None
    assert suspected(both) == [0, 1], "a core that fails by itself may die of each"
    send_again(both, "life 2")
    suspects.begin_trial(innocent.completions[0])
    bring(innocent, TRIAL_TOKENS - 1)
    assert suspects.take_verdict() is None, "so many tokens the death may have swallowed"
    bring(innocent, 1)
    assert suspects.take_verdict() == 0
    suspects.begin_trial(poison.completions[0])
    bring(poison, 2)
    assert suspects.charge(both, "life 2", is_crash=True) is poison
    assert suspected(both) == [1] and list(suspects.explained) == ["life 1", "life 2"]


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_kills_from_outside_convict_nobody_who_was_alone_once(num_tokens: int) -> None:
    suspects, both = Suspects(), [request(0), request(1)]
    bring(both[0], 40)
    assert suspects.charge(both, "life 1", is_crash=False) is None
    assert suspected(both) == [1], "who has got nowhere"
    send_again(both, "life 2")
    suspects.begin_trial(both[1].completions[0])
    bring(both[1], num_tokens)
    assert suspects.charge(both, "life 2", is_crash=False) is None
    assert suspected(both)[-1:] == [1]
    send_again(both, "life 3")
    suspects.begin_trial(both[1].completions[0])
    bring(both[1], TRIAL_TOKENS)
    assert suspects.take_verdict() == 1 and not both[1].is_suspect
    assert suspects.charge(both, "life 3", is_crash=False) is None
    assert both[1].completions[0].num_failed_trials == 0 and not suspects.explained


def test_who_was_alone_at_two_deaths_is_guilty_however_they_came() -> None:
    """As a request is that takes more memory than there is: the system kills its core."""
    suspects, poison = Suspects(), request(0)
    for life in ("life 1", "life 2"):
        assert suspects.charge([poison], life, is_crash=False) is None
        send_again([poison], "life " + str(int(life[-1]) + 1))
        suspects.begin_trial(poison.completions[0])
    assert suspects.charge([poison], "life 3", is_crash=False) is poison


def test_who_came_later_or_has_ended_is_no_suspect() -> None:
    suspects, ended, later = Suspects(), request(0), request(1)
    ended.completions[0].finish_reason = "stop"
    later.note_sent("life 2")
    assert suspects.charge([ended, later], "life 1", is_crash=True) is None
    assert suspected([ended, later]) == []


def test_one_output_of_several_is_enough() -> None:
    suspects, one = Suspects(), request(0, n=2)
    bring(one, 5)
    bring(one, 5, index=1)
    suspects.charge([one], "life 1", is_crash=True)
    send_again([one], "life 2")
    suspects.begin_trial(one.completions[0])
    bring(one, TRIAL_TOKENS)
    assert suspects.take_verdict() == 0 and one.is_suspect, "each goes on by itself"
    suspects.begin_trial(one.completions[1])
    assert suspects.charge([one], "life 2", is_crash=True) is one


def test_who_is_dropped_is_on_trial_no_more_and_others_are() -> None:
    suspects, one, other = Suspects(), request(0, n=2), request(5)
    assert suspects.drop(one) is None, "there is no trial"
    suspects.begin_trial(one.completions[1])
    assert suspects.drop(other) is None and suspects.trial is not None
    assert suspects.drop(one) == 1 and suspects.trial is None
    suspects.begin_trial(one.completions[0])
    bring(one, TRIAL_TOKENS)
    assert suspects.take_verdict() is None, "that of both outputs, which had nothing before"
    bring(one, TRIAL_TOKENS, index=1)
    assert suspects.take_verdict() == 0
