"""The process in which long texts are encoded: the tokenizer's native code cannot be interrupted.

`LongTexts` starts it, and kills it if nobody waits for the ids any more. Its standard input is a
socket: first comes the tokenizer as JSON, then a text at a time; each is answered.
"""

import asyncio
import contextlib
import sys
from collections.abc import Callable

import msgspec
from tokenizers import Tokenizer as FastTokenizer

from nanovllm.frontend.child_process import ChildProcess, parent, receive, send

PROGRAM = (sys.executable, "-m", "nanovllm.frontend.encoding_process")
TIMEOUT_S = 120.0  # the longest text that a server takes needs some seconds


class LongText(msgspec.Struct, frozen=True, array_like=True):
    """What is to be encoded; answered by the list of its ids."""

    text: str
    add_special_tokens: bool


class LongTexts:
    """Encodes them one at a time, so that they take neither all threads nor all memory.

    make_json: of the tokenizer. The process starts with the first text.
    """

    def __init__(self, make_json: Callable[[], str]) -> None:
        self._make_json = make_json
        self._turn = asyncio.Lock()
        self._process: ChildProcess | None = None

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Its ids. Cancelled, the encoding ends as well. `ValueError`: it takes too long."""
        async with self._turn:
            try:
                if self._process is None:
                    self._process = await asyncio.to_thread(self._start)
                wanted = LongText(text, add_special_tokens)
                return await asyncio.to_thread(_encode, self._process, wanted)
            except BaseException:
                self.close()  # which also ends the thread's waiting
                raise

    def close(self) -> None:
        """End the process, if there is one; the next text starts another."""
        if self._process is not None:
            self._process.end()
        self._process = None

    def _start(self) -> ChildProcess:
        return ChildProcess(PROGRAM, timeout_s=TIMEOUT_S, first=self._make_json().encode())


def _encode(process: ChildProcess, wanted: LongText) -> list[int]:
    answer = process.ask(msgspec.msgpack.encode(wanted))
    if answer is None:
        raise ValueError(f"prompt: encoding it takes more than {TIMEOUT_S:g} s")
    return msgspec.msgpack.decode(answer, type=list[int])


def main() -> None:
    """Serve until the other side closes."""
    channel = parent()
    with contextlib.suppress(ConnectionError):
        content = receive(channel)
        if content is None:
            return
        fast = FastTokenizer.from_str(content.decode())
        while (frame := receive(channel)) is not None:
            wanted = msgspec.msgpack.decode(frame, type=LongText)
            (encoding,) = fast.encode_batch_fast(
                [wanted.text], add_special_tokens=wanted.add_special_tokens
            )
            send(channel, msgspec.msgpack.encode(encoding.ids))


if __name__ == "__main__":
    main()
