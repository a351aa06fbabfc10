"""How fast the frontend turns token ids into text: tokens per second, without a core.

    python benchmarks/frontend.py

Printed: loading the tokenizer; the detokenizer alone; and the whole output path, from the bytes of
`Outputs` messages (one token for each of 256 requests) to a `RequestOutput` in the hands of each
request's own task. Best of several runs, since other programs only ever add time.
Target: ≥ 100,000 tokens/s through the whole path.
"""

import argparse
import asyncio
import random
import time
from collections.abc import Callable

import msgspec
import uvloop

from nanovllm.frontend.detokenizer import DetokenizerFactory
from nanovllm.frontend.request import Request, RequestTable
from nanovllm.frontend.tokenizer import Tokenizer
from nanovllm.protocol.messages import AddRequest, Finished, FromCore, Outputs
from nanovllm.sampling_params import OutputKind, SamplingParams

TEXT = (
    "The quick brown fox jumps over the lazy dog; naïve café, 世界, 👩‍👩‍👧. "
    "def f(x):\n    return x ** 2 + 3.14159\n"
)


def best(run: Callable[[], float], num_runs: int = 5) -> float:
    """The shortest of several timings, in seconds."""
    return min(run() for _ in range(num_runs))


def loading_time(model: str) -> float:
    started = time.perf_counter()
    Tokenizer.load(model)
    return time.perf_counter() - started


def detokenizing_time(tokenizer: Tokenizer, token_ids: list[int]) -> float:
    """Seconds to feed all ids one by one."""
    one = DetokenizerFactory(tokenizer).make(skip_special_tokens=True)
    started = time.perf_counter()
    for token_id in token_ids:
        one.feed((token_id,))
    return time.perf_counter() - started


def frames(rows: list[list[int]]) -> list[bytes]:
    """The messages of a batch in step: entry i of each goes to request i."""
    encode = msgspec.msgpack.Encoder().encode
    numbers = list(range(len(rows)))
    steps = [encode(Outputs(numbers, list(ids))) for ids in zip(*rows, strict=True)]
    return [*steps, encode(Outputs(finished=[Finished(n, "length", None, 0) for n in numbers]))]


async def streaming_time(
    tokenizer: Tokenizer, rows: list[list[int]], params: SamplingParams
) -> float:
    """Seconds from the first frame to the last request's end, each read by a task of its own."""
    table, detokenizers = RequestTable(), DetokenizerFactory(tokenizer)
    requests = [
        Request(str(number), None, AddRequest(number, [1], params), detokenizers)
        for number in range(len(rows))
    ]

    async def consume(request: Request) -> None:
        while not (await request.next_output()).finished:
            pass

    for request in requests:
        table.add(request)
    tasks = [asyncio.create_task(consume(request)) for request in requests]
    decode = msgspec.msgpack.Decoder(FromCore).decode
    messages = frames(rows)
    await asyncio.sleep(0)
    started = time.perf_counter()
    for message in messages:
        outputs = decode(message)
        assert isinstance(outputs, Outputs)
        table.apply(outputs)
        await asyncio.sleep(0)  # lets every task take its output before the next step
    await asyncio.gather(*tasks)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--num-requests", type=int, default=256)
    parser.add_argument("--num-tokens", type=int, default=200)
    arguments = parser.parse_args()
    print(f"tokenizer loaded in {best(lambda: loading_time(arguments.model), 3):.3f} s")

    tokenizer = Tokenizer.load(arguments.model)
    ids = tokenizer.encode(TEXT) * 1000
    print(
        f"detokenizer alone: {len(ids) / best(lambda: detokenizing_time(tokenizer, ids)):,.0f} /s"
    )
    rng = random.Random(0)
    starts = [rng.randrange(100) for _ in range(arguments.num_requests)]
    rows = [ids[start : start + arguments.num_tokens] for start in starts]
    kinds: list[tuple[OutputKind, list[str]]] = [
        ("delta", []),
        ("delta", ["\n\nUser:", "<end>"]),
        ("cumulative", []),
        ("final_only", []),
    ]
    for kind, stop in kinds:
        params = SamplingParams(max_tokens=None, output_kind=kind, stop=stop)
        seconds = best(lambda p=params: uvloop.run(streaming_time(tokenizer, rows, p)), 3)
        rate = sum(map(len, rows)) / seconds
        name = f"{kind}{', with stop strings' if stop else ''}"
        print(f"{arguments.num_requests} streams, {name}: {rate:,.0f} tokens/s")


if __name__ == "__main__":
    main()
