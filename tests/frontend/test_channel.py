"""The socket of a frontend: order, bursts, a peer that lags, and what fails in its listener."""

import asyncio

import zmq

from nanovllm.frontend.channel import BURST, HIGH_WATER_MARK, Channel

MANY = 3 * HIGH_WATER_MARK


class Recorder:
    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.failures: list[Exception] = []
        self.connected = asyncio.Event()
        self.disconnected = asyncio.Event()

    def on_frame(self, frame: bytes) -> None:
        if frame == b"bad":
            raise ValueError("bad frame")
        self.frames.append(frame)

    def on_connected(self) -> None:
        self.connected.set()

    def on_disconnected(self) -> None:
        self.disconnected.set()

    def on_failure(self, error: Exception) -> None:
        self.failures.append(error)


def bind(address: str) -> zmq.Socket[bytes]:
    router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    router.bind(address)
    return router


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_frames_sent_before_and_past_the_high_water_mark_arrive_in_order(
    address: str,
) -> None:
    recorder = Recorder()
    channel = Channel(address, recorder)
    channel.connect()
    for index in range(MANY):
        channel.send(str(index).encode())
    router = bind(address)
    await recorder.connected.wait()
    received: list[bytes] = []
    while len(received) < MANY:
        await asyncio.sleep(0)
        while router.poll(0):
            received.append(router.recv_multipart()[1])
    assert received == [str(index).encode() for index in range(MANY)]
    channel.close()
    channel.close()
    router.close(0)


async def test_a_flood_lets_others_have_their_turn(address: str) -> None:
    router = bind(address)
    recorder = Recorder()
    channel = Channel(address, recorder)
    channel.connect()
    channel.send(b"hello")
    identity, _ = await asyncio.to_thread(router.recv_multipart)
    for index in range(10 * BURST):
        router.send_multipart([identity, str(index).encode()])
    longest, before = 0, 0
    while len(recorder.frames) < 10 * BURST:
        await asyncio.sleep(0)
        longest = max(longest, len(recorder.frames) - before)
        before = len(recorder.frames)
    assert longest <= BURST
    assert recorder.frames == [str(index).encode() for index in range(10 * BURST)]
    channel.close()
    router.close(0)


async def test_a_listener_that_raises_and_a_peer_that_goes(address: str) -> None:
    router = bind(address)
    recorder = Recorder()
    channel = Channel(address, recorder)
    channel.connect()
    channel.send(b"hello")
    identity, _ = await asyncio.to_thread(router.recv_multipart)
    router.send_multipart([identity, b"bad"])
    router.send_multipart([identity, b"good"])
    await until(lambda: recorder.failures)
    assert str(recorder.failures[0]) == "bad frame"
    router.close(0)
    async with asyncio.timeout(5):
        await recorder.disconnected.wait()
    channel.close()
