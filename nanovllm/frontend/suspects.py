"""Which requests may have killed the core: those that had got nowhere since they were sent to it.

`Session` says when the core is gone, and sends suspects as such from then on: the core tries them
one at a time (`core/quarantine.py`) and says when. One that is on trial when the core dies has been
there at two deaths, the second time alone: it is guilty of both, and is not sent again.
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
        """The number of the trial, once all that is on trial has got somewhere or ended."""
        if self.trial is None or any(one.is_stuck for one in self.trial[1]):
            return None
        number, completions = self.trial
        for one in completions:
            one.deaths = []
        self.trial = None
        return number

    def drop(self, request: Request) -> int | None:
        """Nobody waits for it any more. Returns the number of its trial, if it was on trial."""
        if self.trial is None or self.trial[1][0].request is not request:
            return None
        number, _ = self.trial
        self.trial = None
        return number

    def charge(self, requests: Iterable[Request], epoch: str) -> Request | None:
        """That life of the core has ended with a death. Returns the request that it died of, if
        that is known; if not, all that had got nowhere are suspects."""
        on_trial = [] if self.trial is None else self.trial[1]
        guilty = next((one for one in on_trial if one.is_stuck), None)
        self.trial = None
        for request in requests:
            for one in request.completions:
                if not one.is_stuck:
                    one.deaths = []
                elif request.epoch == epoch and (guilty is None or one is guilty):
                    one.deaths.append(epoch)
        if guilty is None:
            return None
        self.explained += guilty.deaths
        return guilty.request

    def forget_trial(self) -> None:
        """The core knows nothing of this client any more."""
        self.trial = None
