"""The seam between the core and the device: three methods, no torch.

An executor runs plans in submission order; `EngineCore` is its only caller.
"""

from typing import Protocol

from nanovllm.protocol import StepPlan, StepResult, WorkerInfo


class StepFailedError(RuntimeError):
    """A step failed, and its requests with it; the worker is fit for the next one."""


class DeviceLostError(RuntimeError):
    """The device's context is gone, and with it the model and all KV: only a new process helps."""


class ProgressCallback(Protocol):
    """Called often while loading: the phase's name and how far it is, in [0, 1]."""

    def __call__(self, phase: str, progress: float) -> None: ...


class StepHandle(Protocol):
    """A submitted step."""

    def result(self) -> StepResult:
        """Block until the step has run. Raises what the step raised, or `DeviceLostError`."""


class Executor(Protocol):
    """Owns one or more workers."""

    def start(self) -> WorkerInfo:
        """Load the model, size the KV cache, and report what was found.

        Raises `ValueError` if the user's configuration cannot work (names field and remedy).
        """

    def submit(self, plan: StepPlan) -> StepHandle:
        """Queue one step; returns without waiting for the device.

        After any exception but `DeviceLostError` the next step may be submitted.
        """

    def shutdown(self) -> None:
        """Free the device. Safe to call twice, and after a failed start."""
