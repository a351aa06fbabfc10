"""One end of a socket pair that carries frames: a length, then a message in MessagePack.

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
    """Takes the socket over."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        end.setblocking(False)
        self._unsent = bytearray()
        self._arrived = bytearray()

    def fileno(self) -> int:
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
                return False
            except (BrokenPipeError, ConnectionResetError) as error:
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
            pass
        except ConnectionResetError:
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

    def close(self) -> None:
        """The other end sees it. Safe to call twice."""
        self._end.close()
