"""Chat templates: Jinja programs, shipped with a model, that turn messages into a prompt.

Called by `Tokenizer`, from any thread. They run in processes of their own (`template_process.py`),
so that one that never ends, or wants all memory, costs its caller an error.
"""

import queue
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from nanovllm.frontend.child_process import ChildProcess
from nanovllm.frontend.template_process import Rendered

Message = dict[str, Any]
# Variables of a template that callers may not set.
RESERVED = frozenset(
    (
        "self",
        "messages",
        "tools",
        "add_generation_prompt",
        "raise_exception",
        "strftime_now",
        "range",
        "dict",
        "namespace",
        "cycler",
        "joiner",
        "lipsum",
    )
)
MAX_PROCESSES = 2  # beyond, prompts wait their turn; most take less than a millisecond
TIMEOUT_S = 10.0  # on a machine so busy that the limit on processor time says nothing
PROGRAM = (sys.executable, "-m", "nanovllm.frontend.template_process")
TOO_LONG = "the model's chat template takes too long, or too much memory, for these messages"


class ChatTemplate:
    """The template `source`; `start` starts its process before it is needed."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._idle: queue.LifoQueue[ChildProcess | None] = queue.LifoQueue()
        for _ in range(MAX_PROCESSES):
            self._idle.put(None)  # not started

    def start(self) -> None:
        """Start a process, so that the first prompt need not wait for it."""
        with self._process():
            pass

    def render(self, variables: dict[str, Any]) -> str:
        """The prompt. Raises `ValueError` with the template's own words if it refuses, or is none.

        variables: "messages", and whatever else the template reads.
        """
        try:
            frame = msgspec.msgpack.encode(variables)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"messages and variables must be JSON: {error}") from None
        with self._process() as process:
            answer = process.ask(frame)
        if answer is None:
            raise ValueError(TOO_LONG)
        rendered = msgspec.msgpack.decode(answer, type=Rendered)
        if rendered.error is None:
            return rendered.text
        if rendered.is_template_fault:
            raise ValueError(f"the model's chat template does not compile: {rendered.error}")
        raise ValueError(f"messages do not suit the model's chat template: {rendered.error}")

    @contextmanager
    def _process(self) -> Iterator[ChildProcess]:
        """One that runs and that nobody else asks anything meanwhile."""
        try:
            process = self._idle.get(timeout=TIMEOUT_S)
        except queue.Empty:
            raise ValueError("the model's chat template is busy with other prompts") from None
        try:
            if process is None or not process.is_alive:
                source = self._source.encode("utf-8", "surrogatepass")
                process = ChildProcess(PROGRAM, timeout_s=TIMEOUT_S, first=source)
            yield process
        finally:
            self._idle.put(process)
