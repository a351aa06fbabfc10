"""Connections of ranks on other hosts: a key lets in once, and who has gone is noticed."""

import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from errno import EPIPE, ETIMEDOUT
from functools import partial
from typing import Any

import pytest

from nanovllm.executor import channel as channel_module
from nanovllm.executor import reception as reception_module
from nanovllm.executor.channel import Channel, ChannelClosedError
from nanovllm.executor.reception import KEY_BYTES, Reception, connect
from nanovllm.protocol.plan import DeviceLostError
from tests.waiting import WAIT_S


@pytest.fixture
def reception() -> Iterator[Reception]:
    with Reception("127.0.0.1", 2) as reception:
        yield reception


def test_connections_come_in_the_order_of_their_keys(
    reception: Reception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes with a wrong key, with one that has been used, or goes away, is let go."""
    monkeypatch.setattr(reception_module, "KEY_S", WAIT_S)
    gone = socket.create_connection(reception.address)
    gone.close()
    second = connect(reception.address, reception.keys[1])
    strangers = [connect(reception.address, bytes(KEY_BYTES))]
    strangers.append(connect(reception.address, reception.keys[1]))
    first = connect(reception.address, reception.keys[0])
    received = reception.receive(time.monotonic() + WAIT_S)
    for theirs, ours in zip((first, second), received, strict=True):
        assert theirs.getsockname() == ours.getpeername()
        for one in (theirs, ours):
            assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 2
    for stranger in strangers:
        assert not stranger.recv(1)
    for one in (first, second, *strangers, *received):
        one.close()


def test_a_silent_stranger_is_not_waited_for(
    reception: Reception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception_module, "KEY_S", 0.01)
    silent = socket.create_connection(reception.address)
    with pytest.raises(DeviceLostError, match=r"have not connected to the core at 127\.0\.0\.1"):
        reception.receive(time.monotonic())
    silent.close()


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket, socket.socket]]:
    """A channel, and the other ends of its two connections."""
    (frames, theirs), (lifeline, silent) = socket.socketpair(), socket.socketpair()
    channel = Channel(frames, lifeline)
    yield channel, theirs, silent
    channel.close()
    theirs.close()
    silent.close()


def test_a_channel_ends_with_its_lifeline(
    ends: tuple[Channel, socket.socket, socket.socket],
) -> None:
    """After what had arrived before; whoever waits for frames is woken."""
    channel, theirs, silent = ends
    assert list(channel.receive()) == []
    theirs.sendall(struct.pack("<I", 3) + b"abc")
    silent.close()
    assert list(channel.receive()) == [b"abc"]
    waiting = select.poll()
    for descriptor in channel.descriptors:
        waiting.register(descriptor, select.POLLIN)
    assert waiting.poll(WAIT_S * 1e3)
    with pytest.raises(ChannelClosedError):
        list(channel.receive())


def test_a_sign_of_life_is_asked_for_and_given(
    ends: tuple[Channel, socket.socket, socket.socket],
) -> None:
    """By who comes to receive; the channel stays, and frames are none the later for it."""
    asking, frames, lifeline = ends
    with closing(Channel(frames, lifeline)) as asked:
        asking.ask()
        asking.ask()
        assert list(asked.receive()) == []
        asked.send(b"abc")
        assert list(asking.receive()) == [b"abc"]
        assert list(asking.receive()) == [] and asking._num_asked == 0
        assert not asking.is_out_of_reach


def test_who_does_not_answer_is_not_asked_for_ever(
    ends: tuple[Channel, socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that a signal has stopped for days is not to run out of room for questions."""
    monkeypatch.setattr(channel_module, "MOST_ASKED", 3)
    channel, _, silent = ends
    for _ in range(9):
        channel.ask()
    assert silent.recv(99) == channel_module.ASK * 3
    silent.send(channel_module.ANSWER)
    assert list(channel.receive()) == []
    channel.ask()
    assert silent.recv(99) == channel_module.ASK


class Vanished(socket.socket):
    """The system says once that the other host is out of reach, to whoever calls it next."""

    def __init__(self) -> None:
        ours, self._theirs = socket.socketpair()
        super().__init__(fileno=ours.detach())
        self._error: int | None = ETIMEDOUT

    def _call(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise OSError(error, "told once")

    def send(self, *_: Any) -> int:
        self._call()
        raise BrokenPipeError(EPIPE, "told from then on")

    def recv(self, *_: Any) -> bytes:
        self._call()
        return b""


@pytest.mark.parametrize("asks_first", [False, True])
def test_a_host_that_has_vanished_is_known_by_whatever_is_told_of_it(asks_first: bool) -> None:
    """The next question may be told instead of who takes in what has arrived."""
    frames, theirs = socket.socketpair()
    lifeline = Vanished()
    with closing(Channel(frames, lifeline)) as channel, theirs, lifeline._theirs:
        for _ in range(2 * asks_first):
            channel.ask()
        with pytest.raises(ChannelClosedError):
            list(channel.receive())
        assert channel.is_out_of_reach


def test_only_while_something_is_asked_it_has_to_be_confirmed_soon(reception: Reception) -> None:
    """A host that is silent between steps is not taken for gone because a packet was lost."""
    theirs = [connect(reception.address, key) for key in reception.keys]
    ours = reception.receive(time.monotonic() + WAIT_S)
    with closing(Channel(*ours)) as asking, closing(Channel(*theirs)) as asked:
        wait_ms = partial(ours[1].getsockopt, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert wait_ms() == 0
        asking.ask()
        assert wait_ms() == channel_module.CONFIRM_MS
        ready = select.poll()
        for question, channel in ((theirs[1], asked), (ours[1], asking)):
            ready.register(question, select.POLLIN)
            assert ready.poll(WAIT_S * 1e3)
            ready.unregister(question)
            assert list(channel.receive()) == []
        assert wait_ms() == 0


def test_frames_for_a_host_that_has_vanished_are_not_kept_for_ever(
    ends: tuple[Channel, socket.socket, socket.socket],
) -> None:
    channel, _, silent = ends
    channel.send(bytes(2**24))
    assert not channel.flush()  # nobody reads
    silent.close()
    with pytest.raises(ChannelClosedError):
        channel.flush()


def test_a_process_that_waits_ends_with_its_channel() -> None:
    """TCP tells of an end that was closed by more than a hang-up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    woken = threading.Event()
    hangup = select.poll()
    hangup.register(theirs, select.POLLRDHUP)

    def wait() -> None:
        hangup.poll()
        woken.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    ours.close()
    assert woken.wait(WAIT_S)
    waiter.join()
    theirs.close()
