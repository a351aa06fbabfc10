"""The seam between the core and the device: four methods, no torch.

An executor runs plans in submission order; `EngineCore` is its only caller.
"""

from typing import Protocol

from nanovllm.protocol.plan import StepPlan, StepResult, WorkerInfo


class StepFailedError(RuntimeError):
    """A step failed, and its requests with it; the worker is fit for the next one."""


class DeviceLostError(RuntimeError):
    """No step can run any more: the device, or the process that owns it, is gone. Ends the core;
    any other exception of a step fails the sequences of that step."""


class ProgressCallback(Protocol):
    """Called often while loading: the phase's name and how far it is, in [0, 1]."""

    def __call__(self, phase: str, progress: float) -> None: ...


class StepHandle(Protocol):
    """A submitted step."""

    def result(self) -> StepResult:
        """Block until the step has run. Raises what the step raised, or `DeviceLostError`.

        The plan's rows and block tables must have been taken in then, so that the steps submitted
        after it stay within their own blocks; the KV and ids of this step's rows are lost.
        """


class Executor(Protocol):
    """Owns one or more workers."""

    def start(self) -> WorkerInfo:
        """Load the model, size the KV cache, and report what was found.

        Raises `ValueError` if the user's configuration cannot work (names field and remedy).
        """

    def submit(self, plan: StepPlan) -> StepHandle:
        """Queue one step; returns without waiting for the device.

        Raises `DeviceLostError`, or whatever only this step is to blame for: it may have run in
        part, and its rows are new ones when they occur again.
        """

    def rehearse(self) -> bool:
        """Use a moment in which no step is under way: compile or capture what steps to come will
        want. Returns whether there is more to do so; raises `DeviceLostError`."""

    def shutdown(self) -> None:
        """Free the device. Safe to call twice, and after a failed start."""
