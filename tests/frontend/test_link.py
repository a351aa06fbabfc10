"""The socket of a frontend: order, bursts, a peer that lags, and what fails in its listener."""

import asyncio

import msgspec
import pytest
import zmq

from nanovllm.frontend.link import BURST, HIGH_WATER_MARK, Link, make_dealer
from nanovllm.protocol.messages import Abort, FromCore, Heartbeat, Outputs, Pulse, ToCore
from tests.waiting import WAIT_S

MANY = 3 * HIGH_WATER_MARK


class Recorder:
    def __init__(self) -> None:
        self.frames: list[int] = []
        self.messages: list[FromCore] = []
        self.failures: list[Exception] = []
        self.disconnected = asyncio.Event()

    def on_outputs(self, outputs: Outputs) -> None:
        if outputs.numbers == [-1]:
            raise ValueError("bad frame")
        self.frames += outputs.numbers

    def on_message(self, message: FromCore) -> None:
        self.messages.append(message)

    def on_disconnected(self) -> None:
        self.disconnected.set()

    def on_failure(self, error: Exception) -> None:
        self.failures.append(error)


def link_of(address: str, recorder: Recorder) -> Link:
    return Link(address, recorder, recorder.on_outputs)


def frame(message: ToCore | FromCore) -> bytes:
    return msgspec.msgpack.encode(message)


def bind(address: str) -> zmq.Socket[bytes]:
    router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    router.bind(address)
    return router


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.005)


async def test_frames_sent_before_and_past_the_high_water_mark_arrive_in_order(
    address: str,
) -> None:
    recorder = Recorder()
    link = link_of(address, recorder)
    link.connect()
    for index in range(MANY):
        link.send(Abort([index]))
    router = bind(address)
    await until(lambda: link.has_met)
    received: list[bytes] = []
    while len(received) < MANY:
        await asyncio.sleep(0)
        while router.poll(0):
            received.append(router.recv_multipart()[1])
    assert received == [frame(Abort([index])) for index in range(MANY)]
    link.close()
    link.close()
    router.close(0)


async def test_a_flood_lets_others_have_their_turn(address: str) -> None:
    router = bind(address)
    recorder = Recorder()
    link = link_of(address, recorder)
    link.connect()
    link.send(Heartbeat())
    identity, _ = await asyncio.to_thread(router.recv_multipart)
    for index in range(10 * BURST):
        router.send_multipart([identity, frame(Outputs([index], [0]))])
    longest, before = 0, 0
    while len(recorder.frames) < 10 * BURST:
        await asyncio.sleep(0)
        longest = max(longest, len(recorder.frames) - before)
        before = len(recorder.frames)
    assert longest <= BURST
    assert recorder.frames == list(range(10 * BURST))
    link.close()
    router.close(0)


async def test_a_listener_that_raises_and_a_peer_that_goes(address: str) -> None:
    router = bind(address)
    recorder = Recorder()
    link = link_of(address, recorder)
    link.connect()
    link.send(Heartbeat())
    identity, _ = await asyncio.to_thread(router.recv_multipart)
    router.send_multipart([identity, frame(Outputs([-1], [0]))])
    router.send_multipart([identity, frame(Pulse())])
    await until(lambda: recorder.failures)
    assert str(recorder.failures[0]) == "bad frame"
    router.close(0)
    async with asyncio.timeout(WAIT_S):
        await recorder.disconnected.wait()
    link.close()


def test_a_frontends_socket_has_finite_queues_and_notices_a_peer_that_is_cut_off() -> None:
    for address, is_far in (("tcp://127.0.0.1:1", True), ("ipc:///nowhere", False)):
        with make_dealer(address, None) as dealer:
            assert dealer.get(zmq.SNDHWM) == dealer.get(zmq.RCVHWM) == HIGH_WATER_MARK
            assert dealer.get(zmq.RECONNECT_IVL) <= dealer.get(zmq.RECONNECT_IVL_MAX) < 1000
            beats = dealer.get(zmq.HEARTBEAT_IVL), dealer.get(zmq.HEARTBEAT_TIMEOUT)
            assert (0 < beats[0] < beats[1]) if is_far else beats[0] == 0


async def test_a_closed_link_hears_nothing_and_a_failure_at_a_peers_end_is_told(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = bind(address)
    recorder = Recorder()
    link, closed = link_of(address, recorder), link_of(address, Recorder())
    for one in (link, closed):
        one.connect()
        one.send(Heartbeat())
    identities = [(await asyncio.to_thread(router.recv_multipart))[0] for _ in range(2)]
    for identity in identities:
        router.send_multipart([identity, frame(Outputs([1], [0]))])
    closed.close()
    heard = closed._listener
    await until(lambda: recorder.frames == [1])
    assert isinstance(heard, Recorder) and not heard.frames

    def fail() -> None:
        raise ValueError("no end")

    monkeypatch.setattr(recorder, "on_disconnected", fail)
    router.close(0)
    await until(lambda: recorder.failures)
    assert str(recorder.failures[0]) == "no end" and not heard.failures
    link.close()
