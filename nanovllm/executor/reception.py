"""How ranks of other hosts connect to the core: by TCP, each with keys that let it in once.

The core opens a `Reception`, and gives a rank its keys and the address by way of a launcher; who
starts the rank there calls `connect` with each. The connections become a `channel`.
"""

import secrets
import socket
import time
from hmac import compare_digest

from nanovllm.protocol.plan import DeviceLostError

CONNECT_S = 30.0
KEY_BYTES = 32
KEY_S = 1.0  # in which whoever connects must say its key
# How soon the system ends a connection on which nothing is said, and whose other host has vanished:
# after three seconds, be it that one question was lost (`Channel.ask` is sooner). A process that is
# stopped or busy changes nothing: its host answers.
KEEP_ALIVE = {
    socket.TCP_KEEPIDLE: 1,  # seconds of silence before the first question
    socket.TCP_KEEPINTVL: 1,  # seconds from one to the next
    socket.TCP_KEEPCNT: 2,  # questions without an answer
}


class Reception:
    """Where ranks connect to the core. Each key lets one connection in, and no second one."""

    def __init__(self, host: str, num_keys: int) -> None:
        self.keys = [secrets.token_bytes(KEY_BYTES) for _ in range(num_keys)]
        self._listener = socket.create_server((host, 0), backlog=num_keys + 16)
        self.address: tuple[str, int] = (host, self._listener.getsockname()[1])

    def receive(self, until: float) -> list[socket.socket]:
        """The connections in the order of their keys. Raises `DeviceLostError` if one is missing
        at that time."""
        found: dict[int, socket.socket] = {}
        while len(found) < len(self.keys):
            self._listener.settimeout(max(0.001, until - time.monotonic()))
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                for other in found.values():
                    other.close()
                raise DeviceLostError(
                    f"ranks have not connected to the core at {self.address[0]}: can their hosts "
                    "reach it, at any port?"
                ) from None
            number = self._number_of(connection)
            if number is None or number in found:
                connection.close()  # a stranger
            else:
                found[number] = connection
        return [found[number] for number in range(len(self.keys))]

    def _number_of(self, connection: socket.socket) -> int | None:
        """Of the key that whoever has connected says; None if it says none."""
        keep_watch(connection)
        connection.settimeout(KEY_S)
        said = b""
        try:
            while len(said) < KEY_BYTES and (more := connection.recv(KEY_BYTES - len(said))):
                said += more
        except OSError:  # silent, or gone again
            return None
        return next((n for n, key in enumerate(self.keys) if compare_digest(said, key)), None)

    def __enter__(self) -> "Reception":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()


def connect(core: tuple[str, int], key: bytes) -> socket.socket:
    """A connection to the core's `Reception`."""
    connection = socket.create_connection(core, timeout=CONNECT_S)
    keep_watch(connection)
    connection.sendall(key)
    return connection


def keep_watch(connection: socket.socket) -> None:
    """Frames go at once, and the system asks whether the other host is still there."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEP_ALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
