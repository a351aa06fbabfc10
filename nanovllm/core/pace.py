"""How fast a core may go while somebody watches it: held, a step at a time, or slowly.

`Operations` sets it for a client, the server's loop asks it before a step, `EngineCore` tells it of
each step. Whatever was asked ends with the client that asked, or when its time is over: from then
on the core goes at full speed.
"""

import math

from nanovllm.protocol.messages import MAX_PACE_S, SetPace

FULL_SPEED = SetPace()
MAX_STEPS = 1000
MAX_INTERVAL_MS = 10_000.0


class PaceRefusedError(ValueError):
    """This core always goes at full speed."""

    def __init__(self) -> None:
        super().__init__("this core is not to be held or slowed: start it with --allow-debug")


class Pace:
    """`next_step_at`: when the next step may begin; `until`: from then on what was asked counts no
    more. Times are `time.monotonic`'s."""

    def __init__(self, *, is_allowed: bool) -> None:
        self.is_allowed = is_allowed
        self.next_step_at = -math.inf
        self._asked = FULL_SPEED
        self._client_id: int | None = None
        self.until = -math.inf
        self._steps_left: int | None = None  # None: as many as there are

    def set(self, client_id: int, asked: SetPace, now: float) -> None:
        """What a client asks for takes the place of what was asked before; only steps that are
        still to be taken add up. `PaceRefusedError`, or `ValueError`: out of range."""
        if not self.is_allowed:
            raise PaceRefusedError
        _check(asked)
        steps_left = asked.num_steps
        if steps_left is not None:
            left = (self._steps_left or 0) if now < self.until else 0
            steps_left = min(left + steps_left, MAX_STEPS)
        self._client_id, self._asked, self._steps_left = client_id, asked, steps_left
        self.until = now + asked.for_s
        self.next_step_at = self.until if steps_left == 0 else now

    def release(self, now: float) -> None:
        """Full speed from now on."""
        self.until = min(self.until, now)
        self.next_step_at = min(self.next_step_at, now)

    def forget(self, client_id: int, now: float) -> None:
        """A client has gone, and what it asked for with it."""
        if client_id == self._client_id:
            self.release(now)

    def note_step(self, now: float) -> None:
        """A step is over, before `until`."""
        if self._steps_left is not None:
            self._steps_left -= 1
        wait_s = math.inf if self._steps_left == 0 else self._asked.interval_ms / 1e3
        self.next_step_at = min(now + wait_s, self.until)

    def is_held(self, now: float) -> bool:
        """Whether no step may begin until somebody says so."""
        return self._steps_left == 0 and now < self.until

    def interval_ms(self, now: float) -> float:
        """From one step to the next."""
        return self._asked.interval_ms if now < self.until else 0.0


def _check(asked: SetPace) -> None:
    if asked.num_steps is not None and not 0 <= asked.num_steps <= MAX_STEPS:
        raise ValueError(f"num_steps: {asked.num_steps} is not in [0, {MAX_STEPS}]")
    if not 0 <= asked.interval_ms <= MAX_INTERVAL_MS:
        raise ValueError(f"interval_ms: {asked.interval_ms} is not in [0, {MAX_INTERVAL_MS:g}]")
    if not 0 < asked.for_s <= MAX_PACE_S:
        raise ValueError(f"for_s: {asked.for_s} is not in (0, {MAX_PACE_S:g}]: ask again in time")
