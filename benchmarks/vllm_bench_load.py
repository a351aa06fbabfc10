"""`vllm bench serve`, by several processes that begin together: one Python process of it would
soon be what is measured.

`serving.py` starts this file once. It imports vLLM once, and forks the processes of each run, which
go vLLM's own way from its command line to its report. Only `benchmark` is wrapped, so that all wait
for each other before it.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import http_load
import msgspec

IMPORT_TIMEOUT_S = 120.0
BARRIER_TIMEOUT_S = 60.0


class VllmBench:
    """The process that forks. A context: it is ended on leaving."""

    def __init__(
        self,
        tokenizer: Path,
        lengths: tuple[int, int],
        *,
        temperature: float | None,
        timeout_s: float,
        log: Path,
    ) -> None:
        self._fixed = ["--dataset-name", "random", "--tokenizer", str(tokenizer), "--disable-tqdm"]
        self._fixed += ["--random-input-len", str(lengths[0])]
        self._fixed += ["--random-output-len", str(lengths[1])]
        if temperature is not None:
            self._fixed += ["--temperature", str(temperature)]
        self._timeout_s = timeout_s
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
            text=True,
            start_new_session=True,
        )
        self._log = log
        self._is_ready = False

    def __enter__(self) -> "VllmBench":
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()

    def run(
        self,
        *,
        base_url: str,
        model: str,
        concurrency: int,
        num_prompts: int,
        num_processes: int,
        seed: int,
    ) -> http_load.Timings:
        """`RuntimeError` if vLLM's client fails or takes too long."""
        if not self._is_ready:
            self._read_line(IMPORT_TIMEOUT_S)
            self._is_ready = True
        shares = []
        for index in range(num_processes):
            streams = concurrency * (index + 1) // num_processes
            streams -= concurrency * index // num_processes
            prompts = num_prompts * (index + 1) // num_processes
            prompts -= num_prompts * index // num_processes
            share = ["--base-url", base_url, "--model", model, "--max-concurrency", str(streams)]
            shares.append(
                [*self._fixed, *share, "--num-prompts", str(prompts), "--seed", str(seed + index)]
            )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(shares) + "\n")
        self._process.stdin.flush()
        report = json.loads(self._read_line(BARRIER_TIMEOUT_S + self._timeout_s))
        if "failure" in report:
            raise RuntimeError(f"vllm bench serve: {report['failure']}, see {self._log}")
        parts = [http_load.Timings(**part) for part in report["parts"]]
        return http_load.joined(parts)

    def _read_line(self, timeout_s: float) -> str:
        lines: list[str] = []
        assert self._process.stdout is not None
        reader = threading.Thread(
            target=lambda stdout: lines.append(stdout.readline()),
            args=(self._process.stdout,),
            daemon=True,
        )
        reader.start()
        reader.join(timeout_s)
        if not lines or not lines[0]:
            raise RuntimeError(
                f"vllm bench serve gave no answer ({timeout_s:g} s): see {self._log}"
            )
        return lines[0]


# ---- in the process that forks


def parse(arguments: list[str]) -> argparse.Namespace:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    parsed: argparse.Namespace = parser.parse_args(arguments)
    return parsed


def one_share(arguments: list[str], barrier: Any, path: Path) -> None:
    """In a forked process: what `vllm bench serve` does with these arguments."""
    import vllm.benchmarks.serve as bench

    inner = bench.benchmark

    async def together(*args: Any, **kwargs: Any) -> Any:
        barrier.wait(BARRIER_TIMEOUT_S)
        return await inner(*args, **kwargs)

    bench.benchmark = together
    parsed = parse([*arguments, "--save-detailed"])
    result = asyncio.run(bench.main_async(parsed))
    itls = [interval for one in result["itls"] for interval in one]
    errors = [error for error in result["errors"] if error]
    good = [index for index, error in enumerate(result["errors"]) if not error]
    starts, ttfts = result["start_times"], result["ttfts"]  # on the machine's monotonic clock
    timings = http_load.Timings(
        started=min(starts),
        ended=max(starts[index] + ttfts[index] + sum(result["itls"][index]) for index in good),
        num_tokens=result["total_output_tokens"],
        num_events=len(itls) + len(good),
        ttft_s=[ttfts[index] for index in good],
        itl_s=itls,
        errors=errors,
        cpu_s=time.process_time(),
    )
    path.write_bytes(msgspec.json.encode(timings))


def run_shares(shares: list[list[str]]) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(shares))
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory, str(index)) for index in range(len(shares))]
        processes = [
            context.Process(target=one_share, args=(share, barrier, path), daemon=True)
            for share, path in zip(shares, paths, strict=True)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        missing = sum(not path.is_file() for path in paths)
        if missing:
            return {"failure": f"{missing} of {len(paths)} processes failed"}
        return {"parts": [json.loads(path.read_bytes()) for path in paths]}


def main() -> None:
    # What vLLM prints and logs must not stand between our own lines.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import vllm.benchmarks.serve  # noqa: F401  (for all that are forked)

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run_shares(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
