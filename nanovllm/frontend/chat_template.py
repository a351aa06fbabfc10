"""Chat templates: Jinja programs, shipped with a model, that turn messages into a prompt.

Called by `Tokenizer`, from any thread. They run in processes of their own (`template_process.py`),
so that one that never ends, or wants all memory, costs its caller an error.
"""

import queue
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from nanovllm.frontend.template_process import Rendered, receive, send

Message = dict[str, Any]
# What a template finds under these names is not the caller's to say.
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
        self._idle: queue.LifoQueue[_Renderer | None] = queue.LifoQueue()
        for _ in range(MAX_PROCESSES):
            self._idle.put(None)  # not started
        self._closed = weakref.finalize(self, _close, self._idle)

    def start(self) -> None:
        """Start a process, so that the first prompt need not wait for it."""
        with self._renderer():
            pass

    def render(self, variables: dict[str, Any]) -> str:
        """The prompt. Raises `ValueError` with the template's own words if it refuses, or is none.

        variables: "messages", and whatever else the template reads.
        """
        try:
            frame = msgspec.msgpack.encode(variables)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"messages and variables must be JSON: {error}") from None
        with self._renderer() as renderer:
            rendered = renderer.render(frame)
        if rendered.error is None:
            return rendered.text
        if rendered.is_template_fault:
            raise ValueError(f"the model's chat template does not compile: {rendered.error}")
        raise ValueError(f"messages do not suit the model's chat template: {rendered.error}")

    @contextmanager
    def _renderer(self) -> Iterator["_Renderer"]:
        """One that runs. It is not used again if it fails."""
        try:
            renderer = self._idle.get(timeout=TIMEOUT_S)
        except queue.Empty:
            raise ValueError("the model's chat template is busy with other prompts") from None
        try:
            if renderer is None or not renderer.is_alive:
                renderer = _Renderer(self._source)
            yield renderer
        except BaseException:
            if renderer is not None:
                renderer.close()
            renderer = None
            raise
        finally:
            self._idle.put(renderer)


class _Renderer:
    """One process. `render` raises `ValueError` if it dies or does not answer in time."""

    def __init__(self, source: str) -> None:
        self._channel, theirs = socket.socketpair()
        self._channel.settimeout(TIMEOUT_S)
        with theirs:
            # What it prints, it prints to nobody.
            self._process = subprocess.Popen(
                PROGRAM, stdin=theirs.fileno(), stdout=subprocess.DEVNULL
            )
        send(self._channel, source.encode("utf-8", "surrogatepass"))

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def render(self, frame: bytes) -> Rendered:
        try:
            send(self._channel, frame)
            answer = receive(self._channel)
        except OSError:
            answer = None
        if answer is None:
            raise ValueError(TOO_LONG)
        return msgspec.msgpack.decode(answer, type=Rendered)

    def close(self) -> None:
        self._channel.close()
        self._process.kill()
        self._process.wait()


def _close(idle: "queue.LifoQueue[_Renderer | None]") -> None:
    while not idle.empty():
        renderer = idle.get_nowait()
        if renderer is not None:
            renderer.close()
