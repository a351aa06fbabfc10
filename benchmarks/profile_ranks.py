"""Where a step's time goes on one GPU and on several that share a model: products, sums, and so on.

    python benchmarks/profile_ranks.py --model benchmarks/models/qwen3-8b --ranks 1,2

Random weights. A program per rank runs the worker alone: steps that decode --decode rows of
--context tokens, and ones of --prefill prompt tokens in rows of --row tokens, each first timed
without and then under torch's profiler. Lines tell kernels of the first rank; the table, printed
last, what each kind of kernel adds to a step. Sums hold what ranks wait for each other. Whatever
hangs is ended after --seconds.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nanovllm.config import EngineConfig
from nanovllm.executor.rank_process import DEFAULT_ENVIRONMENT
from nanovllm.protocol.plan import NewRow, StepHandle, StepPlan
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.worker.worker import Worker

NUM_STEPS = 12
NUM_KERNELS = 14  # told of each case
BLOCK_SIZE = 16
# Parts of kernels' names; the first kind that has one in a name is that kernel's.
KINDS = {
    "sums": ("nccl", "_reduce_kernel", "_add_rows_kernel"),
    "attention": (
        "flash", "prefill_kernel", "long_kernel", "decode_kernel", "stream_kernel",
        "combine_kernel", "shared_prefix_kernel", "plan_kernel", "rope",
    ),
    "products": ("nvjet", "gemm", "cutlass", "_vector_kernel", "_matrix_kernel", "_gated_kernel",
                 "splitK"),
    "norms, adds, gates": ("_rows_kernel", "_add_normed", "_act_and_mul", "CUDAFunctor_add"),
    "sampler": ("segments_kernel", "_choose_kernel", "_candidates_kernel", "_join_kernel"),
}  # fmt: skip


class Case(NamedTuple):
    """A kind of step: so many rows of so many tokens each, behind others of each row."""

    num_rows: int
    num_tokens: int
    num_before: int

    def __str__(self) -> str:
        if self.num_tokens == 1:
            return f"decode {self.num_rows}"
        return f"prompt {self.num_rows} x {self.num_tokens}"

    def plans(self, step: int) -> StepPlan:
        """The same step again and again: the first one brings the rows."""
        length = self.num_before + self.num_tokens
        blocks = -(-(length + 1) // BLOCK_SIZE)
        new = []
        for row in range(self.num_rows if step == 0 else 0):
            ids = [(row * 7919 + i * 31) % 500 for i in range(length)]
            first = 1 + row * blocks
            params = SamplingParams(temperature=0.6, max_tokens=1)
            held = list(range(first, first + blocks))
            new.append(NewRow(row, ids, length, held, params, row, []))
        each = list(range(self.num_rows))
        counts = [self.num_before] * self.num_rows, [self.num_tokens] * self.num_rows
        return StepPlan(step, new, [], each, *counts, each)


def run_steps(worker: "Worker", case: Case, first: int, count: int) -> float:
    """Seconds of that many steps, two of them under way at a time."""
    started = time.perf_counter()
    before: StepHandle | None = None
    for step in range(first, first + count):
        handle = worker.submit(case.plans(step))
        worker.sample(step, None)
        if before is not None:
            before.result()
        before = handle
    if before is not None:
        before.result()
    return time.perf_counter() - started


def kind_of(name: str) -> str:
    """Of a kernel."""
    found = (kind for kind, parts in KINDS.items() if any(part in name for part in parts))
    return next(found, "others")


def added(spans: list[tuple[str, float, float]]) -> tuple[dict[str, list[float]], float]:
    """By name: what these (name, start, end) add to the end of all, in µs, and how often they come;
    and for how long nothing runs. What runs beside something else adds only what it is longer."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    reached, idle = min(start for _, start, _ in spans), 0.0
    for name, start, end in sorted(spans, key=lambda span: span[2]):
        idle += max(0.0, start - reached)
        totals[name][0] += max(0.0, end - max(start, reached))
        totals[name][1] += 1
        reached = max(reached, end)
    return totals, idle


def profile_case(worker: "Worker", case: Case) -> dict[str, Any]:
    """Milliseconds of a step unprofiled, and by kind what its kernels add."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    run_steps(worker, case, 0, 4)  # compiles, captures
    best = min(run_steps(worker, case, 1, NUM_STEPS) for _ in range(2)) / NUM_STEPS
    found: dict[str, Any] = {"case": str(case), "ms": round(best * 1e3, 3)}
    if not torch.cuda.is_available():
        return found
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run_steps(worker, case, 1, NUM_STEPS)
        torch.cuda.synchronize()
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in trace.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    if not spans:
        return found
    totals, idle = added(spans)
    kinds: dict[str, float] = dict.fromkeys([*KINDS, "others"], 0.0)
    for name, (took, _) in totals.items():
        kinds[kind_of(name)] += took / NUM_STEPS
    found["us"] = {kind: round(took, 1) for kind, took in kinds.items()}
    found["us"]["idle"] = round(idle / NUM_STEPS, 1)
    found["kernels"] = [
        (name[:64], kind_of(name), round(took / NUM_STEPS, 1), round(count / NUM_STEPS, 1))
        for name, (took, count) in sorted(totals.items(), key=lambda item: -item[1][0])
    ][:NUM_KERNELS]
    return found


def run_rank(arguments: argparse.Namespace, cases: list[Case], meeting: Path) -> None:
    """One rank of all; the first one prints a line per case."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from nanovllm.worker.rank import RankWorker
    from nanovllm.worker.worker import Worker

    rank, size = arguments.rank, int(arguments.ranks)
    most = max(case.num_before + case.num_tokens for case in cases) + BLOCK_SIZE
    config = EngineConfig.from_kwargs(
        model=arguments.model,
        load_format="dummy",
        device=arguments.device,
        tensor_parallel_size=size,
        max_model_len=most,
        max_num_seqs=max(64, *(case.num_rows for case in cases)),
        max_num_batched_tokens=max(256, *(case.num_rows * case.num_tokens for case in cases)),
        **json.loads(arguments.config),
    )

    def meet(port: int | None) -> tuple[str, int]:
        if port is not None:
            meeting.with_suffix(".new").write_text(str(port))
            meeting.with_suffix(".new").rename(meeting)
        while not meeting.exists():
            time.sleep(0.01)
        return "127.0.0.1", int(meeting.read_text())

    worker: Worker
    if size == 1:
        worker = Worker(config, lambda *_: None)
    else:
        worker = RankWorker(
            config, lambda *_: None, rank, size, meet=meet, local_rank=rank, local_size=size
        )
    info = worker.start()
    worker.allocate(min(info.num_blocks, arguments.blocks))
    if rank == 0:
        print(json.dumps({"notes": info.notes}), flush=True)
    if torch.cuda.is_available():
        with profile(
            activities=[ProfilerActivity.CUDA]
        ):  # the first takes seconds, more on some ranks
            torch.cuda.synchronize()
    for case in cases:
        found = profile_case(worker, case)
        if rank == 0:
            print(json.dumps(found), flush=True)
    worker.shutdown()


def profile_size(arguments: argparse.Namespace, size: int, until: float) -> list[dict[str, Any]]:
    """A program per rank; what the first one says."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, __file__, *sys.argv[1:], "--ranks", str(size)]
        programs = [
            subprocess.Popen(
                [*command, "--rank", str(rank), "--meeting", f"{directory}/port"],
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                text=True,
                env={**DEFAULT_ENVIRONMENT, **os.environ},
            )
            for rank in range(size)
        ]
        try:
            output, _ = programs[0].communicate(timeout=max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            programs[0].send_signal(signal.SIGKILL)
            output, _ = programs[0].communicate()
        finally:
            status = programs[0].returncode
            for program in programs:
                program.kill()
                program.wait()
    if status:
        print(f"# {size} ranks: failed, or did not end in time (status {status})", flush=True)
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    for line in lines:
        for note in line.get("notes", ()):
            print(f"# {size}: {note}")
        for kernel in line.get("kernels", ()):
            print(f"{size} ranks, {line['case']}:", *kernel, sep="  ", flush=True)
    return [line for line in lines if "case" in line]


def print_table(found: dict[int, list[dict[str, Any]]]) -> None:
    """A line per case and number of ranks; what one rank's time is of it."""
    kinds = [*KINDS, "others", "idle"]
    print("\n| step | ranks | ms | of one |", " | ".join(f"{kind}, µs" for kind in kinds), "|")
    print("|---|" + "---|" * (3 + len(kinds)))
    alone = {line["case"]: line["ms"] for line in found.get(1, ())}
    for case in dict.fromkeys(line["case"] for lines in found.values() for line in lines):
        for size, lines in found.items():
            for line in (line for line in lines if line["case"] == case):
                ratio = f"{alone[case] / line['ms']:.2f}" if case in alone else ""
                parts = [f"{line['us'][kind]:.0f}" if "us" in line else "" for kind in kinds]
                print("|", case, "|", size, "|", line["ms"], "|", ratio, "|", *parts, "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks, with commas")
    parser.add_argument("--decode", default="1,8,64,256")
    parser.add_argument("--context", type=int, default=500)
    parser.add_argument("--prefill", type=int, default=8192, help="tokens of a step; 0: none")
    parser.add_argument("--row", type=int, default=4096, help="of these tokens in each row")
    parser.add_argument("--blocks", type=int, default=16384, help="of the KV cache, at most")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--config", default="{}", help="further settings, as JSON")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rows = [int(size) for size in arguments.decode.split(",") if size]
    cases = [Case(count, 1, arguments.context) for count in rows]
    if arguments.prefill:
        row = min(arguments.row, arguments.prefill)
        cases.append(Case(arguments.prefill // row, row, 0))
    if arguments.rank is not None:
        run_rank(arguments, cases, Path(arguments.meeting))
        return
    until = time.monotonic() + arguments.seconds
    found = {}
    for size in map(int, arguments.ranks.split(",")):
        started = time.monotonic()
        found[size] = profile_size(arguments, size, until)
        print(f"# {size} ranks: {time.monotonic() - started:.1f} s", flush=True)
    print_table(found)


if __name__ == "__main__":
    main()
