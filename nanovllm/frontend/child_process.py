"""A child process that answers frames, for code that is untrusted, slow or cannot be interrupted.

`ChatTemplate`, `LongTexts` and `BodyTrials` keep some. The child's standard input is a socket, from
which it takes frames with `receive`, and answers with `send`: its `parent`. A frame is a length of
four bytes and the content.
"""

import contextlib
import resource
import signal
import socket
import struct
import subprocess
import weakref
from collections.abc import Sequence

LENGTH = struct.Struct("<I")
SMALL = 1 << 16  # bytes; sent as one, a frame wakes the other side once


def send(channel: socket.socket, content: bytes | bytearray) -> None:
    """One frame. `OSError` if the other side is gone or does not read in time."""
    head = LENGTH.pack(len(content))
    if len(content) < SMALL:  # else to join the two would copy much
        channel.sendall(head + content)
    else:
        channel.sendall(head)
        channel.sendall(content)


def receive(channel: socket.socket) -> bytes | None:
    """One frame, or None if the other side has closed."""
    head = _read(channel, LENGTH.size)
    return None if head is None else _read(channel, LENGTH.unpack(head)[0])


def _read(channel: socket.socket, count: int) -> bytes | None:
    parts = []
    while count:
        part = channel.recv(min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


class ChildProcess:
    """It ends with this object at the latest; `end` kills it. What it prints goes to nobody."""

    def __init__(
        self, program: Sequence[str], *, timeout_s: float, first: bytes | None = None
    ) -> None:
        """timeout_s: within which it takes something in, and answers. first: a frame that it does
        not answer. `OSError` if it is gone at once or does not read that."""
        self._channel, theirs = socket.socketpair()
        self._channel.settimeout(timeout_s)
        with theirs:
            self._process = subprocess.Popen(
                program, stdin=theirs.fileno(), stdout=subprocess.DEVNULL
            )
        self.end = weakref.finalize(self, _end, self._process, self._channel)
        if first is not None:
            send(self._channel, first)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, *frames: bytes | bytearray) -> bytes | None:
        """Its answer to them all; None if it is gone, or does not answer in time. Then it has been
        ended: it might answer later, whoever asks next."""
        answer: bytes | None = None
        try:
            for frame in frames:
                send(self._channel, frame)
            answer = receive(self._channel)
        except OSError:
            pass
        finally:
            if answer is None:
                self.end()
        return answer


def parent() -> socket.socket:
    """In the child: the way to who has started it. Ctrl-C is the parent's affair, and no file is
    left of a child that is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return socket.socket(fileno=0)


def _end(process: "subprocess.Popen[bytes]", channel: socket.socket) -> None:
    process.kill()
    process.wait()
    with contextlib.suppress(OSError):
        channel.shutdown(socket.SHUT_RDWR)  # which ends the waiting of another thread
    channel.close()
