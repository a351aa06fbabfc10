"""The seam between the core and the device: seven methods, no torch.

An executor runs plans in submission order; `EngineCore` is its only caller.
"""

from typing import Protocol

from nanovllm.protocol.plan import StepHandle, StepMasks, StepPlan, WorkerInfo


class Executor(Protocol):
    """Owns one or more workers."""

    def start(self) -> WorkerInfo:
        """Load the model and report what was found, with how many blocks of KV there is room for.

        Raises `ValueError` if the user's configuration cannot work (names field and remedy).
        """

    def allocate(self, num_blocks: int) -> None:
        """Make the KV cache, of no more blocks than `start` reported. Plans may come afterwards.

        Raises `ValueError` if there is no memory for it.
        """

    def submit(self, plan: StepPlan) -> StepHandle:
        """Queue the first half of a step, its forward pass; returns without waiting for the device.

        The step before has been sampled, or has failed. Raises `DeviceLostError`, or whatever only
        this step is to blame for: it may have run in part, and its rows are new ones when they
        occur again.
        """

    def sample(self, step: int, masks: StepMasks | None) -> None:
        """Queue the second half of the step submitted last: what picks ids.

        masks: of its constrained rows, if there are any; their words are copied before this
        returns, and kept for steps to come, unless one fails. Raises as `submit` does.
        """

    def warm_up(self) -> bool:
        """Use a moment in which no step is under way: compile or capture what steps to come will
        want. Returns whether there is more to do so; raises `DeviceLostError`."""

    def check(self) -> None:
        """Now and then, while no step is under way: raises `DeviceLostError` if the device is gone,
        as far as that can be told at once."""

    def shutdown(self) -> None:
        """Free the device. Safe to call twice, and after a failed start."""
