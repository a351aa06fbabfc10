"""One end of a connection that carries frames: a length, then a message in MessagePack.

A group holds one per rank, and the rank the other end. Nothing here blocks: whoever waits does so
in a poll of its own, in which it also sees that the other end has gone.
"""

import socket
import struct
from collections.abc import Iterator

HEADER = struct.Struct("<I")
MOST_AT_ONCE = 2**18


class ChannelClosedError(Exception):
    """The process at the other end has gone, or has closed its end."""


class Channel:
    """Takes the sockets over.

    lifeline: between hosts, a second connection to the same process, on which nothing is ever said.
    There the system can ask the other host whether it still lives, which it does not where frames
    wait to be sent. The end of either connection is the end of the channel.
    """

    def __init__(self, end: socket.socket, lifeline: socket.socket | None = None) -> None:
        self._sockets = [end] if lifeline is None else [end, lifeline]
        for one in self._sockets:
            one.setblocking(False)
        self._end = end
        self._lifeline = lifeline
        self._unsent = bytearray()
        self._arrived = bytearray()
        self.descriptors = tuple(one.fileno() for one in self._sockets)  # to be polled for input

    def fileno(self) -> int:
        """That of the frames."""
        return self._end.fileno()

    def send(self, frame: bytes) -> None:
        """Send a frame, or keep what the other end has no room for (see `flush`)."""
        self._unsent += HEADER.pack(len(frame))
        self._unsent += frame
        self.flush()

    def flush(self) -> bool:
        """Send what has been kept; whether nothing is left. Raises `ChannelClosedError`."""
        while self._unsent:
            try:
                num_sent = self._end.send(self._unsent)
            except BlockingIOError:
                if self._is_cut:
                    raise ChannelClosedError from None
                return False
            except OSError as error:
                raise ChannelClosedError from error
            del self._unsent[:num_sent]
        return True

    def receive(self) -> Iterator[bytes]:
        """The frames that have arrived whole. Raises `ChannelClosedError` behind the last one."""
        is_open = True
        try:
            data = self._end.recv(MOST_AT_ONCE)
            is_open = bool(data)
            self._arrived += data
        except BlockingIOError:
            is_open = not self._is_cut
        except OSError:  # by the other end, or because its host cannot be reached
            is_open = False
        while len(self._arrived) >= HEADER.size:
            end = HEADER.size + HEADER.unpack_from(self._arrived)[0]
            if len(self._arrived) < end:
                break
            frame = bytes(self._arrived[HEADER.size : end])
            del self._arrived[:end]
            yield frame
        if not is_open:
            raise ChannelClosedError

    @property
    def _is_cut(self) -> bool:
        """Whether the lifeline has ended, if there is one."""
        return self._lifeline is not None and has_ended(self._lifeline)

    def close(self) -> None:
        """The other end sees it. Safe to call twice."""
        for one in self._sockets:
            one.close()


def has_ended(silent: socket.socket) -> bool:
    """Whether the other end of a connection on which nothing is said has gone."""
    try:
        return not silent.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True
