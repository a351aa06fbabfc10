"""The core's socket: bound where only permitted clients can reach it, with finite queues.

`CoreServer` owns the one `Endpoint`. An `ipc://` path lies in a directory of this user's alone;
`tcp://` needs keys, also on this machine, which others may use: who has none gets nothing.
"""

import os
import socket
import stat
import time
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import zmq
from zmq.auth.thread import ThreadAuthenticator

from nanovllm.keys import CoreKeys
from nanovllm.protocol.sockets import READABLE, notice_lost_machines

SEND_HIGH_WATER_MARK = 32  # messages per client; then outputs are merged
RECEIVE_HIGH_WATER_MARK = 256
# Of a message's parts, as numbers: zmq's own flags, and `send_multipart`, take microseconds more.
SEND_MORE, SEND_LAST = int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.NOBLOCK)
LINGER_MS = 1000  # for messages still queued when the core closes
AUTHENTICATOR_TIMEOUT_S = 2.0
Sent = Literal["sent", "full", "gone"]


class Received(NamedTuple):
    """What has arrived from whom. key: with which its sender's connection was opened; none are
    asked for where only this user can connect."""

    identity: bytes
    frames: list[bytes]
    key: str | None = None


class Endpoint:
    """A bound ROUTER. `ValueError`: `address` cannot be used, and what to do about it."""

    def __init__(self, address: str, *, max_frame_bytes: int, keys: CoreKeys | None = None) -> None:
        _check_address(address, has_keys=keys is not None)
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._authenticator: ThreadAuthenticator | None = None
        self._keys = keys
        router: zmq.Socket[bytes] = self.socket
        router.set(zmq.SNDHWM, SEND_HIGH_WATER_MARK)
        router.set(zmq.RCVHWM, RECEIVE_HIGH_WATER_MARK)
        router.set(zmq.ROUTER_MANDATORY, 1)  # an error for clients that are gone
        router.set(zmq.MAXMSGSIZE, max_frame_bytes)  # more, and the sender is disconnected
        if address.startswith("tcp:"):
            router.set(zmq.IPV6, 1)
        notice_lost_machines(router, address)
        try:
            if keys is not None:
                self._authenticator = _require_keys(router, keys)
            router.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(f"address {address!r} cannot be bound: {error}") from None
        except ValueError:
            self.close()
            raise

    def receive(self) -> Received | None:
        """Who sent what, or None if nothing has arrived; never blocks."""
        if not int(self.socket.get(zmq.EVENTS)) & READABLE:  # `Again` would take five times as long
            return None
        if self._keys is not None:
            return _with_key(self.socket.recv_multipart(zmq.NOBLOCK, copy=False))
        identity, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
        return Received(identity, frames)

    def is_operator(self, key: str | None) -> bool:
        """Whether who has this key may look at everybody's requests. Without keys only this user
        can connect, whose core it is."""
        return self._keys is None or (key is not None and self._keys.is_operator(key.encode()))

    def send(self, identity: bytes, frame: bytes) -> Sent:
        """Never blocks. "full": this client does not read; "gone": it is not connected."""
        try:
            self.socket.send(identity, SEND_MORE)
            self.socket.send(frame, SEND_LAST)
        except zmq.Again:
            return "full"
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return "gone"
        return "sent"

    def close(self) -> None:
        """Release the address, after the last words have left or `LINGER_MS`."""
        self.socket.close(LINGER_MS)
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None


def _with_key(parts: list[zmq.Frame]) -> Received:
    """The key is in what ZeroMQ says of a frame, for which it must not be copied at once."""
    key = parts[-1].get("User-Id")
    identity, *frames = (part.bytes for part in parts)
    return Received(identity, frames, str(key))


class _KnownKeys:
    """Answers ZeroMQ's authenticator; looks the directory up each time, so that a client can be
    let in, or shut out, while the core runs."""

    def __init__(self, keys: CoreKeys) -> None:
        self._keys = keys

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self._keys.client_keys()


def _require_keys(router: "zmq.Socket[bytes]", keys: CoreKeys) -> ThreadAuthenticator:
    """CurveZMQ: traffic is encrypted, and only clients with a known key get through."""
    authenticator = ThreadAuthenticator(zmq.Context.instance())
    _start(authenticator)
    authenticator.configure_curve_callback("core", credentials_provider=_KnownKeys(keys))
    router.set(zmq.ZAP_DOMAIN, b"core")
    router.set(zmq.CURVE_SERVER, 1)
    router.set(zmq.CURVE_PUBLICKEY, keys.public.encode())
    router.set(zmq.CURVE_SECRETKEY, keys.secret.encode())
    return authenticator


def _start(authenticator: ThreadAuthenticator) -> None:
    """There is one at most in a process, and ZeroMQ takes a moment to let go of the one before."""
    give_up_at = time.monotonic() + AUTHENTICATOR_TIMEOUT_S
    while True:
        try:
            authenticator.start()
            return
        except zmq.ZMQError as error:
            authenticator.stop()
            if error.errno != zmq.EADDRINUSE:
                raise
        if time.monotonic() > give_up_at:
            raise ValueError("keys: another core in this process has some: close it first")
        time.sleep(0.01)


def _check_address(address: str, *, has_keys: bool) -> None:
    parts = urlsplit(address)
    if parts.scheme == "ipc":
        _check_path(address, Path(address.removeprefix("ipc://")))
    elif parts.scheme != "tcp":
        raise ValueError(f"address {address!r} must begin with ipc:// or tcp://")
    elif not has_keys:
        raise ValueError(
            f"address {address!r} can be reached by other users, also on a loopback address: use "
            "ipc://PATH, or make keys with `nanovllm keys new DIRECTORY` and pass --keys DIRECTORY"
        )


def _check_path(address: str, path: Path) -> None:
    """ZeroMQ would take an ipc path over from a living core without a word: look first."""
    directory = path.parent
    if not directory.is_dir():
        raise ValueError(f"address {address!r}: the directory {directory} does not exist")
    found = directory.stat()
    if found.st_mode & 0o077 or found.st_uid != os.getuid():
        raise ValueError(
            f"address {address!r}: others can enter {directory}; use a directory of your own "
            f"and `chmod 700` it"
        )
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise ValueError(f"address {address!r}: {path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        if probe.connect_ex(str(path)) == 0:
            raise ValueError(f"address {address!r} is in use by another process: choose another")
