"""Where a step's time goes: the host's by its parts, a GPU's by events; by kind and number of rows.

    python benchmarks/step_split.py --model smollm2 --workload ask_nobody,ask_all_schema
    python benchmarks/step_split.py --model smollm2 --workload "" --mixed alone,all
    python benchmarks/step_split.py --model smollm2 --hollow --calls

One process: core, worker, grammars, and outputs sorted and encoded as the server does; no sockets.
--workload takes names of `workloads.py` beginning with `ask_`; the last round is told of. --mixed
is `mixed.py` without HTTP: plain requests by Poisson, alone, beside one other kind (`penalties`,
`tools`, `logprobs`), beside `all` three, or beside as many `plain` ones.

--hollow: with a device that takes --step-ms for a step and computes nothing, so that without a GPU
the host's work for one can be timed: graphs are not launched, and tokens are any that a mask
allows. What is missing are launches, copies and events, which cost a GPU's host most of a submit.
--calls: how many operations of torch a step takes, each of which costs such a host 4 to 15 µs.

Printed are means over the steps of a kind, in µs. `P` marks steps with a prompt. `other` is the
core's loop and what no part names; `measuring` is this program's own, mostly events. Of the device,
`forward` and `sample` are the time between the halves' first and last launch, `between` its wait
for the second half, `until next` its wait for the next step. The parts of a half are timed within
it, and are printed below.
"""

import argparse
import ctypes
import dataclasses
import json
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import torch
from http_load import percentile
from mixed import CITY
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import Asking, asking

from nanovllm.config import EngineConfig
from nanovllm.core.engine_core import EngineCore
from nanovllm.core.grammar import GrammarCompiler, MasksUnderWay
from nanovllm.core.server import CoreServer
from nanovllm.executor.inline import inline_executor
from nanovllm.frontend.tokenizer import Tokenizer
from nanovllm.protocol.messages import AddRequest
from nanovllm.protocol.plan import StepHandle, StepMasks, StepPlan, StepResult
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams
from nanovllm.worker.attention.shared_prefix import PrefixFinder
from nanovllm.worker.cuda_graph import (
    CallGraphs,
    CapturedStep,
    StepGraphs,
    StepOutput,
    StepShape,
    Variant,
)
from nanovllm.worker.forward_batch import PlanStaging, SampleSlot
from nanovllm.worker.kernels.select import FusedStep
from nanovllm.worker.model_runner import ModelRunner
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling.device_sampler import DeviceSampler
from nanovllm.worker.sampling.wishes import HEAD, LINE, MASK, MASKS, NOTHING, NUM_FIELDS, Wishes
from nanovllm.worker.worker import Worker

NOW = time.perf_counter
ROW_BUCKETS = (1, 4, 8, 16, 32, 48, 64, 128, 256, 1024)
MAX_MODEL_LEN = 4096
WARM_UP_STEPS = 400
COUNTED_STEPS = 40
# Of a turn of the core's loop, in the order in which a step passes through them.
PARTS = (
    "schedule",
    "submit",
    "masks begin",
    "masks wait",
    "sample",
    "wait device",
    "update",
    "deliver",
    "measuring",
)
DEVICE_PARTS = ("forward", "between", "sample", "until next")
# What the two halves consist of: (part of a turn, its own name, whose, method).
INNER: tuple[tuple[str, str, type, str], ...] = (
    ("submit", "record", RequestRows, "record"),
    ("submit", "shared prefix", PrefixFinder, "find"),
    ("submit", "stage", PlanStaging, "stage"),
    ("submit", "send", PlanStaging, "_send"),
    ("submit", "write", ModelRunner, "_write"),
    ("submit", "graph", StepGraphs, "run"),
    ("sample", "all that ask", DeviceSampler, "sample"),
    ("sample", "copy there", SampleSlot, "send"),
    ("sample", "graph", DeviceSampler, "_launch"),
    ("sample", "copy of ids", SampleSlot, "fetch"),
    ("sample", "and of more", SampleSlot, "fetch_lines"),
)
MIXED_KINDS: dict[str, dict[str, Any]] = {
    "plain": {"ignore_eos": True},
    "penalties": {"ignore_eos": True, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    "tools": {"structured_outputs": StructuredOutputsParams(json=CITY)},
    "logprobs": {"ignore_eos": True, "logprobs": 5},
}


class Step:
    """One that was submitted. spent: seconds by part, of the turns whose last step it was."""

    def __init__(self, plan: StepPlan) -> None:
        self.num_rows = len(plan.rows)
        self.has_prompt = sum(plan.num_scheduled) > self.num_rows
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.events: list[torch.cuda.Event] = []  # begin, forward, masks, end

    @property
    def kind(self) -> tuple[bool, int]:
        """What steps are told of together."""
        return self.has_prompt, next(size for size in ROW_BUCKETS if self.num_rows <= size)


class Clock:
    """Seconds by part since they were last taken."""

    def __init__(self) -> None:
        self._spent: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        start = NOW()
        try:
            yield
        finally:
            self._spent[part] += NOW() - start

    def move(self, seconds: float, *parts: str) -> None:
        """That time of these parts is this program's own."""
        for part in parts:
            self._spent[part] -= seconds
        self._spent["measuring"] += seconds

    def take(self) -> dict[str, float]:
        taken = dict(self._spent)
        self._spent.clear()
        return taken

    def time_calls(self, owner: Any, name: str, part: str) -> None:
        """From now on, of a class or of one object."""
        call = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = NOW()
            try:
                return call(*args, **kwargs)
            finally:
                self._spent[part] += NOW() - start

        setattr(owner, name, timed)


class TimedWorker:
    """Passes on to a worker, with events on its stream and the host's time of each call."""

    def __init__(self, inner: Worker, clock: Clock, *, step_s: float) -> None:
        """step_s: of a hollow device, what a step takes."""
        self.inner = inner
        self.steps: list[Step] = []
        self._clock = clock
        self._step_s = step_s
        self._free_at = 0.0
        self._has_events = torch.cuda.is_available()

    def _mark(self, step: Step) -> None:
        if self._has_events:
            with self._clock.timing("measuring"):
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                step.events.append(event)

    def submit(self, plan: StepPlan) -> "TimedHandle":
        step = Step(plan)
        self._mark(step)
        with self._clock.timing("submit"):
            handle = self.inner.submit(plan)
        self._mark(step)
        self.steps.append(step)
        self._free_at = max(self._free_at, NOW()) + self._step_s
        return TimedHandle(self._clock, handle, self._free_at)

    def sample(self, number: int, masks: StepMasks | None) -> None:
        step = self.steps[-1]
        self._mark(step)
        with self._clock.timing("sample"):
            self.inner.sample(number, masks)
        self._mark(step)

    def finish(self) -> None:
        """Wait for the device, if there is one."""
        if self._has_events:
            torch.cuda.synchronize()


class TimedHandle:
    def __init__(self, clock: Clock, handle: StepHandle, due: float) -> None:
        self._clock, self._handle, self._due = clock, handle, due

    def result(self) -> StepResult:
        with self._clock.timing("wait device"):
            while NOW() < self._due:  # a sleep would end late
                pass
            return self._handle.result()


class TimedMasks:
    """`MasksUnderWay` whose wait is timed."""

    def __init__(self, masks: MasksUnderWay, clock: Clock) -> None:
        self._masks, self._clock = masks, clock
        self.done, self.exception = masks.done, masks.exception

    def result(self) -> Any:
        with self._clock.timing("masks wait"):
            return self._masks.result()


class HollowGraphs(StepGraphs):
    """Launches nothing, and chooses id 7 for everyone."""

    def __init__(self, token_ids: torch.Tensor, *, max_num_rows: int, max_num_tokens: int) -> None:
        super().__init__(self.outputs, max_num_rows=max_num_rows, max_num_tokens=max_num_tokens)
        self._output = StepOutput(torch.zeros(max_num_rows, 1), None)
        self._token_ids = token_ids.numpy()

    def outputs(self, shape: StepShape, variant: Variant) -> StepOutput:
        return self._output

    def captured_shape_for(self, shape: StepShape, variant: Variant) -> StepShape:
        super().captured_shape_for(shape, variant)  # all there are have been captured
        return shape

    def run(self, shape: StepShape, variant: Variant) -> StepOutput:
        self._captured.setdefault((shape, variant), CapturedStep(None, self._output))
        self._token_ids[: shape.num_rows] = 7
        return self._output


class HollowGraph:
    def __init__(self, launch: Callable[[], Any]) -> None:
        self.replay = launch


class CalledGraphs:
    """Calls again what a graph would hold."""

    def capture(self, launch: Callable[[], Any]) -> tuple[HollowGraph, Any]:
        return HollowGraph(launch), None


class HollowSampler:
    """What stands for the second half's kernels: any id that a mask allows, else 7."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._random = random.Random(0)

    def step(self) -> FusedStep:
        refused = _refuse
        return FusedStep(refused, refused, refused, self.sample_edited, self.pack_wished, refused)

    def sample_edited(
        self, wishes: Wishes, num_entries: int, *, token_ids: torch.Tensor, **_: Any
    ) -> None:
        start = NOW()
        words, ids = wishes.words.numpy(), token_ids.numpy()
        lists, masks = words[HEAD:].reshape(NUM_FIELDS, -1), int(words[MASKS:].view(np.int64)[0])
        for line, place in zip(lists[LINE].tolist(), lists[MASK].tolist(), strict=True):
            if place != NOTHING:
                mask = ctypes.c_int32 * wishes.num_mask_words
                at = masks + place * ctypes.sizeof(mask)
                ids[line] = self._pick(np.ctypeslib.as_array(mask.from_address(at)))
        self._clock.move(NOW() - start, "sample", "sample: all that ask", "sample: graph")

    def pack_wished(self, *_: Any, **__: Any) -> None:
        """Whatever lies there is told."""

    def _pick(self, words: np.ndarray) -> int:
        places = words.nonzero()[0]
        place = int(places[self._random.randrange(len(places))])
        bits = int(words[place]) & 0xFFFFFFFF
        return 32 * place + self._random.choice([bit for bit in range(32) if bits >> bit & 1])


def _refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("a hollow device runs no kernels")


class Calls(TorchDispatchMode):
    """Counts operations of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Engine:
    """Core and worker in this process, as a client of them sees it."""

    def __init__(self, config: EngineConfig, *, is_hollow: bool, step_s: float) -> None:
        worker = inline_executor(config, lambda phase, progress: None)
        info = worker.start()
        self.clock = Clock()
        if is_hollow:
            _hollow(worker, config, info.num_blocks, self.clock)
        else:
            worker.allocate(info.num_blocks)
            for _ in range(WARM_UP_STEPS):
                if not worker.warm_up():
                    break
        for part, name, owner, method in INNER:
            self.clock.time_calls(owner, method, f"{part}: {name}")
        self.worker = TimedWorker(worker, self.clock, step_s=step_s)
        compiler = GrammarCompiler(Tokenizer.load(config.model.tokenizer_source).to_json, info)
        compiler.load()
        self.core = EngineCore(config, self.worker, info, compiler)
        self.clock.time_calls(self.core.scheduler, "update", "update")
        self.clock.time_calls(self.core.scheduler, "schedule", "schedule")
        self._time_masks()
        server = CoreServer(config, f"ipc://{tempfile.mkdtemp()}/core.sock")
        self._clients = server._clients
        self._client = server._clients.attach(b"client", time.monotonic())
        self._encoder = msgspec.msgpack.Encoder()
        self._number = 0
        self.num_tokens = 0

    def _time_masks(self) -> None:
        begin = self.core.grammars.begin_masks

        def timed(matchers: Any) -> TimedMasks:
            with self.clock.timing("masks begin"):
                masks = begin(matchers)
            return TimedMasks(masks, self.clock)

        self.core.grammars.begin_masks = timed

    def add(self, prompt: list[int], params: SamplingParams) -> int:
        """Queue a request; returns its number."""
        self._number += 1
        self.core.add(self._client.client_id, AddRequest(self._number, prompt, params))
        return self._number

    def turn(self) -> list[int]:
        """One turn of the core's loop; returns the numbers of whom it brought tokens."""
        self.clock.take()
        started = NOW()
        outputs, numbers = self.core.step(), list[int]()
        if outputs is not None:
            assert not outputs.failed, outputs.failed[0].failure
            with self.clock.timing("deliver"):
                self._clients.collect(outputs)
                numbers = self._client.outputs.numbers
                self._encoder.encode(self._client.outputs)
                self._client.take_outputs()
        self.num_tokens += len(numbers)
        if self.worker.steps:
            step = self.worker.steps[-1]
            spent = self.clock.take() | {"all": NOW() - started}
            for part, seconds in spent.items():
                step.spent[part] += seconds
        return numbers

    def forget(self) -> None:
        """What has been measured, and all prefixes."""
        while self.core.busy:
            self.core.step()
        self.core.reset_prefix_cache()
        self.worker.steps.clear()
        self.num_tokens = 0


def _hollow(worker: Worker, config: EngineConfig, num_blocks: int, clock: Clock) -> None:
    """Give a worker that has started a device that computes nothing."""
    loaded = worker._loaded
    assert loaded is not None, "it has started"
    kernels = dataclasses.replace(loaded.kernels, fused=HollowSampler(clock).step())
    worker._loaded = dataclasses.replace(loaded, kernels=kernels, captures=False, native=None)
    worker.allocate(num_blocks)
    limits = config.limits("cuda")
    worker._runner._device_sampler._calls = CallGraphs(CalledGraphs())
    worker._runner._graphs = HollowGraphs(
        worker._runner._device_sampler.staging.token_ids,
        max_num_rows=limits.max_num_seqs,
        max_num_tokens=limits.max_num_batched_tokens,
    )
    worker._runner._attention = SimpleNamespace(shares_prefix=True, most_at_once=128)


def begin(engine: Engine, spec: Asking) -> None:
    """Queue the requests of a workload."""
    prompts, num_out = spec.workload
    wants: dict[str, Any] = {"ignore_eos": True} | spec.fields
    if spec.is_free:
        wants = {"structured_outputs": StructuredOutputsParams(**spec.fields)}
    for index, prompt in enumerate(prompts):
        asked = wants if index < spec.num_asking else {"ignore_eos": True}
        engine.add(prompt, SamplingParams(temperature=0.8, max_tokens=num_out[0], **asked))


def run(engine: Engine, spec: Asking) -> float:
    """A workload; returns the seconds it took."""
    engine.forget()
    begin(engine, spec)
    started = NOW()
    while engine.core.num_unfinished:
        engine.turn()
    engine.worker.finish()
    return NOW() - started


def run_mixed(engine: Engine, beside: str, *, rate: float, duration_s: float) -> float:
    """Prints the intervals of the plain streams; returns the seconds it took."""
    others = {"alone": [], "all": ["penalties", "tools", "logprobs"], "plain": ["plain"] * 3}
    kinds = ["plain", *others.get(beside, [beside])]
    arrivals: list[tuple[float, int, str]] = []
    for place, kind in enumerate(kinds):
        rng, at = random.Random(place), 0.0
        while (at := at + rng.expovariate(rate)) < duration_s:
            arrivals.append((at, place, kind))
    arrivals.sort(reverse=True)
    engine.forget()
    came_at: dict[int, float] = {}  # of the plain streams, their last token
    intervals: list[float] = []
    prompts, started = random.Random(1), NOW()
    while arrivals or engine.core.num_unfinished:
        now = NOW() - started
        while arrivals and arrivals[-1][0] <= now:
            _, place, kind = arrivals.pop()
            prompt = [prompts.randrange(10_000) for _ in range(45)]
            params = SamplingParams(temperature=0.8, max_tokens=256, **MIXED_KINDS[kind])
            number = engine.add(prompt, params)
            if place == 0:
                came_at[number] = 0.0
        if not engine.core.busy:
            time.sleep(2e-4)
            continue
        numbers, now = engine.turn(), NOW()
        for number in numbers:
            if number in came_at:
                if came_at[number]:
                    intervals.append(now - came_at[number])
                came_at[number] = now
    engine.worker.finish()
    told = ", ".join(f"p{one} {percentile(intervals, one) * 1e3:.3f}" for one in (50, 90, 99))
    print(f"\nmixed, beside {beside}: {len(came_at)} plain streams, between tokens {told} ms")
    return NOW() - started


def mean(steps: list[Step], part: Callable[[Step], float]) -> float:
    """Of steps, in µs."""
    return sum(map(part, steps)) / len(steps) * 1e6


def report(name: str, engine: Engine, seconds: float) -> None:
    steps, kinds = engine.worker.steps, defaultdict[tuple[bool, int], list[Step]](list)
    for step in steps:
        kinds[step.kind].append(step)
    decode = [step.spent["all"] * 1e3 for step in steps if not step.has_prompt] or [0.0]
    print(
        f"\n{name}: {engine.num_tokens} tokens in {seconds * 1e3:.1f} ms, "
        f"{engine.num_tokens / seconds:,.0f} a second, {len(steps)} steps; turns that decode: "
        f"p50 {percentile(decode, 50):.3f} p99 {percentile(decode, 99):.3f} ms"
    )
    header = "  rows ≤  steps  " + "".join(f"{part:>12s}" for part in ("all", *PARTS, "other"))
    has_events = bool(steps and steps[0].events)
    print(header + (" | device:" + "".join(f"{part:>11s}" for part in DEVICE_PARTS)) * has_events)
    for (has_prompt, size), some in sorted(kinds.items()):
        every = mean(some, lambda step: step.spent["all"])
        parts = [mean(some, lambda step, part=part: step.spent[part]) for part in PARTS]
        figures = [every, *parts, every - sum(parts)]
        line = "".join(f"{figure:12.1f}" for figure in figures)
        if has_events:
            line += " |        " + "".join(f"{one:11.1f}" for one in device_parts(steps, some))
        print(f"{'P' if has_prompt else ' ':1s} {size:6d} {len(some):6d}  {line}")
    print("  rows ≤  of its halves: " + "".join(f"{name:>15s}" for _, name, *_ in INNER))
    for (has_prompt, size), some in sorted(kinds.items()):
        names = [f"{part}: {name}" for part, name, *_ in INNER]
        parts = [mean(some, lambda step, part=part: step.spent[part]) for part in names]
        line = "".join(f"{figure:15.1f}" for figure in parts)
        print(f"{'P' if has_prompt else ' ':1s} {size:6d} {'':16s}{line}", flush=True)


def device_parts(steps: list[Step], some: list[Step]) -> list[float]:
    """Means in µs, as `DEVICE_PARTS` names them. steps: all, in order."""
    sums, followers = [0.0] * 4, dict(pairwise(steps))
    for step in some:
        begin, forward, masks, end = step.events
        sums[0] += begin.elapsed_time(forward)
        sums[1] += forward.elapsed_time(masks)
        sums[2] += masks.elapsed_time(end)
        if step in followers:
            sums[3] += end.elapsed_time(followers[step].events[0])
    return [1e3 * one / len(some) for one in sums]


def count_calls(engine: Engine, name: str, spec: Asking) -> None:
    """Operations of torch a step, by half, in the middle of a workload."""
    engine.forget()
    begin(engine, spec)
    until = COUNTED_STEPS
    while len(engine.worker.steps) < until:
        engine.turn()
    by_half: dict[str, Counter[str]] = {}
    worker = engine.worker.inner
    for half in ("submit", "sample"):
        call, calls = getattr(worker, half), Calls()

        def counted(*args: Any, call: Any = call, calls: Calls = calls) -> Any:
            with calls:
                return call(*args)

        setattr(worker, half, counted)
        by_half[half] = calls.counts
    until += COUNTED_STEPS
    while engine.core.num_unfinished and len(engine.worker.steps) < until:
        engine.turn()
    for half, counts in by_half.items():
        delattr(worker, half)
        told = ", ".join(f"{one} {count / COUNTED_STEPS:g}" for one, count in counts.most_common())
        print(f"{name}, operations in {half}: {counts.total() / COUNTED_STEPS:.1f} a step: {told}")
    while engine.core.num_unfinished:
        engine.turn()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights")
    parser.add_argument("--workload", default="ask_nobody,ask_all_schema")
    parser.add_argument("--rounds", type=int, default=3, help="of each; the last is told of")
    parser.add_argument("--mixed", default="", help="beside what plain streams run")
    parser.add_argument("--rate", type=float, default=16.0, help="requests a second of each kind")
    parser.add_argument("--seconds", type=float, default=4.0, help="for which they arrive")
    parser.add_argument("--hollow", action="store_true", help="with a device that computes nothing")
    parser.add_argument("--step-ms", type=float, default=0.0, help="what a step takes it")
    parser.add_argument("--calls", action="store_true", help="count operations of torch as well")
    parser.add_argument("--config", default="{}", help="further settings, as JSON")
    arguments = parser.parse_args()
    settings: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "gpu_memory_utilization": 0.5}
    if arguments.hollow:
        settings |= {"device": "cpu", "num_gpu_blocks_override": 8192}
        settings |= {"max_num_batched_tokens": 8192, "max_inflight_steps": 2}
    config = EngineConfig.from_kwargs(
        model=arguments.model,
        load_format=arguments.load_format,
        **settings | json.loads(arguments.config),
    )
    engine = Engine(config, is_hollow=arguments.hollow, step_s=arguments.step_ms / 1e3)
    for name in filter(None, arguments.workload.split(",")):
        spec = asking(name)
        assert spec is not None, f"{name}: not a workload that asks"
        for _ in range(arguments.rounds):
            seconds = run(engine, spec)
        report(name, engine, seconds)
        if arguments.calls:
            count_calls(engine, name, spec)
    names = [name for name in arguments.mixed.split(",") if name]
    for name in ["all"] * bool(names) + names:  # the first compiles and captures
        seconds = run_mixed(engine, name, rate=arguments.rate, duration_s=arguments.seconds)
        report(name, engine, seconds)
    engine.worker.inner.shutdown()


if __name__ == "__main__":
    main()
