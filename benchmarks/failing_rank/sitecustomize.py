"""What `faults.py --ranks` puts first on Python's path: makes a rank fail when it is told to.

Python imports it before anything else in every process. In those of ranks, a fault is done that
lies in the directory of NANOVLLM_FAULTS, in a file named after when and whom ("step.1"), which says
how and from when on: "kill 0.004", in seconds since that rank began its start, its warm-up or a
step. A rank that is to raise does so at one of the places where it can, by the same number. Of
"note" it only says that it has come there.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
JOIN_S, LOADED_S = 1.0, 2.0  # a raise of so late a fault comes after ranks have met, or at the end
STEP_S = 0.01  # of a fault of the second half of it, behind what a step computes


class Fault:
    """One that this rank has been asked for."""

    def __init__(self, how: str, delay_s: float) -> None:
        self._how = how
        self._delay_s = delay_s
        if how != "raise":
            threading.Timer(delay_s, self.happen).start()

    @classmethod
    def take(cls, when: str) -> "Fault | None":
        """The one that lies there for this rank, if any does."""
        path = DIRECTORY / f"{when}.{RANK}"
        try:
            how, delay_s = path.read_text().split()
        except FileNotFoundError:
            return None
        path.unlink()
        return cls(how, float(delay_s))

    def raises_between(self, since_s: float, until_s: float) -> bool:
        """Whether that is how it happens, and such a time stands for the place."""
        return self._how == "raise" and since_s <= self._delay_s < until_s

    def happen(self) -> None:
        """Say so, and do it."""
        note = DIRECTORY / "happening"
        note.write_text(f"{time.monotonic()} {os.getpid()}")
        note.rename(DIRECTORY / "happened")
        if self._how in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self._how])
        elif self._how == "raise":
            raise LookupError("as was asked for")


def raise_at(fault: Fault | None, since_s: float = 0.0, until_s: float = float("inf")) -> None:
    """Raise if that is the fault, and this its place."""
    if fault is not None and fault.raises_between(since_s, until_s):
        fault.happen()


def failing(executor: Any, at_start: Fault | None, loaded_s: float) -> Any:
    """The class of an executor, whose objects look for faults. loaded_s: of a raise that comes at
    the end of the start."""

    class Failing(executor):  # type: ignore[misc]
        def start(self) -> Any:
            raise_at(at_start, 0.0, JOIN_S)
            info = super().start()
            raise_at(at_start, loaded_s)
            return info

        def warm_up(self) -> Any:
            raise_at(Fault.take("warm-up"))
            return super().warm_up()

        def submit(self, plan: Any) -> Any:
            fault = Fault.take("step")
            raise_at(fault, 0.0, STEP_S / 2)
            step = super().submit(plan)
            raise_at(fault, STEP_S / 2)
            return step

    return Failing


def fail_when_told() -> None:
    """Have this rank look for faults."""
    at_start = Fault.take("start")  # before torch is imported
    if '"load_format":"synthetic"' in sys.orig_argv[-1]:
        from nanovllm.executor import synthetic

        made = failing(synthetic.SyntheticExecutor, at_start, JOIN_S)
        synthetic.SyntheticExecutor = made  # type: ignore[misc]
        return
    from nanovllm.worker import rank

    def join_and_fail(*arguments: Any) -> None:
        join(*arguments)
        raise_at(at_start, JOIN_S, LOADED_S)

    join: Callable[..., None] = rank.join
    rank.join = join_and_fail
    rank.RankWorker = failing(rank.RankWorker, at_start, LOADED_S)  # type: ignore[misc]


if "nanovllm.executor.rank" in sys.orig_argv and "NANOVLLM_FAULTS" in os.environ:
    DIRECTORY = Path(os.environ["NANOVLLM_FAULTS"])
    RANK = int(sys.orig_argv[sys.orig_argv.index("--rank") + 1])
    fail_when_told()
