"""Which requests may have killed the core, and which one has.

A core that failed by itself may have died of any request it had. One that was ended from outside,
or nobody knows how, may have died of those that had got nowhere. `Session` sends these as suspects
from then on: the core tries them one at a time (`core/quarantine.py`) and says when. Who is on
trial when the core fails by itself again, or for the second time in any way, is guilty.
"""

from collections import deque
from collections.abc import Iterable

from nanovllm.frontend.request import Completion, Request

NUM_EXPLAINED = 64  # lives of the core that are remembered


class Suspects:
    """`explained`: the lives of the core that requests of this client have ended.

    `trial`: the number by which the core knows what is on trial, if anything is, and that itself.
    """

    def __init__(self) -> None:
        self.explained: deque[str] = deque(maxlen=NUM_EXPLAINED)
        self.trial: tuple[int, list[Completion]] | None = None

    def begin_trial(self, completion: Completion) -> None:
        """The core is about to begin with the request that it knows by this completion's number."""
        request = completion.request
        were_apart = any(one.num_received_before for one in request.completions)
        self.trial = completion.number, [completion] if were_apart else request.completions

    def take_verdict(self) -> int | None:
        """The number of the trial, once all that is on trial has got far enough or ended."""
        if self.trial is None or not all(one.has_passed for one in self.trial[1]):
            return None
        number, completions = self.trial
        for one in completions:
            one.acquit()
        self.trial = None
        return number

    def drop(self, request: Request) -> int | None:
        """Nobody waits for it any more. Returns the number of its trial, if it was on trial."""
        if self.trial is None or self.trial[1][0].request is not request:
            return None
        number, _ = self.trial
        self.trial = None
        return number

    def charge(self, requests: Iterable[Request], epoch: str, *, is_crash: bool) -> Request | None:
        """That life of the core has ended. Returns the request that it died of, if that is known.

        is_crash: the core failed by itself.
        """
        on_trial = [] if self.trial is None else self.trial[1]
        accused = next((one for one in on_trial if not one.has_passed), None)
        self.trial = None
        if accused is not None:
            accused.num_failed_trials += 1
            accused.deaths.append(epoch)
            if is_crash or accused.num_failed_trials > 1:
                self.explained += accused.deaths
                return accused.request
        for one in (one for request in requests for one in request.completions):
            if one is accused or one.finish_reason is not None:
                continue
            if not (is_crash or one.is_stuck):
                one.acquit()
            elif one.request.epoch == epoch:
                one.deaths.append(epoch)
        return None

    def forget_trial(self) -> None:
        """The core knows nothing of this client any more."""
        self.trial = None
