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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

    from nanovllm.frontend.outputs import RequestOutput


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

    def end_answer(self) -> None:
        """What is shown next begins a line of its own."""
        if not self._is_at_line_start:
            self.write("\n")

    def note(self, text: str) -> None:
        """One line, or several, for whoever sits there."""
        if self._is_shared and not self._is_at_line_start:
            sys.stderr.write("\n")
            self._is_at_line_start = True
        print(text, file=sys.stderr, flush=True)

    @contextmanager
    def showing_log(self, level: str) -> Iterator[None]:
        """While inside, what this process logs from that level on is a note, without stacks."""
        handler = _Notes(self, level.upper())
        root, ours = logging.getLogger(), logging.getLogger("nanovllm")
        before = ours.level
        root.addHandler(handler)
        ours.setLevel(handler.level)
        try:
            yield
        finally:
            ours.setLevel(before)
            root.removeHandler(handler)


class MarkdownTerminal(Terminal):
    """Lays answers out as Markdown, paragraph by paragraph; the one under way is shown as it comes.

    For a terminal as stdout alone.
    """

    def __init__(self, console: "Console | None" = None) -> None:
        """console: instead of that of stdout."""
        super().__init__()
        from rich.console import Console

        self._console = console or Console()
        self._live: Live | None = None  # shows the block under way
        self._block = ""
        self._is_code = False  # a fence is open in what has been read of the block
        self._line = ""  # the last of the block, as far as it has come

    def write(self, text: str) -> None:
        """Part of an answer, in Markdown."""
        for piece in text.splitlines(keepends=True):
            self._block += piece
            self._line += piece
            if piece.endswith("\n"):
                self._end_line()
        self._show()

    def end_answer(self) -> None:
        """Lay out what is left."""
        self._end_block()
        self._is_code = False

    def note(self, text: str) -> None:
        """Above the block under way, if there is one."""
        if self._live is None:
            super().note(text)
        else:
            self._live.console.print(text, markup=False, highlight=False)

    def _end_line(self) -> None:
        line, self._line = self._line.strip(), ""
        if line.startswith(("```", "~~~")):
            self._is_code = not self._is_code
            if self._is_code:
                return
            self._end_block()
        elif not line and not self._is_code:
            self._end_block()

    def _show(self) -> None:
        """The last lines of the block, as many as there is room for: the rest cannot be undone."""
        from rich.live import Live
        from rich.text import Text

        if not self._block:
            return
        room = max(1, self._console.height - 2)
        lines = Text(self._block).wrap(self._console, self._console.width)[-room:]
        if self._live is None:
            self._live = Live(console=self._console, transient=True, auto_refresh=False)
            self._live.start()
        self._live.update(Text("\n").join(lines), refresh=True)

    def _end_block(self) -> None:
        from rich.markdown import Markdown

        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._block.strip():
            self._console.print(Markdown(self._block))
        self._block = self._line = ""


class _Notes(logging.Handler):
    def __init__(self, terminal: Terminal, level: str) -> None:
        super().__init__(level)
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        self._terminal.note(f"[{record.getMessage()}]")


def _are_one_file(*descriptors: int) -> bool:
    return len({os.fstat(one)[:3] for one in descriptors}) == 1


def figures(output: "RequestOutput") -> str:
    """One line of what the answer cost."""
    metrics = output.metrics
    line = f"{len(output.prompt_token_ids)} prompt tokens, {output.num_cached_tokens or 0} cached"
    line += f" | {metrics.num_generation_tokens} tokens, {output.outputs[0].finish_reason}"
    if metrics.first_token_time is None or metrics.finished_time is None:
        return f"[{line}]"
    first_s = metrics.first_token_time - metrics.arrival_time
    later_s = metrics.finished_time - metrics.first_token_time
    line += f" | first token {first_s * 1e3:.0f} ms"
    if later_s > 0:
        line += f" | {(metrics.num_generation_tokens - 1) / later_s:.1f} tokens/s"
    return f"[{line}]"


class Progress:
    """Shows phases of loading on stderr: a bar on a terminal, else one line per phase."""

    def __init__(self, done: str = "ready after") -> None:
        """done: what is said of the time that it took, at the end."""
        self._done = done
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
            print(f"{self._done} {time.monotonic() - self._started:.1f} s", file=sys.stderr)
