"""Two answers stream at once from one engine, each in its own column."""

import asyncio

from nanovllm import AsyncLLM, SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=60, output_kind="delta")


async def tell(llm: AsyncLLM, column: int, subject: str) -> None:
    messages = [{"role": "user", "content": f"Tell me one fact about {subject}."}]
    async for output in llm.chat(messages, PARAMS):
        if word := output.outputs[0].text.strip():
            print(f"{' ' * column}{word}")


async def main() -> None:
    async with AsyncLLM("smollm2", max_model_len=2048) as llm:
        await asyncio.gather(tell(llm, 0, "whales"), tell(llm, 40, "volcanoes"))


asyncio.run(main())
