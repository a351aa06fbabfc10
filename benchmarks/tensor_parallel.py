"""Ranks of one host beside a single one: are ids right, what is gained, what does a death cost?

    python benchmarks/tensor_parallel.py                       # on a host with two GPUs or more
    python benchmarks/tensor_parallel.py --device cpu          # in small over gloo: checks itself
    python benchmarks/tensor_parallel.py --parts ids,speed --models 8b --ranks 2 --seconds 90
    python benchmarks/tensor_parallel.py --parts ids,speed --ranks 1x2,2x2     # stages of pipelines

Ranks are so many of one stage, or those of one stage times stages.

`ids`: greedy and seeded ids of random models (one dense, one of experts, which are cut and then
spread; the checkpoint of --real, too, where it is named) on several ranks beside those of one.
Where they differ, how far the token taken lies behind the best that one rank would have taken after
the same tokens, in nats (two tokens of bf16 may tie). `speed`: Qwen3-0.6B and -8B by their shapes,
with random weights: decoding 1, 8 and 64 sequences, and a prompt; ratios are to one rank. `faults`:
a rank is killed amid 64 streams: how many end with the ids of an undisturbed run, how long they
paused, and when the core was where in its way back. `reduce`: all-reduce by NCCL in a CUDA graph,
torch's one-shot over symmetric memory and the engine's own, also with what follows a sum; over gloo
on a CPU. `steps`: 10,000 steps of one sequence, none of which may hang. `starts`: an engine is
started and closed 20 times, its graphs with it (two minutes on two GPUs). `plan`: a plan's way to
2, 4 and 8 ranks that compute nothing, and its result's way back.
Each engine has processes of its own. No part begins after --seconds; what was left out is told. A
part that hangs is ended after --part-seconds, and what it has found by then was told as it came.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from nanovllm import LLM, AsyncLLM, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.executor.group import GroupExecutor
from nanovllm.executor.rank_process import DEFAULT_ENVIRONMENT
from nanovllm.frontend.core_life import CoreLife
from nanovllm.frontend.core_process import CoreHandle
from nanovllm.protocol.messages import FromCore
from nanovllm.protocol.plan import StepPlan

MODELS = Path(__file__).resolve().parent / "models"
DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {
    **DENSE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
SMALLER = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
PARTS = ("ids", "speed", "faults", "reduce", "steps", "starts", "plan")
NUM_PLANS = 2000
NUM_STARTS, NUM_STEPS = 20, 10_000
REDUCING_S = 60  # of all ranks alone
CLOSING_S = 10  # of what did not end in time
REDUCED_KIB = (4, 8, 64, 512, 8192)
ROWS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # of 4,096 columns each


def prompts(count: int, length: int, *, turn: int, vocab_size: int) -> list[list[int]]:
    """Different ids in each, so that no prefix is found again."""
    return [
        [3 + (7 * i + 131 * j + 17 * turn * (j + 1)) % (vocab_size - 3) for j in range(length)]
        for i in range(count)
    ]


class Ranks(NamedTuple):
    """That share a model: so many in each of the stages."""

    each: int
    stages: int = 1

    @classmethod
    def of(cls, text: str) -> "Ranks":
        """text: "2" or "2x2"."""
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return str(self.each) if self.stages == 1 else f"{self.each}x{self.stages}"


ALONE = Ranks(1)


class Bench:
    """One call: what it was asked for, until when, and what it has found."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self.arguments = arguments
        self.is_cpu = arguments.device == "cpu"
        self._until = time.monotonic() + arguments.seconds
        self._directory = directory
        self.found: list[dict[str, Any]] = []
        self.failed = False

    def say(self, part: str, **values: Any) -> None:
        """One line, for readers and for programs."""
        self.found.append({"part": part, **values})
        print(json.dumps(self.found[-1]), flush=True)

    def attempt(self, name: str, part: Callable[[], None]) -> None:
        """Run a part if there is time; one that fails leaves the others alone."""
        if time.monotonic() > self._until:
            self.say("left out", what=name)
            return
        started = time.monotonic()
        signal.signal(signal.SIGALRM, _end_part)
        signal.alarm(self.arguments.part_seconds)
        try:
            part()
        except Exception as error:
            self.failed = True
            traceback.print_exc()
            self.say("failed", what=name, error=f"{type(error).__name__}: {error}")
        finally:
            signal.alarm(0)
        print(f"# {name}: {time.monotonic() - started:.1f} s", flush=True)

    def random_model(self, kind: str) -> str:
        """A directory with the config of a small model, which gets random weights."""
        config = {"dense": DENSE, "experts": EXPERTS}[kind]
        if self.is_cpu:
            config = {**config, **SMALLER, "num_hidden_layers": 2}
            config = {**config, "moe_intermediate_size": 64} if kind == "experts" else config
        path = self._directory / kind
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(config))
        return str(path)

    def settings(self, size: Ranks, **more: Any) -> dict[str, Any]:
        """Of an engine of so many ranks."""
        common: dict[str, Any] = {
            "device": self.arguments.device,
            "tensor_parallel_size": size.each,
            "pipeline_parallel_size": size.stages,
            "max_model_len": 256 if self.is_cpu else 4096,
            "max_num_seqs": 8 if self.is_cpu else 64,
            "kv_cache_memory_bytes": 4 * 2**30,
            "compare_ranks": True,
        }
        if self.is_cpu:
            common |= {"dtype": "float32", "kv_cache_memory_bytes": 2**24}
        return common | more

    @contextmanager
    def engine(self, model: str, size: Ranks, **more: Any) -> Iterator[LLM]:
        """Started, and closed; says how long the start took."""
        started = time.monotonic()
        with LLM(model, **self.settings(size, **more)) as llm:
            self.say("start", model=Path(model).name, ranks=str(size), s=_rounded(started))
            yield llm


def _end_part(number: int, frame: object) -> None:
    """What is closed now may hang, too: a second time nothing is waited for."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(CLOSING_S)
    raise TimeoutError("did not end in time")


def _rounded(since: float) -> float:
    return round(time.monotonic() - since, 2)


# ---- ids


def check_ids(
    bench: Bench, model: str, sizes: list[Ranks], *, real: bool = False, spreads: bool = False
) -> None:
    """Of one rank, then of several. spreads: these hold whole experts."""
    more: dict[str, Any] = {"skip_tokenizer_init": True}
    if not real:
        more["load_format"] = "dummy"
    vocab_size = 512 if bench.is_cpu or real else 4096
    # Of so many tokens that their sums go every way there is.
    count, length, num_new = (4, 40, 16) if bench.is_cpu else (16, 140, 48)
    asked = prompts(count, length, turn=1, vocab_size=vocab_size)
    kinds = {
        "greedy": SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True),
        "seeded": SamplingParams(temperature=1, seed=5, max_tokens=num_new, ignore_eos=True),
    }
    expected: dict[str, list[list[int]]] = {}
    answers: dict[tuple[Ranks, str], list[list[int]]] = {}
    for size in sizes:
        with bench.engine(model, size, enable_expert_parallel=spreads, **more) as llm:
            for kind, params in kinds.items():
                answers[size, kind] = _ids(llm, asked, params)
    with bench.engine(model, ALONE, **more) as llm:
        for kind, params in kinds.items():
            expected[kind] = _ids(llm, asked, params)
        for (size, kind), ids in answers.items():
            equal = sum(a == b for a, b in zip(expected[kind], ids, strict=True))
            gap = _largest_gap(llm, asked, ids) if kind == "greedy" else None
            bench.say(
                "ids",
                model=Path(model).name,
                ranks=str(size),
                whole_experts=spreads,
                kind=kind,
                equal=f"{equal}/{count}",
                largest_gap_nats=gap,
            )
            if bench.is_cpu and equal < count:
                raise AssertionError(f"{kind} ids of {size} ranks differ in float32")


def _ids(llm: LLM, asked: list[list[int]], params: SamplingParams) -> list[list[int]]:
    outputs = llm.generate(asked, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _largest_gap(llm: LLM, asked: list[list[int]], ids: list[list[int]]) -> float:
    """Of tokens to the best one after the same tokens, as `llm` has it."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    together = [prompt + more for prompt, more in zip(asked, ids, strict=True)]
    worst = 0.0
    for prompt, output in zip(
        together, llm.generate(together, params, use_tqdm=False), strict=True
    ):
        assert output.prompt_logprobs is not None
        for token_id, found in list(zip(prompt, output.prompt_logprobs, strict=True))[
            len(asked[0]) :
        ]:
            assert found is not None
            best = max(one.logprob for one in found.values())
            worst = max(worst, best - found[token_id].logprob)
    return round(worst, 4)


# ---- speed


def measure(bench: Bench, model: str, sizes: list[Ranks]) -> None:
    """Tokens per second of new tokens, or of a prompt's, on one rank and on several."""
    alone: dict[str, float] = {}
    ways = [(ALONE, False), *((size, False) for size in sizes)]
    if not bench.is_cpu:  # ranks of several stages know no other way
        ways += [(size, True) for size in sizes if size.stages == 1]
    for size, by_nccl in ways:
        more = {"load_format": "dummy", "skip_tokenizer_init": True, "compare_ranks": False}
        more["disable_custom_all_reduce"] = by_nccl
        with bench.engine(model, size, enable_prefix_caching=False, **more) as llm:
            for case in ("1", "8", "64", "prefill"):
                if bench.is_cpu and case == "64":
                    continue
                speed = _speed(bench, llm, case)
                alone.setdefault(case, speed)
                bench.say(
                    "speed",
                    model=Path(model).name,
                    ranks=str(size),
                    sums="nccl" if by_nccl else "chosen",
                    case=case,
                    tokens_per_s=round(speed, 1),
                    ratio=round(speed / alone[case], 3),
                )


def _speed(bench: Bench, llm: LLM, case: str) -> float:
    """The best of some runs; the first ones compile and capture."""
    repeats = 1 if bench.is_cpu else 3
    length, num_new = (16, 8) if bench.is_cpu else (128, 64)

    def seconds(count: int, size: int, new: int, turn: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        asked = prompts(count, size, turn=turn, vocab_size=500)
        started = time.perf_counter()
        llm.generate(asked, params, use_tqdm=False)
        return time.perf_counter() - started

    if case == "prefill":
        length = 64 if bench.is_cpu else 2048
        for turn in range(2):
            seconds(1, length, 1, turn)
        return length / min(seconds(1, length, 1, 2 + turn) for turn in range(repeats))
    count = int(case)
    seconds(count, length, 8, 0)
    seconds(count, length, 8, 1)
    first = statistics.median(seconds(count, length, 1, 2 + turn) for turn in range(repeats))
    whole = min(seconds(count, length, 1 + num_new, 9 + turn) for turn in range(repeats))
    return count * num_new / max(whole - first, 1e-9)


# ---- faults


async def kill_a_rank(bench: Bench, model: str, size: Ranks) -> None:
    """Streams without and with the death of the last rank."""
    count, num_new = (6, 60) if bench.is_cpu else (64, 400)
    asked = prompts(count, 40, turn=3, vocab_size=500)
    settings = bench.settings(size, load_format="dummy", skip_tokenizer_init=True)
    for what in ("first start", "start"):  # the first may compile
        async with timed(AsyncLLM(model, **settings)) as (llm, start_s, way):
            began = time.monotonic()
            arrivals = Arrivals(count)
            await stream_all(llm, asked, num_new, arrivals)
            bench.say(what, ranks=str(size), way=since(way[0][0], way))
            bench.say(f"streams after the {what}", arrived=arrivals.told(began))
            if what == "first start":
                continue
            undisturbed, _ = await stream_all(llm, asked, num_new)
            again, _ = await stream_all(llm, asked, num_new)
            ranks = ranks_of(llm._handles[0].process.pid)
            arrivals = Arrivals(count)
            streams = asyncio.create_task(stream_all(llm, asked, num_new, arrivals))
            await asyncio.sleep(0.3)
            killed_at = time.monotonic()
            way.clear()
            arrivals.forget()
            os.kill(ranks[-1], signal.SIGKILL)
            while any(Path(f"/proc/{rank}").exists() for rank in ranks):
                await asyncio.sleep(0.005)
            ended_s = time.monotonic() - killed_at
            resumed, pause_s = await streams
            left = [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
            bench.say("restart", ranks=str(size), way=since(killed_at, way))
            bench.say("streams after the restart", arrived=arrivals.told(killed_at))
    bench.say(
        "faults",
        ranks=str(size),
        streams=count,
        ids_equal=sum(a == b for a, b in zip(undisturbed, resumed, strict=True)),
        ids_equal_undisturbed=sum(a == b for a, b in zip(undisturbed, again, strict=True)),
        complete=sum(len(ids) == num_new for ids in resumed),
        start_s=round(start_s, 2),
        group_ended_s=round(ended_s, 3),
        longest_pause_s=round(pause_s, 2),
        left=left,
    )
    if bench.is_cpu and undisturbed != resumed:
        raise AssertionError("streams that were resumed got other ids")


Way = list[tuple[float, str]]


@asynccontextmanager
async def timed(llm: AsyncLLM) -> AsyncIterator[tuple[AsyncLLM, float, Way]]:
    """The engine, started; how long that took; and when its core was begun with, ended and heard
    of, on the monotonic clock, from now on."""
    way: Way = []

    def note(what: str) -> None:
        if not way or way[-1][1] != what:
            way.append((time.monotonic(), what))

    hear, end, restart = CoreLife.on_message, CoreHandle.end, CoreHandle.restart

    def on_message(life: CoreLife, message: FromCore) -> None:
        name = type(message).__name__
        if name in ("Loading", "Welcome", "CoreFailed"):
            note(getattr(message, "phase", name))
        hear(life, message)

    def noting_end(handle: CoreHandle, timeout_s: float = 10.0) -> int:
        note("ending the core")
        return end(handle, timeout_s)

    def noting_restart(handle: CoreHandle) -> None:
        note("starting a core")
        restart(handle)

    changed = [
        patch.object(CoreLife, "on_message", on_message),
        patch.object(CoreHandle, "end", noting_end),
        patch.object(CoreHandle, "restart", noting_restart),
    ]
    with ExitStack() as stack:
        for one in changed:
            stack.enter_context(one)
        note("begun")
        async with llm:
            yield llm, time.monotonic() - way[0][0], way


def since(start: float, way: Way) -> dict[str, float]:
    """Seconds from then to each; of what occurs again, the first."""
    first: dict[str, float] = {}
    for at, what in way:
        first.setdefault(what, round(at - start, 2))
    return first


class Arrivals:
    """When each stream first got tokens, and when any did."""

    def __init__(self, num_streams: int) -> None:
        self._num_streams = num_streams
        self.forget()

    def forget(self) -> None:
        """Begin again."""
        self._first: dict[int, float] = {}
        self._all: list[float] = []

    def note(self, stream: int) -> None:
        """It has got some."""
        now = time.monotonic()
        self._first.setdefault(stream, now)
        if not self._all or now - self._all[-1] > 1e-3:
            self._all.append(now)

    @property
    def num_begun(self) -> int:
        """How many streams have got any."""
        return len(self._first)

    def told(self, since: float) -> dict[str, Any]:
        """The first and last stream's first ones, in seconds, and the longest gaps between any:
        when they ended, and how long they were."""
        first = sorted(at - since for at in self._first.values())
        gaps = sorted(((b - a, b - since) for a, b in pairwise(self._all)), reverse=True)[:12]
        return {
            "first_s": round(first[0], 3),
            "last_s": round(first[-1], 3),
            "gaps_until_s": {round(at, 3): round(gap, 3) for gap, at in sorted(gaps, key=at_end)},
        }


def at_end(gap: tuple[float, float]) -> float:
    """When it ended."""
    return gap[1]


async def stream_all(
    llm: AsyncLLM, asked: list[list[int]], num_new: int, arrivals: Arrivals | None = None
) -> tuple[list[list[int]], float]:
    """Ids of each stream, every second one drawn by a seed, and the longest wait of any."""

    async def one(index: int) -> tuple[list[int], float]:
        params = SamplingParams(
            temperature=index % 2,
            seed=index,
            max_tokens=num_new,
            ignore_eos=True,
            output_kind="delta",
        )
        ids: list[int] = []
        pause_s, last = 0.0, time.monotonic()
        async for output in llm.generate(asked[index], params):
            now = time.monotonic()
            pause_s, last = max(pause_s, now - last), now
            ids += output.outputs[0].token_ids
            if arrivals is not None:
                arrivals.note(index)
        return ids, pause_s

    results = await asyncio.gather(*(one(index) for index in range(len(asked))))
    return [ids for ids, _ in results], max(pause for _, pause in results)


def ranks_of(core: int) -> list[int]:
    """Pids of a core's ranks, the first one first."""
    children = Path(f"/proc/{core}/task/{core}/children").read_text().split()
    return sorted(
        int(pid)
        for pid in children
        if b"nanovllm.executor.rank" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )


# ---- all-reduce alone


def measure_reduce(bench: Bench, size: int) -> None:
    """By a program per rank (`--reduce-rank`)."""
    command = [sys.executable, __file__, "--device", bench.arguments.device, "--ranks", str(size)]
    with tempfile.TemporaryDirectory() as directory:
        store = f"{directory}/store"
        programs = [
            subprocess.Popen(
                [*command, "--reduce-rank", str(rank), "--store", store],
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                text=True,
                env={**DEFAULT_ENVIRONMENT, **os.environ},
            )
            for rank in range(size)
        ]
        until = time.monotonic() + REDUCING_S
        try:  # one that fails leaves the others waiting
            while programs[0].poll() is None and time.monotonic() < until:
                if any(program.poll() for program in programs):
                    break
                time.sleep(0.05)
        finally:
            for program in programs:
                program.kill()
                program.wait()
        output, _ = programs[0].communicate()
    for line in output.splitlines():
        if line.startswith("{"):
            bench.say("reduce", ranks=size, **json.loads(line))
    if programs[0].returncode:
        raise AssertionError("a rank has failed, or waited for one that has")


def reduce_rank(rank: int, size: int, device: str, store: str) -> None:
    """One rank of `measure_reduce`; the first prints a line per size."""
    import torch
    from torch import distributed

    on_gpu = device != "cpu" and torch.cuda.is_available()
    place = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=distributed.FileStore(store, size),
        rank=rank,
        world_size=size,
        device_id=place if on_gpu else None,
    )
    direct = _open_exchange(rank, size, place) if on_gpu else None
    if on_gpu:
        _check_exchange(direct, rank, size, place)
    for kib in REDUCED_KIB:
        values = torch.ones(kib * 512, dtype=torch.bfloat16, device=place)
        kinds = {"nccl" if on_gpu else "gloo": partial(distributed.all_reduce, values)}
        if on_gpu and kib <= 512:
            kinds["one_shot"] = _one_shot(values)
            kinds |= _direct(direct, values)
        took = {kind: _time_reduce(run, on_gpu=on_gpu) for kind, run in kinds.items()}
        if rank == 0:
            print(json.dumps({"kib": kib, "us": took}), flush=True)
    if on_gpu:
        by_rows = _open_rows(rank, size, place)
        _check_rows(by_rows, rank, size, place)
        for num_rows in ROWS:
            ways = _ways_of_rows(by_rows, rank, size, num_rows)
            took = {kind: _time_reduce(run, on_gpu=True) for kind, run in ways.items()}
            if rank == 0:
                print(json.dumps({"rows": num_rows, "us": took}), flush=True)
    distributed.barrier()


def _open_rows(rank: int, size: int, device: Any) -> Any:
    import torch

    from nanovllm.worker.kernels.triton.row_exchange import RowExchange

    like = torch.empty(4096, dtype=torch.bfloat16, device=device)
    return RowExchange.open(rank, size, like, max_tokens=max(ROWS), fewest=1)


def _check_rows(by_rows: Any, rank: int, size: int, device: Any) -> None:
    """Layers of random rows many times over, of sizes in turns, against those of one place."""
    import torch

    from nanovllm.worker.kernels.triton.rows import rms_norm
    from nanovllm.worker.layers.norm import RMSNorm

    random = torch.Generator().manual_seed(7)
    for turn in range(60):
        num_rows = (257, 2500, 64, 1024, 131, 4001, 2, 2048)[turn % 8]
        parts = torch.randn(size + 1, num_rows, 4096, generator=random).to(device, torch.bfloat16)
        norm = RMSNorm(parts[size, 0].contiguous() + 1, 1e-6)
        expected = (parts[:size].float().sum(0).bfloat16() + parts[size]).contiguous()
        own = by_rows.share(rank, num_rows)
        residual = parts[size, own].clone()
        for tokens, out in by_rows.places(num_rows):
            out.copy_(parts[rank, tokens])
        normed = by_rows.add_normed(residual, norm, num_rows)
        assert torch.equal(residual, expected[own]), turn
        torch.testing.assert_close(normed, rms_norm(expected, norm))


def _ways_of_rows(
    by_rows: Any, rank: int, size: int, num_rows: int
) -> dict[str, Callable[[], Any]]:
    """A product of as many inputs as Qwen3-8B's MLP has, then sum, residual and norm; and alone."""
    import torch
    from torch import distributed

    from nanovllm.worker.kernels.triton.rows import rms_norm
    from nanovllm.worker.layers.norm import RMSNorm

    device = by_rows.like.device
    inputs = torch.randn(num_rows, 12288 // size, device=device, dtype=torch.bfloat16)
    weight = torch.randn(4096, 12288 // size, device=device, dtype=torch.bfloat16).t()
    residual = torch.zeros(num_rows, 4096, device=device, dtype=torch.bfloat16)
    own = residual[by_rows.share(rank, num_rows)].clone()
    norm = RMSNorm(torch.ones_like(residual[0]), 1e-6)
    product = torch.zeros_like(residual)

    def reduce() -> None:
        distributed.all_reduce(product)
        rms_norm(residual.add_(product), norm)

    def multiply(rows: Any) -> None:
        for tokens, out in rows.places(num_rows):
            torch.mm(inputs[tokens], weight, out=out)

    def add(rows: Any) -> None:
        rows.add_normed(own, norm, num_rows)

    def multiply_whole() -> None:
        torch.mm(inputs, weight, out=product)

    def in_turn(*ways: Callable[[], None]) -> None:
        for way in ways:
            way()

    found = {
        "product": multiply_whole,
        "product, nccl, add, norm": partial(in_turn, multiply_whole, reduce),
        "nccl, add, norm": reduce,
    }
    for name, split_from in {"read": num_rows, "sent": 1}.items():
        rows = replace(by_rows, split_from=split_from)
        found |= {
            f"product, {name}": partial(in_turn, partial(multiply, rows), partial(add, rows)),
            name: partial(add, rows),
            f"{name}, 256 programs": partial(add, replace(rows, num_programs=256)),
        }
    return found


def _open_exchange(rank: int, size: int, device: Any) -> Any:
    from nanovllm.worker.kernels.triton.exchange import Exchange

    return Exchange.open(rank, size, device)


def _check_exchange(direct: Any, rank: int, size: int, device: Any) -> None:
    """Sums of random rows many times over, of sizes in turns, against those made at one place."""
    import torch

    from nanovllm.worker.kernels.triton.rows import rms_norm
    from nanovllm.worker.layers.norm import RMSNorm

    random = torch.Generator().manual_seed(7)
    for turn in range(200):
        shape = (1 + 7 * turn % 64, (512, 4096, 1000)[turn % 3])
        parts = torch.randn(size + 2, *shape, generator=random).to(device, torch.bfloat16)
        expected = parts[:size].float().sum(0).bfloat16()
        if turn % 2:
            found = direct.reduce(parts[rank])
        else:
            expected += parts[size]
            weight = parts[size + 1, 0].contiguous()
            again = parts[size].clone()
            found, (weighed, squares) = direct.reduce_add(parts[rank], parts[size], weight)
            assert torch.equal(weighed, found * weight), turn
            torch.testing.assert_close(squares.sum(1), found.float().square().sum(1))
            norm = RMSNorm(weight, 1e-6)
            normed = direct.reduce_normed(parts[rank], again, norm)
            assert torch.equal(again, expected), turn
            torch.testing.assert_close(normed, rms_norm(expected, norm))
        assert torch.equal(found, expected), turn


def _direct(direct: Any, values: Any) -> dict[str, Callable[[], Any]]:
    """By `kernels.triton.exchange`: the sum alone, and with residual and norm, for which NCCL needs
    two more kernels."""
    import torch
    from torch import distributed

    from nanovllm.worker.kernels.triton import exchange
    from nanovllm.worker.kernels.triton.rows import rms_norm
    from nanovllm.worker.layers.norm import RMSNorm

    rows = values.view(-1, min(4096, len(values)))
    residual, weight = torch.zeros_like(rows), torch.ones_like(rows[0])

    def by_nccl() -> None:
        distributed.all_reduce(rows)
        rms_norm(residual.add_(rows), RMSNorm(weight, 1e-6))

    def by_blocks(block: int) -> None:
        exchange.MIN_BLOCK = block
        direct.reduce_add(rows, residual, weight)
        exchange.MIN_BLOCK = usual

    usual, norm = exchange.MIN_BLOCK, RMSNorm(weight, 1e-6)
    found: dict[str, Callable[[], Any]] = {
        "direct": lambda: direct.reduce(values),
        "nccl, add, norm": by_nccl,
        "direct, add, norm": lambda: direct.reduce_add(rows, residual, weight),
        "direct, add, normed": lambda: direct.reduce_normed(rows, residual, norm),
    }
    for block in (512, 1024, 2048) if values.nbytes <= exchange.WORDED_BYTES else ():
        found[f"in blocks of {block}"] = partial(by_blocks, block)
    return found


def _one_shot(like: Any) -> Callable[[], Any]:
    """Every rank reads what all others have, and adds it up by itself."""
    import torch
    import torch.distributed._symmetric_memory as symmetric

    group = torch.distributed.group.WORLD
    shared = symmetric.empty(len(like), dtype=like.dtype, device=like.device)
    symmetric.rendezvous(shared, group)
    return partial(torch.ops.symm_mem.one_shot_all_reduce, shared, "sum", group.group_name)


def _time_reduce(run: Callable[[], Any], *, on_gpu: bool) -> float:
    """Microseconds of one; on GPUs as ranks measure it when they start, within a graph."""
    from nanovllm.worker.rank import seconds_of  # which loads torch

    if on_gpu:
        return round(seconds_of(run) * 1e6, 1)
    num = 20
    for _ in range(3):
        run()
    started = time.perf_counter()
    for _ in range(num):
        run()
    return round((time.perf_counter() - started) / num * 1e6, 1)


# ---- long lives and short ones


def run_long(bench: Bench, model: str, size: Ranks) -> None:
    """Whether all of many steps end; tells how many there were every second or so."""
    num_steps, length = 200 if bench.is_cpu else NUM_STEPS, 32
    settings = bench.settings(
        size, load_format="dummy", skip_tokenizer_init=True, max_model_len=num_steps + length
    )
    params = SamplingParams(
        temperature=0, max_tokens=num_steps, ignore_eos=True, output_kind="delta"
    )

    async def run() -> None:
        async with AsyncLLM(model, **settings) as llm:
            steps, told, started = 0, 0.0, time.monotonic()
            asked = prompts(1, length, turn=5, vocab_size=500)[0]
            async for output in llm.generate(asked, params):
                steps += len(output.outputs[0].token_ids)
                if output.finished or time.monotonic() > told + 2:
                    told = time.monotonic()
                    bench.say("steps", ranks=str(size), steps=steps, s=_rounded(started))
        if steps < num_steps:
            raise AssertionError(f"{steps} of {num_steps} steps")

    asyncio.run(run())


def start_often(bench: Bench, model: str, size: Ranks) -> None:
    """Whether graphs are captured and destroyed cleanly."""
    num_starts = 2 if bench.is_cpu else NUM_STARTS
    settings = bench.settings(size, load_format="dummy", skip_tokenizer_init=True)
    asked = prompts(4, 32, turn=5, vocab_size=500)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    found: list[list[list[int]]] = []
    times: list[float] = []
    for number in range(num_starts):
        started = time.monotonic()
        with LLM(model, **settings) as llm:
            found.append(_ids(llm, asked, params))
        times.append(time.monotonic() - started)
        equal = sum(ids == found[0] for ids in found)
        bench.say(
            "starts",
            ranks=str(size),
            starts=number + 1,
            equal=equal,
            slowest_s=round(max(times), 2),
        )


# ---- a plan's way


def measure_plan(bench: Bench, size: int) -> None:
    """Of a step in which 64 sequences decode."""
    config = EngineConfig.from_kwargs(
        model="synthetic", load_format="synthetic", step_ms=0.0, tensor_parallel_size=size
    )
    group = GroupExecutor(config, lambda *_: None)
    try:
        group.allocate(group.start().num_blocks)
        times = []
        for step in range(NUM_PLANS):
            lengths = [100 + step] * 64
            plan = StepPlan(step, [], [], list(range(64)), lengths, [1] * 64, list(range(64)))
            started = time.perf_counter()
            handle = group.submit(plan)
            group.sample(step, None)
            handle.result()
            times.append(time.perf_counter() - started)
    finally:
        group.shutdown()
    p50, p99 = (round(sorted(times)[int(NUM_PLANS * share)] * 1e6) for share in (0.5, 0.99))
    bench.say("plan", ranks=size, p50_us=p50, p99_us=p99)


def run_parts(bench: Bench, wanted: list[str], sizes: list[Ranks]) -> None:
    """Those that are wanted, in their order."""
    arguments = bench.arguments
    if "ids" in wanted:
        for kind in ("dense", "experts"):
            model = bench.random_model(kind)
            bench.attempt(f"ids, {kind}", partial(check_ids, bench, model, sizes))
        cut = [size for size in sizes if size.each > 1]
        whole = partial(check_ids, bench, bench.random_model("experts"), cut, spreads=True)
        if cut:
            bench.attempt("ids, whole experts", whole)
        if arguments.real:
            run = partial(check_ids, bench, arguments.real, sizes, real=True)
            bench.attempt("ids, real", run)
    if "speed" in wanted:
        paths = [str(MODELS / f"qwen3-{name}") for name in arguments.models.split(",")]
        for path in [bench.random_model("dense")] if bench.is_cpu else paths:
            bench.attempt(f"speed, {Path(path).name}", partial(measure, bench, path, sizes))
    small = bench.random_model("dense")
    others: dict[str, Callable[[], None]] = {
        "faults": lambda: asyncio.run(kill_a_rank(bench, small, sizes[0])),
        "reduce": partial(measure_reduce, bench, sizes[0].each),
        "steps": partial(run_long, bench, small, sizes[0]),
        "starts": partial(start_often, bench, small, sizes[0]),
    }
    for name, part in others.items():
        if name in wanted:
            bench.attempt(name, part)
    for size in (2, 4, 8) if "plan" in wanted else ():
        bench.attempt(f"plan, {size}", partial(measure_plan, bench, size))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", default="2", help="sizes beside 1, with commas: 2,1x2")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    parser.add_argument("--models", default="8b,0.6b", help="of the speed part")
    parser.add_argument("--real", help="a checkpoint whose ids are compared, too")
    parser.add_argument("--seconds", type=float, default=150.0, help="when no part begins any more")
    parser.add_argument("--part-seconds", type=int, default=180, help="when a part is ended")
    parser.add_argument("--reduce-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = [Ranks.of(size) for size in arguments.ranks.split(",")]
    if arguments.reduce_rank is not None:
        reduce_rank(arguments.reduce_rank, sizes[0].each, arguments.device, arguments.store)
        return
    wanted = arguments.parts.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--parts: {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(arguments, Path(directory))
        run_parts(bench, wanted, sizes)
    sys.exit(bench.failed)


if __name__ == "__main__":
    main()
