"""A server of its own, a real core, and 16 streams beside every body that asks for too much.

Times are measured by `benchmarks/hostile.py`; here it counts that all are answered, that nobody
else is, and that nothing of them is kept.
"""

import asyncio
import json
import re
import signal
from pathlib import Path

import httpx
import psutil

from tests.frontend.server.hostile_bodies import COMPLETIONS, bodies
from tests.frontend.server.test_serve import program
from tests.frontend.vocabulary import save

NUM_STREAMS, NUM_TOKENS = 16, 400
FLAGS = ("--load-format", "synthetic", "--step-ms", "10", "--vocab-size", "250")
FLAGS += ("--max-model-len", "8192")
MOST_GROWTH_BYTES = 150 << 20
TIMEOUT_S = 240.0


async def stream(client: httpx.AsyncClient) -> int:
    """The tokens of a stream that is read to its end."""
    body = {"prompt": [1, 2, 3], "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True}
    body |= {"return_token_ids": True}
    count = 0
    async with client.stream("POST", COMPLETIONS, json=body) as response:
        assert response.status_code == 200
        content = b"".join([piece async for piece in response.aiter_raw()])
        for line in content.split(b"\n\n"):  # and not by what else may end a line: it may be text
            if line.startswith(b"data: {"):
                count += len(json.loads(line[6:])["choices"][0]["token_ids"])
    return count


async def held(client: httpx.AsyncClient) -> set[str]:
    """How many requests the engine says to run, and to have waiting."""
    metrics = (await client.get("/metrics")).text
    found = re.findall(r"num_requests_(?:running|waiting)\{.*\} (\S+)", metrics)
    assert found
    return set(found)


async def test_hostile_bodies_beside_streams(tmp_path: Path) -> None:
    save(tmp_path)
    with program("x", *FLAGS, "--tokenizer", str(tmp_path)) as server:
        found = await asyncio.to_thread(server.hear, r"ready after .*: (http://127.0.0.1:\d+)/v1")
        process = psutil.Process(server.pid)
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(
            base_url=found[1],
            timeout=TIMEOUT_S,
            limits=limits,
            headers={"content-type": "application/json"},
        ) as client:
            streams = [asyncio.create_task(stream(client)) for _ in range(NUM_STREAMS)]
            sizes = []
            for _ in range(2):
                for one in bodies():
                    response = await client.post(one.path, content=one.content)
                    assert response.status_code in one.statuses, (one.name, response.text[:300])
                    assert len(response.content) < 4096
                    assert (await client.get("/health")).status_code == 200, one.name
                sizes.append(process.memory_info().rss)
            async with asyncio.timeout(TIMEOUT_S):
                assert await asyncio.gather(*streams) == [NUM_TOKENS] * NUM_STREAMS
            async with asyncio.timeout(TIMEOUT_S):  # a core tells how it is from time to time
                while await held(client) != {"0.0"}:
                    await asyncio.sleep(0.1)
        assert sizes[1] - sizes[0] < MOST_GROWTH_BYTES, "the second round took more"
        server.signal(signal.SIGTERM)
        assert await asyncio.to_thread(server.wait) == 0
