"""What a command shows: answers on stdout as they come; progress and notes on stderr.

Used by `cli` and `chat`. A note never lies within a line of an answer: where both go to the same
place, it begins a line of its own.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminal:
    """The two streams of this process."""

    def __init__(self) -> None:
        self._is_at_line_start = True
        self._is_shared = _are_one_file(1, 2)

    def write(self, text: str) -> None:
        """Part of an answer."""
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._is_at_line_start = text.endswith("\n")

    def note(self, text: str) -> None:
        """One line, or several, for whoever sits there."""
        if self._is_shared and not self._is_at_line_start:
            sys.stderr.write("\n")
            self._is_at_line_start = True
        print(text, file=sys.stderr, flush=True)

    @contextmanager
    def showing_warnings(self) -> Iterator[None]:
        """While inside, what this process logs is a note, without stacks."""
        handler = _Notes(self)
        root = logging.getLogger()
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)


class _Notes(logging.Handler):
    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.WARNING)
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        self._terminal.note(f"[{record.getMessage()}]")


def _are_one_file(*descriptors: int) -> bool:
    return len({os.fstat(one)[:3] for one in descriptors}) == 1


class Progress:
    """Shows phases of loading on stderr: a bar on a terminal, else one line per phase."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._phase = ""
        self._started = time.monotonic()

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            self._bar = Bars(
                TextColumn("{task.description:<12}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self("starting", 0.0)  # seconds pass before the core says anything
        return self

    def __call__(self, phase: str, progress: float) -> None:
        if self._bar is None:
            if phase != self._phase:
                print(f"{phase} …", file=sys.stderr, flush=True)
        elif phase != self._phase:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task(phase, total=1.0, completed=progress)
        else:
            self._bar.update(self._bar.task_ids[-1], completed=progress)
        self._phase = phase

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            print(f"ready after {time.monotonic() - self._started:.1f} s", file=sys.stderr)
