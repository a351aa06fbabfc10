"""An `AsyncLLM` attached to a scripted core, or owning it, and ways to read its streams."""

import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.outputs import RequestOutput
from nanovllm.protocol.messages import AddRequest, CallResult, Finished, FromCore, Outputs, ToCore
from tests.frontend.fake_core import FakeCore, Script, silent
from tests.frontend.vocabulary import byte_tokenizer


@asynccontextmanager
async def attached(
    address: str, script: Script = silent, **supervision: Any
) -> AsyncIterator[tuple[AsyncLLM, FakeCore]]:
    with FakeCore(address, script) as core:
        llm = await AsyncLLM.connect(address, tokenizer=byte_tokenizer(), **supervision)
        try:
            yield llm, core
        finally:
            await llm.close()


async def all_of(stream: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in stream]


async def last_of(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
    return (await all_of(stream))[-1]


async def settled(llm: AsyncLLM, core: FakeCore) -> None:
    """Everything pushed so far has been taken in, since messages come in order."""
    core.push(CallResult(0))
    await llm.reset_prefix_cache()


def says(*chunks: str | bytes | list[int], end: str | None = "length") -> Script:
    """Requests get these tokens, one message per chunk, and then an end."""

    def script(message: ToCore) -> Iterable[FromCore]:
        if isinstance(message, AddRequest):
            for chunk in chunks:
                ids = list(chunk.encode() if isinstance(chunk, str) else chunk)
                yield Outputs([message.number] * len(ids), ids)
            if end is not None:
                yield Outputs(finished=[Finished(message.number, end, None, 0)])  # type: ignore[arg-type]
        else:
            yield from silent(message)

    return script


@dataclass
class Handle:
    """What `start_core` returns, around a fake core and some process."""

    address: str
    process: "subprocess.Popen[bytes]"
    closed: int = 0
    restarts: int = 0

    def end(self) -> int:
        self.process.kill()
        return self.process.wait()

    def restart(self) -> None:
        assert self.process.poll() is not None, "a core is ended before it is started again"
        self.restarts += 1
        self.process = idle_process()

    def close(self) -> int:
        self.closed += 1
        return self.end()


def idle_process() -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
