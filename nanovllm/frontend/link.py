"""Every frame between a frontend and its core: a DEALER socket in the event loop.

Made by `CoreLife`, one for each life of the core. Outputs go straight to who reads them, everything
else to the life. It drives the socket itself, where `zmq.asyncio` would make a future and several
callbacks of each frame: at thousands of frames a second that is most of the work.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from nanovllm.keys import ClientKeys
from nanovllm.protocol.messages import FromCore, Outputs, ToCore
from nanovllm.protocol.sockets import READABLE, WRITABLE, notice_lost_machines

HIGH_WATER_MARK = 1000
LINGER_MS = 500
RECONNECT_MS, RECONNECT_MAX_MS = 20, 100  # while the core has not bound its address yet
BURST = 64  # frames taken before others in the event loop have their turn


class Listener(Protocol):
    """Told what happens on the link apart from outputs, in the event loop."""

    def on_message(self, message: FromCore) -> None: ...

    def on_disconnected(self) -> None:
        """The kernel closes a dead process's sockets at once: no connection, no peer."""

    def on_failure(self, error: Exception) -> None:
        """The socket, or whoever was told something, has raised."""


class Link:
    """Connects to `address`, which may not be bound yet."""

    def __init__(
        self,
        address: str,
        listener: Listener,
        on_outputs: Callable[[Outputs], None],
        *,
        keys: ClientKeys | None = None,
    ) -> None:
        self._address = address
        self._listener = listener
        self._on_outputs = on_outputs
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)
        self._socket = make_dealer(address, keys)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[bytes] = deque()
        self._turn: asyncio.Handle | None = None
        self._closed = False
        self.has_met = False  # the peer has answered the handshake
        self.last_heard = time.monotonic()

    def connect(self) -> None:
        """Raises `zmq.ZMQError` if the address is none."""
        self._socket.connect(self._address)
        self._loop.add_reader(self._socket.FD, self._take_turn)
        self._loop.add_reader(self._monitor.FD, self._take_events)
        # A descriptor tells of changes since the last look, so there has to be a first one.
        self._loop.call_soon(self._take_events)
        self._come_back()

    def send(self, message: ToCore) -> None:
        """Send at once, or, when the peer lags by `HIGH_WATER_MARK` frames, in order later."""
        self._unsent.append(self._encoder.encode(message))
        self._send_all()
        # Sending counts as a look, and may have been the only one at a frame that has come.
        self._look()

    def close(self) -> None:
        """What has been sent has `LINGER_MS` to leave; nothing is received any more."""
        if self._closed:
            return
        self._closed = True
        for one in (self._socket, self._monitor):
            self._loop.remove_reader(one.FD)
        if self._turn is not None:
            self._turn.cancel()
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(LINGER_MS)

    def _take_turn(self) -> None:
        self._turn = None
        try:
            self._send_all()
            for _ in range(BURST):
                # To be told so by `Again` would take five times as long.
                if not int(self._socket.get(zmq.EVENTS)) & READABLE:
                    break
                frame = self._socket.recv(zmq.NOBLOCK)
                self.last_heard = time.monotonic()
                message = self._decoder.decode(frame)
                if type(message) is Outputs:
                    self._on_outputs(message)
                else:
                    self._listener.on_message(message)
                if self._closed:
                    return
            else:
                self._come_back()
            if self._unsent:
                self._look()
        except Exception as error:
            self._listener.on_failure(error)

    def _take_events(self) -> None:
        try:
            while not self._closed:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
                if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self.has_met = True
                    self.last_heard = time.monotonic()
                elif event["event"] == zmq.EVENT_DISCONNECTED:
                    self._listener.on_disconnected()
        except zmq.Again:
            pass
        except Exception as error:
            self._listener.on_failure(error)

    def _send_all(self) -> None:
        while self._unsent:
            try:
                self._socket.send(self._unsent[0], zmq.NOBLOCK)
            except zmq.Again:
                return
            self._unsent.popleft()

    def _look(self) -> None:
        """Come back for what is possible already: of that, the descriptor will not tell."""
        if int(self._socket.get(zmq.EVENTS)) & (READABLE | WRITABLE if self._unsent else READABLE):
            self._come_back()

    def _come_back(self) -> None:
        if self._turn is None:
            self._turn = self._loop.call_soon(self._take_turn)


def make_dealer(address: str, keys: ClientKeys | None) -> zmq.Socket[bytes]:
    """A DEALER with finite queues that tries its peer often."""
    dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    dealer.set(zmq.SNDHWM, HIGH_WATER_MARK)
    dealer.set(zmq.RCVHWM, HIGH_WATER_MARK)
    dealer.set(zmq.LINGER, LINGER_MS)
    dealer.set(zmq.RECONNECT_IVL, RECONNECT_MS)
    dealer.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    notice_lost_machines(dealer, address)
    if keys is not None:
        dealer.set(zmq.CURVE_PUBLICKEY, keys.public.encode())
        dealer.set(zmq.CURVE_SECRETKEY, keys.secret.encode())
        dealer.set(zmq.CURVE_SERVERKEY, keys.core.encode())
    return dealer
