"""One core, several clients: start `nanovllm-core` alone, then attach to its address twice."""

import asyncio
import subprocess
import sys
import tempfile

from nanovllm import AsyncLLM, SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=40, output_kind="final_only")


async def ask(address: str, question: str) -> None:
    async with await AsyncLLM.connect(address) as llm:
        async for output in llm.chat([{"role": "user", "content": question}], PARAMS):
            print(f"> {question}\n{output.outputs[0].text}\n")


async def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        address = f"ipc://{directory}/core.sock"
        command = [sys.executable, "-m", "nanovllm.launch", "--address", address]
        core = subprocess.Popen([*command, "--model", "smollm2", "--max-model-len", "2048"])
        try:
            await asyncio.gather(
                ask(address, "What is a whale?"), ask(address, "What is a volcano?")
            )
        finally:
            core.terminate()
            core.wait()


asyncio.run(main())
