"""What happens in a core, as one protocol: a `CoreListener` is told of all of it.

`EngineCore` tells its listeners, in the order of what happens, and asks nothing of them. `launch`
hands in those that live as long as the core; a watcher comes and goes (`EngineCore.listen`).
A listener that raises ends the core, so it must not.
"""

from dataclasses import dataclass

from nanovllm.core.sequence import ScheduledStep, Sequence, StepOutputs
from nanovllm.protocol.messages import AddRequest, FinishReason
from nanovllm.protocol.plan import StepResult


@dataclass(frozen=True, slots=True)
class GrammarBegun:
    """A grammar was asked for: it is known, or is waited for, or cannot be had (`error`)."""

    is_known: bool
    error: str = ""


@dataclass(frozen=True, slots=True)
class GrammarsCollected:
    """These requests wait no longer: their grammar is there, or will never be."""

    requests: list[list[Sequence]]


@dataclass(frozen=True, slots=True)
class Constrained:
    """A request's sequences have their matchers, or cannot have any (`error`)."""

    error: str = ""


@dataclass(frozen=True, slots=True)
class MasksFilled:
    """The masks of a step are there, or could not be made (`error`)."""

    error: str = ""


@dataclass(frozen=True, slots=True)
class TokensForced:
    """Sequences of a step go on with tokens that nobody samples.

    ended: those that their grammar ended with them, after how many of them, and the error of the
    matcher, if there was one.
    """

    runs: list[tuple[Sequence, list[int]]]
    ended: list[tuple[Sequence, int, str | None]]


GrammarEvent = GrammarBegun | GrammarsCollected | Constrained | MasksFilled | TokensForced


class CoreListener:
    """Does nothing at all: a listener overrides what it wants to know."""

    def on_add(self, client_id: int, request: AddRequest) -> None:
        """A client has sent a request. What is wrong with it has not been looked at yet."""

    def on_end_asked(self, sequences: list[Sequence], reason: FinishReason) -> None:
        """These will be ended now, for a reason that lies outside of steps: an abort, a deadline,
        an output that cannot be delivered."""

    def on_end(self, sequences: list[Sequence]) -> None:
        """These have ended other than by a step's result."""

    def on_pause(self, client_id: int) -> None:
        """Nothing of this client will be planned from now on."""

    def on_resume(self, client_id: int) -> None:
        """This client's sequences go on."""

    def on_reset(self) -> None:
        """The prefix cache will be forgotten now, by request."""

    def on_turn(self) -> None:
        """`EngineCore.step` has been called."""

    def on_turn_over(self) -> None:
        """It returns, or raises."""

    def on_grammar(self, event: GrammarEvent) -> None:
        """Something became of a grammar."""

    def on_submit(self, step: ScheduledStep) -> None:
        """A step goes to the executor now."""

    def on_submit_failed(self, step: ScheduledStep, error: Exception) -> None:
        """The executor did not take it."""

    def on_result(
        self, step: ScheduledStep, result: StepResult, outputs: StepOutputs, now: float
    ) -> None:
        """A step has run, and what came of it has been taken in. now: time.monotonic()."""

    def on_step_failed(self, step: ScheduledStep, error: Exception, now: float) -> None:
        """A step that was submitted has failed, and its sequences will be ended."""
