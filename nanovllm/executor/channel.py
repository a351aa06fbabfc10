"""One end of a connection that carries frames: a length, then a message in MessagePack.

A group holds one per rank, and the rank the other end. Nothing here blocks: whoever waits does so
in a poll of its own, in which it also sees that the other end has gone.
"""

import socket
import struct
from collections.abc import Iterator
from errno import EHOSTUNREACH, ENETUNREACH, ETIMEDOUT

HEADER = struct.Struct("<I")
MOST_AT_ONCE = 2**18
ASK, ANSWER = b"?", b"!"  # on a lifeline
CONFIRM_MS = 1200  # for the other host's system to confirm a byte, which is sent again meanwhile
MOST_ASKED = 2**12  # bytes without an answer: a process that is stopped leaves them unread
OUT_OF_REACH = frozenset({ETIMEDOUT, EHOSTUNREACH, ENETUNREACH})


class ChannelClosedError(Exception):
    """The process at the other end has gone, or has closed its end."""


class Channel:
    """Takes the sockets over.

    lifeline: between hosts, a second connection to the same process, which tells soon whether the
    other host has vanished (`ask`), as that of the frames does not while some wait to be sent. The
    end of either connection is the end of the channel.
    """

    def __init__(self, end: socket.socket, lifeline: socket.socket | None = None) -> None:
        self._sockets = [end] if lifeline is None else [end, lifeline]
        for one in self._sockets:
            one.setblocking(False)
        self._end = end
        self._lifeline = lifeline
        self._unsent = bytearray()
        self._arrived = bytearray()
        self._num_asked = 0  # since the last answer
        self.is_out_of_reach = False  # the channel has ended because the other host was silent
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
                self._note(error)
                raise ChannelClosedError from error
            del self._unsent[:num_sent]
        return True

    def ask(self) -> None:
        """Ask for a sign of life. The other host's system has to confirm that it has the question,
        be the process busy or stopped; if it does not, the channel ends. The process answers when
        it comes to it; until then it is asked up to `MOST_ASKED` times."""
        if self._lifeline is None or self._num_asked == MOST_ASKED:
            return
        self._num_asked += 1
        try:
            self._lifeline.send(ASK)
            if self._num_asked in (1, MOST_ASKED):
                self._demand_confirmation(self._num_asked == 1)
        except OSError as error:  # told once, here or to `receive`, which sees that it has ended
            self._note(error)

    def receive(self) -> Iterator[bytes]:
        """The frames that have arrived whole. Raises `ChannelClosedError` behind the last one."""
        is_open = True
        try:
            data = self._end.recv(MOST_AT_ONCE)
            is_open = bool(data)
            self._arrived += data
        except BlockingIOError:
            is_open = not self._is_cut
        except OSError as error:  # by the other end, or because its host cannot be reached
            self._note(error)
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
        """Whether the lifeline has ended, if there is one. Takes in what was said there."""
        if self._lifeline is None:
            return False
        try:
            said = self._lifeline.recv(MOST_ASKED)
            if ASK in said:
                self._lifeline.send(ANSWER)
            if ANSWER in said and self._num_asked:
                self._num_asked = 0
                self._demand_confirmation(False)
        except BlockingIOError:
            return False
        except OSError as error:
            self._note(error)
            return True
        return not said

    def _note(self, error: OSError) -> None:
        self.is_out_of_reach |= error.errno in OUT_OF_REACH  # what follows are errors of its end

    def _demand_confirmation(self, is_soon: bool) -> None:
        """Or leave it to the patience of `reception.KEEP_ALIVE`, as where nothing is asked."""
        assert self._lifeline is not None
        if self._lifeline.family != socket.AF_UNIX:
            wait_ms = CONFIRM_MS if is_soon else 0
            self._lifeline.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, wait_ms)

    def close(self) -> None:
        """The other end sees it. Safe to call twice."""
        for one in self._sockets:
            one.close()


def has_ended(lifeline: socket.socket) -> bool:
    """Whether the other end has gone, for who has nothing more to hear from it."""
    try:
        return not lifeline.recv(MOST_ASKED)
    except BlockingIOError:
        return False
    except OSError:
        return True
