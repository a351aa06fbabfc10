"""Requests that may have killed a core: each begins alone, so that a death shows which did.

`CoreServer` hands in suspects, and what comes while there are any. While a suspect waits, nothing
else begins: first all that have begun get their first token, then one suspect is offered to its
client, begins when the client accepts, and is on trial until the client says that the trial is
over. So a client whose core dies knows whether its own request was the only one under way.
"""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from nanovllm.protocol.messages import AddRequest, Finished, FinishReason

TRIAL_LIMIT_S = 60.0  # then others begin, whatever became of it: a client may never say


@dataclass(slots=True, eq=False)
class Held:
    """A request that the core has received and not yet begun with."""

    client_id: int
    request: AddRequest
    since: float  # on `time.monotonic`'s clock
    is_accepted: bool = False

    @property
    def numbers(self) -> range:
        return range(self.request.number, self.request.number + self.request.params.n)

    def ends(self, reason: FinishReason) -> list[Finished]:
        """What its client is told if it ends before it begins."""
        return [Finished(number, reason, None, 0) for number in self.numbers]

    def request_at(self, now: float) -> AddRequest:
        """The request, with what is left of its deadlines."""
        gone_ms = (now - self.since) * 1e3
        limits = self.request.deadline_ms, self.request.ttft_deadline_ms
        deadline_ms, ttft_ms = (None if ms is None else ms - gone_ms for ms in limits)
        return msgspec.structs.replace(
            self.request, deadline_ms=deadline_ms, ttft_deadline_ms=ttft_ms
        )

    def is_late(self, now: float) -> bool:
        """Whether one of its deadlines has passed."""
        limits = self.request.deadline_ms, self.request.ttft_deadline_ms
        return any(ms is not None and ms <= (now - self.since) * 1e3 for ms in limits)


class Quarantine:
    """Suspects, the one on trial, and the others that have come meanwhile; each in order.

    The others begin after the last suspect, or after `TRIAL_LIMIT_S`: one of them may also kill the
    core, and the one on trial would be blamed for it.
    """

    def __init__(self) -> None:
        self._suspects: list[Held] = []
        self._others: list[Held] = []
        self._trial: Held | None = None
        self._trial_since = 0.0
        self._others_since = 0.0  # when they last had a turn, or the first suspect came

    @property
    def is_active(self) -> bool:
        """Whether anything waits here or is on trial."""
        return bool(self._suspects or self._others or self._trial)

    def hold(self, client_id: int, request: AddRequest, now: float) -> None:
        """Take in a suspect, or who comes while others wait; `take_others` or `accept` gives it
        back."""
        if not self.is_active:
            self._others_since = now
        queue = self._suspects if request.is_suspect else self._others
        queue.append(Held(client_id, request, now))

    def take_others(self, now: float) -> list[Held]:
        """Those that may begin now: nobody is on trial, nor will be, or they have waited long."""
        is_their_turn = not self._suspects or now - self._others_since > TRIAL_LIMIT_S
        if self._trial is not None or not is_their_turn:
            return []
        self._others_since = now
        others, self._others = self._others, []
        return others

    def offer(self, now: float) -> Held | None:
        """The next one to be tried, if nobody is. Ask when everything that runs has a token."""
        if self._trial is not None:
            if now - self._trial_since > TRIAL_LIMIT_S:
                if not self._trial.is_accepted:
                    self._suspects.append(self._trial)
                self._trial = None  # those that wait have their turn before the next offer
            return None
        if not self._suspects:
            return None
        self._trial, self._trial_since = self._suspects.pop(0), now
        return self._trial

    def accept(self, client_id: int, number: int) -> Held | None:
        """Its client knows that it begins now. None if it has been withdrawn."""
        trial = self._trial_of(client_id, number)
        if trial is not None:
            trial.is_accepted = True
        return trial

    def end_trial(self, client_id: int, number: int) -> None:
        """Its client has seen it get somewhere, or end."""
        if self._trial_of(client_id, number) is not None:
            self._trial = None

    def withdraw(self, client_id: int, numbers: set[int]) -> list[Held]:
        """Forget these requests of a client; returns those that were here and had not begun."""
        return self._drop(
            lambda held: held.client_id == client_id and not numbers.isdisjoint(held.numbers)
        )

    def withdraw_client(self, client_id: int) -> None:
        """Forget all requests of a client that has gone."""
        self._drop(lambda held: held.client_id == client_id)
        if self._trial is not None and self._trial.client_id == client_id:
            self._trial = None

    def expire(self, now: float) -> list[Held]:
        """Forget those whose deadline has passed before they began; returns them."""
        return self._drop(lambda held: held.is_late(now))

    def _trial_of(self, client_id: int, number: int) -> Held | None:
        trial = self._trial
        if trial is None or (trial.client_id, trial.request.number) != (client_id, number):
            return None
        return trial

    def _drop(self, leaves: Callable[[Held], bool]) -> list[Held]:
        dropped = [held for held in self._suspects + self._others if leaves(held)]
        self._suspects = [held for held in self._suspects if held not in dropped]
        self._others = [held for held in self._others if held not in dropped]
        if self._trial is not None and not self._trial.is_accepted and leaves(self._trial):
            dropped.append(self._trial)
            self._trial = None
        return dropped
