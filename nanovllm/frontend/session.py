"""The live requests of one frontend, at a core that may die and be started again.

Owned by `AsyncLLM`. Invariant: a request in the table is known to the core, or will be sent to it
when it is back; whatever has left the table is not.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable

from nanovllm.config import SupervisionConfig
from nanovllm.frontend.core_process import CoreHandle
from nanovllm.frontend.errors import EngineDeadError, QuarantinedError, error_of
from nanovllm.frontend.request import Request, RequestTable
from nanovllm.frontend.resume import missed_end, resumption
from nanovllm.frontend.supervisor import Supervisor
from nanovllm.frontend.suspects import Suspects
from nanovllm.keys import ClientKeys
from nanovllm.protocol.messages import (
    Abort,
    DeathsExplained,
    Finished,
    Outputs,
    Overloaded,
    RequestFailed,
    ToCore,
    TrialAccepted,
    TrialOver,
)

NUM_LAST_IDS = 64


class Session:
    """Submits, aborts and resumes; gives what comes to the requests it is for."""

    def __init__(
        self,
        config: SupervisionConfig,
        address: str,
        *,
        handle: CoreHandle | None = None,
        keys: ClientKeys | None = None,
        hand_over: Callable[[Request], bool] | None = None,
    ) -> None:
        """hand_over: lets another core go on with a request of a dead one, if it can."""
        self.line = Supervisor(self, config, address, handle=handle, keys=keys)
        self._requests = RequestTable()
        self._suspects = Suspects()
        self._unexplained: tuple[str, EngineDeadError] | None = None  # the last death, by epoch
        self._hand_over = hand_over
        self._last_ids: deque[tuple[range, str]] = deque(maxlen=NUM_LAST_IDS)  # of discarded ones

    def submit(self, request: Request) -> None:
        """Send it, at once or when the core is back. `ValueError` if its id is in use."""
        if request.request_id in self._requests:
            raise ValueError(
                f"request_id {request.request_id!r} is in use: choose another, or wait for it"
            )
        self._send(request.message)
        self._requests.add(request)
        if self.line.link is not None:
            request.note_sent(self.line.epoch)

    @property
    def num_requests(self) -> int:
        """That have not ended."""
        return len(self._requests)

    def adopt(self, request: Request) -> None:
        """Go on with a request of a core that has died."""
        self._requests.add(request)
        self._resume(request)

    def discard(self, request: Request) -> None:
        """Nobody waits for it any more: abort what still runs of it."""
        self._last_ids.append((request.numbers, request.request_id))
        numbers = self._requests.remove(request)
        if numbers and not self.line.is_dead:
            self._send(Abort(numbers))
        if self._suspects.trial is not None:
            self._tell_trial_over(self._suspects.drop(request))
        request.completions = []  # which refer to it: none of them is left to the collector

    def abort(self, request_ids: Iterable[str]) -> None:
        """End them early: the core answers, or, if it is away, their end comes at once."""
        found = [self._requests.find(request_id) for request_id in request_ids]
        requests = [request for request in found if request is not None]
        numbers = [number for request in requests for number in request.numbers]
        for request in requests:
            request.is_aborted = True
        if numbers and self.line.link is not None:
            self._send(Abort(numbers))
        else:
            for request in requests:
                self._end_aborted(request)

    def request_id_of(self, number: int) -> str | None:
        """Whose output that is, if it is under way or was one of the last."""
        owner = self._requests.owner_of(number)
        if owner is not None:
            return owner.request_id
        return next((name for numbers, name in self._last_ids if number in numbers), None)

    # ---- what `Link`, `CoreLife` and `Supervisor` tell

    def on_outputs(self, outputs: Outputs) -> None:
        """Tokens have come."""
        stopped = self._requests.apply(outputs)
        if stopped:
            self._send(Abort(stopped))
        if self._suspects.trial is not None:
            self._tell_trial_over(self._suspects.take_verdict())

    def on_request_failed(self, failure: RequestFailed | Overloaded) -> None:
        """A request failed; -1 is some request, so one that has not begun."""
        if failure.number == -1:
            failed = [request for request in self._requests if not request.has_begun]
        else:
            owner = self._requests.owner_of(failure.number)
            failed = [] if owner is None else [owner]
        for request in failed:
            request.fail(error_of(failure))
            self.discard(request)

    def on_trial_offered(self, number: int) -> None:
        """A suspect may begin. (If it has ended meanwhile, the core was told.)"""
        completion = self._requests.completion(number)
        if completion is not None:
            self._suspects.begin_trial(completion)
            self._send(TrialAccepted(number))

    def on_core_lost(self, error: EngineDeadError) -> Collection[str]:
        """The core has died; a request that is known to have ended it is not sent again."""
        if error.is_crash is None:
            self._unexplained = self.line.epoch, error  # the next core may know
        else:
            self._charge(self.line.epoch, error, is_crash=error.is_crash)
        if self._hand_over is not None:
            for request in self._requests:
                may_have_killed = request.is_suspect or request.is_stuck
                if not (may_have_killed or request.is_aborted) and self._hand_over(request):
                    self._requests.remove(request)
        return self._suspects.explained

    def on_core_back(self) -> None:
        """Send everything again, from where it was cut off, in the order it was submitted; but
        suspects, which the core tries one at a time, last."""
        if self._unexplained is not None:
            assert self.line.welcome is not None
            epoch, error = self._unexplained
            self._charge(epoch, error, is_crash=self.line.welcome.after_crash_of == epoch)
            self._unexplained = None
        self._suspects.forget_trial()
        if self._suspects.explained:
            self._send(DeathsExplained(list(self._suspects.explained)))
        for request in sorted(self._requests, key=lambda one: one.is_suspect):
            if request.is_aborted:  # the core died before it answered the abort
                self._end_aborted(request)
            else:
                self._resume(request)

    def on_core_dead(self, error: EngineDeadError) -> None:
        """Nothing more will come."""
        for request in self._requests:
            self._requests.remove(request)
            request.fail(error.again())

    def _charge(self, epoch: str, error: EngineDeadError, *, is_crash: bool) -> None:
        guilty = self._suspects.charge(self._requests, epoch, is_crash=is_crash)
        if guilty is not None:
            why = f"the core has died while it tried this request alone, at last of this: {error}"
            guilty.fail(QuarantinedError(why))
            self.discard(guilty)

    def _resume(self, request: Request) -> None:
        assert self.line.welcome is not None
        info = self.line.welcome.worker
        unfinished = [one for one in request.completions if one.finish_reason is None]
        now = time.monotonic()
        ends = [end for one in unfinished if (end := missed_end(one, info, now)) is not None]
        if ends:
            self.on_outputs(Outputs(finished=ends))
        if len(ends) == len(unfinished):
            return
        request.forget_unfinished_prompt_logprobs()
        request.metrics.num_resumes += 1
        for message in resumption(request, now):
            self._send(message)
        request.note_sent(self.line.epoch)

    def _tell_trial_over(self, number: int | None) -> None:
        if number is not None and self.line.link is not None:
            self._send(TrialOver(number))

    def _send(self, message: ToCore) -> None:
        """Send, unless the core is away just now. Raises `EngineDeadError` if it is for good."""
        if self.line.link is not None:
            self.line.link.send(message)
        else:
            self.line.check_alive()

    def _end_aborted(self, request: Request) -> None:
        ends = [
            Finished(one.number, "abort", None, 0)
            for one in request.completions
            if one.finish_reason is None
        ]
        self._requests.apply(Outputs(finished=ends))
