"""nanovllm beside vLLM on several models in one call, for a GPU that is lent by the minute.

    python benchmarks/beside_vllm.py [--models qwen3-30b-a3b:10 …] [--seconds 540]

Dummy weights of `benchmarks/models`; a model is given as name:GiB of its KV cache, the same for
both engines. All engines of one kind start at the same time and stay until all of their workloads
have been measured, one after another, so the card must hold the weights of all models once. Each
figure is printed as it is measured; what is not there when the time is over is told. Then a table:
output tokens per second (of `prefill` and `long1` all tokens), and how many times vLLM's.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from offline import ENGINES, MAX_MODEL_LEN, run_workload
from workloads import WORKLOADS, longest

MODELS = ["qwen3-30b-a3b:10", "gpt-oss-20b:5", "gemma-3-4b:8", "qwen3-8b-w4a16:9"]
ASKED = {
    "qwen3-30b-a3b": "decode_bs1,decode_bs8,decode_bs64,prefill,nano256",
    "gpt-oss-20b": "decode_bs1,decode_bs8,decode_bs64,prefill",
    "gemma-3-4b": "decode_bs1,decode_bs64,long1",
    "qwen3-8b-w4a16": "decode_bs1,decode_bs8,decode_bs64,prefill",
}
USUAL = "decode_bs1,decode_bs8,decode_bs64,prefill"
READS = ("prefill", "long1")  # what counts is how fast prompts are read
OWN_SHARE = 0.9
START_SHARE = 0.6  # of the time of an engine's turn that its starts may take


def asked(name: str) -> list[str]:
    """The workloads of a model."""
    return ASKED.get(name, USUAL).split(",")


def start_engine(engine: str, model: Path, kv_gib: float) -> tuple[Any, Any]:
    """Its `LLM`, set up as the other engine's, and its `SamplingParams`."""
    module, lengths = (
        import_module(engine),
        [longest(WORKLOADS[one]()) for one in asked(model.name)],
    )
    own: dict[str, Any] = {"disable_log_stats": True} if engine == "vllm" else {}
    llm = module.LLM(
        str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=max(MAX_MODEL_LEN, *lengths),
        gpu_memory_utilization=OWN_SHARE,
        kv_cache_memory_bytes=int(kv_gib * 2**30),
        **own,
    )
    return llm, module.SamplingParams


def serve(engine: str, model: Path, kv_gib: float, repeats: int) -> None:
    """In a process of its own: starts, then runs each workload that a line of stdin names."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # engines print to stdout
    started = time.perf_counter()
    llm, params_type = start_engine(engine, model, kv_gib)
    print(json.dumps({"start_s": time.perf_counter() - started}), file=answers)
    for line in sys.stdin:
        name = line.strip()
        run_workload(llm, params_type, name, 1)  # compiles what is left to compile
        seconds, (prompts, num_out) = run_workload(llm, params_type, name, repeats)
        num_tokens = sum(num_out) + (sum(map(len, prompts)) if name in READS else 0)
        print(json.dumps({"rate": num_tokens / seconds}), file=answers)


class Child:
    """One engine with one model."""

    def __init__(self, engine: str, name: str, kv_gib: str, repeats: int, log: TextIO) -> None:
        self.engine, self.name, self._log = engine, name, log
        command = [sys.executable, __file__, "--child", engine, name, kv_gib, str(repeats)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            start_new_session=True,
        )  # fmt: skip

    def ask(self, workload: str | None, until: float) -> dict[str, float] | None:
        """What it answers to the name of a workload, None: to its start. None if it has died, or
        does not answer in time; it is then ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        signal.setitimer(signal.ITIMER_REAL, max(0.1, until - time.monotonic()))
        try:
            if workload is not None:
                self._process.stdin.write(workload + "\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (TimeoutError, BrokenPipeError):
            line = ""
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if not line:
            self.end()
            self._log.flush()
            tail = Path(self._log.name).read_text(errors="replace").strip().splitlines()[-4:]
            print(f"{self.engine} {self.name} is over:", *(text[:300] for text in tail), sep="\n  ")
            return None
        answer: dict[str, float] = json.loads(line)
        return answer

    def end(self) -> None:
        """With all that it has started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def measure(engine: str, models: list[str], repeats: int, until: float) -> dict[str, float]:
    """Rates by "model workload" of one engine, whose models start together."""
    rates: dict[str, float] = {}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as logs:
        children = []
        for model in models:
            name, _, gib = model.partition(":")
            log = logs.enter_context(Path(folder, name).open("w"))
            children.append(Child(engine, name, gib, repeats, log))
        try:
            ready = []
            latest = begun + START_SHARE * (until - begun)
            for child in children:
                if (answer := child.ask(None, latest)) is not None:
                    told = f"start {answer['start_s']:6.1f} s"
                    print(f"{engine:9} {child.name:16} {told}", flush=True)
                    ready.append(child)
            for child in ready:
                for workload in asked(child.name):
                    if (answer := child.ask(workload, until)) is None:
                        break
                    rate = rates[f"{child.name} {workload}"] = answer["rate"]
                    print(f"{engine:9} {child.name:16} {workload:12} {rate:9.0f}", flush=True)
        finally:
            for child in children:
                child.end()
    print(f"{engine}: {time.monotonic() - begun:.0f} s in all", flush=True)
    return rates


def raise_timeout(number: int, frame: object) -> None:
    raise TimeoutError


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--seconds", type=float, default=540, help="for all of it")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = Path(__file__).parent / "models"
    if arguments.child:
        engine, name, gib, repeats = arguments.child
        serve(engine, folder / name, float(gib), int(repeats))
        return
    signal.signal(signal.SIGALRM, raise_timeout)
    until = time.monotonic() + arguments.seconds
    rates: dict[str, dict[str, float]] = {}
    for engine in ENGINES:
        if find_spec(engine) is None:
            print(f"{engine} is not installed: skipped")
            continue
        last = engine == ENGINES[-1]
        left = until if last else time.monotonic() + arguments.seconds * 0.4
        rates[engine] = measure(engine, arguments.models, arguments.repeats, left)
    first, *others = rates.values()
    print(f"{'model and workload':32} {'nanovllm':>9} {'vLLM':>9} {'ratio':>6}")
    for case, rate in first.items():
        other = others[0].get(case) if others else None
        beside = "" if other is None else f"{other:9.0f} {rate / other:6.2f}"
        print(f"{case:32} {rate:9.0f} {beside}")


if __name__ == "__main__":
    main()
