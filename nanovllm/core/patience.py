"""How long a step may take before it counts as stalled, by what the core's own steps have taken.

`EngineCore` tells it of each step as it begins and as it ends; the server tells clients, which
report a stall, and the watch that writes stacks to the log.
"""

from collections import deque

from nanovllm.protocol.plan import WorkerInfo

NUM_RECENT_STEPS = 16
FAR_BEYOND = 4.0  # times a recent long step: what takes longer than that is a stall
# Weights that a slow device multiplies and adds in a second: what many tokens may take before there
# have been steps to go by.
SLOW_CPU, SLOW_GPU = 5e9, 25e12


class Patience:
    """Of a core whose worker has said `info`, with at most `depth` steps in flight."""

    def __init__(self, info: WorkerInfo, *, depth: int) -> None:
        self._token_s = info.num_parameters / (SLOW_CPU if info.device == "cpu" else SLOW_GPU)
        self._recent: deque[tuple[float, int]] = deque(maxlen=NUM_RECENT_STEPS)
        self._begun: deque[int] = deque(maxlen=depth)  # tokens of the latest steps

    def begin(self, num_tokens: int) -> bool:
        """A step of so many tokens is about to be submitted. Returns whether it is larger than
        those before, so that more patience may be needed from now on."""
        begun = self._begun
        # Nearly always it is no larger than the last: two lines for that, in every step.
        is_larger = not begun or (num_tokens > begun[-1] and num_tokens > max(begun))
        begun.append(num_tokens)
        return is_larger

    def note(self, seconds: float, num_tokens: int) -> None:
        """A step is over."""
        self._recent.append((seconds, num_tokens))

    @property
    def seconds(self) -> float:
        """What may pass from now on until a step has finished. One long step may itself have been a
        stall, so a single one says nothing: of all the second longest counts, and a step of many
        tokens may take as many times longer than a smaller one as it has tokens."""
        num_tokens = max(self._begun, default=0)
        expected_s = num_tokens * self._token_s
        recent = list(self._recent)  # at once: other threads look, too
        if len(recent) < 2:
            return expected_s
        in_proportion = min(
            seconds * max(1.0, num_tokens / max(1, many)) for seconds, many in recent
        )
        usual_s = sorted(seconds for seconds, _ in recent)[-2]
        return max(FAR_BEYOND * usual_s, min(FAR_BEYOND * in_proportion, expected_s))
