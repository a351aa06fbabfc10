"""Memory of a core on a CPU: after its start, and while requests of random lengths go through it.

    python benchmarks/resident.py --requests 2000 [--model smollm2] [--dtype auto]

Printed are the resident memory of the core's process (anonymous and of files), its weights beside
the size of the model's file, and the growth between the first tenth of the requests and the last.
"""

import argparse
import asyncio
import random
from pathlib import Path

from nanovllm.checkpoint.locate import locate
from nanovllm.config import EngineConfig
from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.core_process import start_core
from nanovllm.sampling_params import SamplingParams

MIB = 2**20


def resident(pid: int) -> dict[str, int]:
    """Bytes by kind: Rss, Pss, Anonymous, …"""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    fields = (line.split() for line in lines)
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, _ in fields}


def describe(pid: int) -> str:
    found = resident(pid)
    files = found["Rss"] - found["Anonymous"]
    return f"{found['Rss'] / MIB:6.0f} MiB resident ({files / MIB:.0f} of files)"


async def load(llm: AsyncLLM, arguments: argparse.Namespace, pid: int) -> None:
    rng, tenth = random.Random(0), max(1, arguments.requests // 10)
    todo, done, early = iter(range(arguments.requests)), 0, 0

    async def stream() -> None:
        nonlocal done, early
        for _ in todo:
            prompt = [rng.randrange(1, 40_000) for _ in range(rng.randint(1, arguments.input_len))]
            params = SamplingParams(
                max_tokens=rng.randint(1, arguments.output_len),
                temperature=rng.choice([0.0, 0.8]),
                ignore_eos=True,
            )
            async for _output in llm.generate(prompt, params):
                pass
            done += 1
            if done % tenth == 0:
                print(f"{done:6} requests: {describe(pid)}", flush=True)
                early = early or resident(pid)["Rss"]

    await asyncio.gather(*[stream() for _ in range(arguments.streams)])
    growth = resident(pid)["Rss"] - early
    print(f"from the first tenth to the last: {growth / MIB:+.1f} MiB")


async def measure(arguments: argparse.Namespace) -> None:
    fields = {"kv_cache_memory_bytes": arguments.kv_cache_memory_bytes, "dtype": arguments.dtype}
    config = EngineConfig.from_kwargs(model=arguments.model, device="cpu", **fields)
    handle = start_core(config)
    llm = await AsyncLLM.connect(handle.address)
    try:
        pid = handle.process.pid
        path = locate(arguments.model).path
        files = sum(
            f.stat().st_size for f in ([path] if path.is_file() else path.glob("*.safetensors"))
        )
        weights = llm.info.worker.memory_bytes["weights"]
        print(f"weights {weights / MIB:.1f} MiB, {weights / files:.2f} of the file")
        print(f"     ready: {describe(pid)}")
        await load(llm, arguments, pid)
    finally:
        await llm.close()
        await asyncio.to_thread(handle.close)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-cache-memory-bytes", type=int)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--input-len", type=int, default=512, help="at most")
    parser.add_argument("--output-len", type=int, default=64, help="at most")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
