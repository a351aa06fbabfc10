"""One client process of `nanovllm bench clients`: `python -m nanovllm.bench.client`.

Reads its `ClientTask` from stdin, says "ready" when it is connected, reads when to start (on the
monotonic clock, which all processes of a machine share), and writes a `ClientReport`.
"""

import asyncio
import os
import random
import resource
import sys
import time
from array import array
from collections.abc import Awaitable

import msgspec
import numpy as np
import uvloop

from nanovllm.bench.load import Arrival, ClientTask, draw, prompt_of
from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.errors import EngineDeadError, RequestFailedError
from nanovllm.sampling_params import SamplingParams

BUCKETS_PER_E = 50  # buckets of the histogram of gaps are 2 % wide
SHORTEST_S = 1e-6
NICENESS = 10  # a load must not take the CPU away from what it measures


class RequestReport(msgspec.Struct, array_like=True):
    """One request. Times are seconds from when it was due, so a late start counts."""

    at: float
    input_len: int
    num_tokens: int = 0
    ttft_s: float | None = None
    e2e_s: float | None = None
    num_cached: int = 0
    num_resumes: int = 0
    error: str | None = None


class ClientReport(msgspec.Struct):
    """All of one client. gaps: times between outputs, counted in logarithmic buckets."""

    client: int
    requests: list[RequestReport]
    gaps: list[int]
    num_tokens_in_time: int  # that came before `duration` was over
    cpu_s: float  # after the start


class Client:
    """Runs the share of the load that `task` is, from `start_at` on."""

    def __init__(self, llm: AsyncLLM, task: ClientTask, start_at: float) -> None:
        self._llm = llm
        self._task = task
        self._start_at = start_at
        self._end_at = start_at + task.load.duration
        self._reports: list[RequestReport] = []
        self._gaps = array("d")
        self._num_tokens_in_time = 0

    async def run(self) -> ClientReport:
        task, before_s = self._task, cpu_seconds()
        work: list[Awaitable[None]]
        if task.load.streams is None:
            work = [self._request(arrival) for arrival in task.arrivals]
        else:
            work = [self._stream(index) for index in range(task.load.streams)]
        await asyncio.gather(*work)
        cpu_s = cpu_seconds() - before_s
        return ClientReport(
            task.client, self._reports, count_gaps(self._gaps), self._num_tokens_in_time, cpu_s
        )

    async def _stream(self, index: int) -> None:
        """Closed loop: one request after the other."""
        load = self._task.load
        rng = random.Random(f"{load.load_seed} {self._task.client} {index}")
        await asyncio.sleep(self._start_at - time.monotonic())
        while (now := time.monotonic()) < self._end_at:
            await self._request(draw(load, rng, at=now - self._start_at))

    async def _request(self, arrival: Arrival) -> None:
        due = self._start_at + arrival.at
        await asyncio.sleep(due - time.monotonic())
        report = RequestReport(arrival.at, arrival.input_len)
        self._reports.append(report)
        params = SamplingParams(
            temperature=0,
            max_tokens=arrival.output_len,
            ignore_eos=True,
            detokenize=False,
            output_kind="delta",
        )
        try:
            prompt = prompt_of(arrival, self._llm.vocab_size)
            await self._read(report, prompt, params, due)
        except (EngineDeadError, RequestFailedError, ValueError) as error:
            report.error = f"{type(error).__name__}: {error}"

    async def _read(
        self, report: RequestReport, prompt: list[int], params: SamplingParams, due: float
    ) -> None:
        last = 0.0
        async for output in self._llm.generate({"prompt_token_ids": prompt}, params):
            now = time.monotonic()
            num_new = len(output.outputs[0].token_ids)
            if last:
                self._gaps.append(now - last)
            else:
                report.ttft_s = now - due
            last = now
            report.num_tokens += num_new
            if now < self._end_at:
                self._num_tokens_in_time += num_new
        report.e2e_s = last - due
        report.num_cached = output.num_cached_tokens or 0
        report.num_resumes = output.metrics.num_resumes
        reason = output.outputs[0].finish_reason
        if reason != "length":
            report.error = f"ended with {reason!r} after {report.num_tokens} tokens"


def cpu_seconds() -> float:
    """What this process has used so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def count_gaps(gaps: "array[float]") -> list[int]:
    """How many lie in each bucket; see `gap_of_bucket`."""
    if not gaps:
        return []
    seconds = np.maximum(np.frombuffer(gaps), SHORTEST_S)
    buckets = (np.log(seconds / SHORTEST_S) * BUCKETS_PER_E).astype(np.int64)
    counts: list[int] = np.bincount(buckets).tolist()
    return counts


def gap_of_bucket(bucket: int) -> float:
    """Its middle, in seconds."""
    return float(SHORTEST_S * np.exp((bucket + 0.5) / BUCKETS_PER_E))


async def main() -> None:
    os.nice(NICENESS)
    task = msgspec.json.decode(await asyncio.to_thread(sys.stdin.readline), type=ClientTask)
    llm = await AsyncLLM.connect(task.address, skip_tokenizer_init=True)
    try:
        print("ready", flush=True)
        start_at = float(await asyncio.to_thread(sys.stdin.readline))
        report = await Client(llm, task, start_at).run()
    finally:
        await llm.close()
    print(msgspec.json.encode(report).decode(), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
