"""nanovllm beside vLLM on several models in one call, for a GPU that is lent by the minute.

    python benchmarks/beside_vllm.py [--models qwen3-30b-a3b gpt-oss-20b …] [--seconds 540]

Dummy weights of `benchmarks/models`, or the checkpoint `--smollm2` names; a model's workloads and
the GiB of its KV cache, the same for both engines, are in `MODELS`. Engines of vLLM, which take
minutes to start, start at the same time and then take turns, so the card must hold the weights of
all models once. Of nanovllm one model runs after another: an engine that has nothing to do captures
graphs that requests may want, beside which another one would be slow.

Each figure is printed as it is measured; what is not there when the time is over is told. Then a
table: output tokens per second (of `prefill`, `long1` and `long8` all tokens), the share of what
the card allows, how many times `ask_nobody` of the same engine, and how many times vLLM's.

A vLLM that needs packages of its own runs under the interpreter that `--vllm-python` names.
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
from typing import Any, NamedTuple, TextIO

from offline import ENGINES, MAX_MODEL_LEN, run_asking, run_workload
from workloads import WORKLOADS, Asking, asking, floor_seconds, longest

FOLDER = Path(__file__).parent / "models"
USUAL = "decode_bs1,decode_bs8,decode_bs64,prefill"
ONE_OF_64 = ",".join(
    f"ask_one_{name}" for name in ("penalties", "logprobs", "bias", "min_tokens", "allowed")
)
# NVLink multicast, by which vLLM would fuse sums and norms, can put a host's GPUs out of service.
ON_TWO: dict[str, Any] = {
    "settings": {"tensor_parallel_size": 2},
    "vllm": {"compilation_config": {"pass_config": {"fuse_allreduce_rms": False}}},
}
NO_MULTICAST = {"VLLM_ALLREDUCE_USE_FLASHINFER": "0", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}
FP8 = {"quantization": "fp8", "kv_cache_dtype": "fp8"}


class Model(NamedTuple):
    """What is measured of a model, and how both engines are set up for it."""

    folder: str
    kv_gib: float
    workloads: str = USUAL
    settings: dict[str, Any] = {}  # noqa: RUF012  never changed
    vllm: dict[str, Any] = {}  # noqa: RUF012  and of vLLM alone

    @property
    def cases(self) -> list[str]:
        return self.workloads.split(",")

    def asks(self) -> list[Asking]:
        return [spec for case in self.cases if (spec := asking(case)) is not None]


MODELS = {
    "qwen3-0.6b": Model(
        "qwen3-0.6b",
        30,
        "decode_bs1,decode_bs3,decode_bs8,decode_bs64,pages32,short128,long8,prefill,nano256,"
        "skewed600",
    ),
    "qwen3-0.6b-asks": Model(
        "qwen3-0.6b",
        20,
        f"ask_nobody,{ONE_OF_64},ask_all_penalties,ask_all_bias,ask_all_logprobs,"
        "ask_all_prompt_logprobs",
    ),
    "qwen3-0.6b-fp8": Model("qwen3-0.6b", 6, "decode_bs1,decode_bs8,pages32,decode_bs64", FP8),
    "smollm2": Model(
        "smollm2",
        4,
        "ask_nobody,ask_one_schema,ask_one_regex,ask_one_bad_words,ask_eight_schema,ask_all_schema",
    ),
    "qwen3-8b": Model("qwen3-8b", 11, f"{USUAL},pages32"),
    "qwen3-8b-fp8": Model("qwen3-8b", 6, f"{USUAL},pages32", FP8),
    "qwen3-8b-w4a16": Model("qwen3-8b-w4a16", 9),
    "qwen3-30b-a3b": Model("qwen3-30b-a3b", 14, f"{USUAL},nano256"),
    "gpt-oss-20b": Model("gpt-oss-20b", 8),
    "gemma-3-4b": Model("gemma-3-4b", 10, "decode_bs1,decode_bs64,long1"),
    "qwen3-8b-tp2": Model("qwen3-8b", 11, f"{USUAL},nano256", **ON_TWO),
    "qwen3-32b-tp2": Model("qwen3-32b", 8, "decode_bs1,decode_bs64", **ON_TWO),
}
DEFAULT = [name for name, model in MODELS.items() if not model.vllm]  # on one GPU
READS = ("prefill", "long1", "long8")  # what counts is how fast prompts are read
START_SHARE = 0.6  # of the time of an engine's turn that its starts may take
SHORT_S = 3.0  # a workload that takes no longer runs twice more


def start_engine(engine: str, model: Model, folder: Path) -> tuple[Any, Any]:
    """Its `LLM`, set up as the other engine's, and its `SamplingParams`."""
    module = import_module(engine)
    lengths = [longest(WORKLOADS[one]()) for one in model.cases if one in WORKLOADS]
    # vLLM asks that its share of the card be free when it starts, and heeds it no further.
    own: dict[str, Any] = (
        {"disable_log_stats": True, "gpu_memory_utilization": 0.05, **model.vllm}
        if engine == "vllm"
        else {"gpu_memory_utilization": 0.9}
    )
    llm = module.LLM(
        str(folder),
        load_format="auto" if any(folder.glob("*.safetensors")) else "dummy",
        skip_tokenizer_init=not any(spec.needs_tokenizer for spec in model.asks()),
        dtype="bfloat16",
        max_model_len=max([MAX_MODEL_LEN, *lengths]),
        kv_cache_memory_bytes=int(model.kv_gib * 2**30),
        **model.settings,
        **own,
    )
    return llm, module.SamplingParams


def run_case(llm: Any, params_type: Any, name: str, model: Model, folder: Path) -> dict[str, float]:
    """`rate`, and `floor`: the roofline's time over the one taken, or `forced` tokens."""
    if (spec := asking(name)) is not None:
        rate, _, num_forced = run_asking(llm, params_type, spec, 2)
        return {"rate": rate, "forced": num_forced}
    run_workload(llm, params_type, name, 1)  # compiles what is left to compile
    seconds, workload = run_workload(llm, params_type, name, 1)
    if seconds <= SHORT_S:
        seconds = min(seconds, run_workload(llm, params_type, name, 2)[0])
    prompts, num_out = workload
    num_tokens = sum(num_out) + (sum(map(len, prompts)) if name in READS else 0)
    config = json.loads((folder / "config.json").read_text())
    rate = num_tokens / seconds
    if "config_groups" in config.get("quantization_config", {}):
        return {"rate": rate}  # the roofline knows no packed weights
    size = 1 if "quantization" in model.settings else 2
    floor = floor_seconds(config, workload, layer_bytes=size, kv_bytes=size)
    floor /= model.settings.get("tensor_parallel_size", 1)
    return {"rate": rate, "floor": floor / seconds}


def serve(engine: str, name: str, folder: Path) -> None:
    """In a process of its own: starts, then runs each workload that a line of stdin names."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # engines print to stdout
    started = time.perf_counter()
    llm, params_type = start_engine(engine, MODELS[name], folder)
    print(json.dumps({"start_s": time.perf_counter() - started}), file=answers)
    for line in sys.stdin:
        print(
            json.dumps(run_case(llm, params_type, line.strip(), MODELS[name], folder)),
            file=answers,
        )


class Child:
    """One engine with one model."""

    def __init__(self, engine: str, name: str, python: str, folder: Path, log: TextIO) -> None:
        self.engine, self.name, self._log = engine, name, log
        command = [python, __file__, "--child", engine, name, str(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            start_new_session=True, env={**os.environ, **NO_MULTICAST},
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


Rates = dict[tuple[str, str], dict[str, float]]  # by model and workload


def told(name: str, case: str, rates: Rates) -> str:
    """One figure, and what it is a share of."""
    answer = rates[name, case]
    text = f"{answer['rate']:9.0f}"
    if "floor" in answer:
        return text + f" {answer['floor']:5.2f} of the limit"
    if (plain := rates.get((name, "ask_nobody"))) is not None and "prompt" not in case:
        text += f" {answer['rate'] / plain['rate']:5.2f} x plain"
    return text + (f" {answer['forced']:.0f} forced" if answer.get("forced") else "")


def measure(
    engine: str, names: list[str], arguments: argparse.Namespace, until: float
) -> tuple[Rates, float]:
    """What one engine does, and the seconds it took in all."""
    rates: Rates = {}
    begun = time.monotonic()
    python = arguments.vllm_python if engine == "vllm" else sys.executable
    groups = [names] if engine == "vllm" else [[name] for name in names]
    with ExitStack() as logs:
        logs_folder = arguments.logs or logs.enter_context(tempfile.TemporaryDirectory())
        for group in groups:
            children = []
            for name in group:
                log = logs.enter_context(Path(logs_folder, f"{engine}-{name}.log").open("w"))
                is_real = name == "smollm2"
                folder = Path(arguments.smollm2) if is_real else FOLDER / MODELS[name].folder
                children.append(Child(engine, name, python, folder, log))
            try:
                run_all(children, arguments.workloads, until, rates)
            finally:
                for child in children:
                    child.end()
    return rates, time.monotonic() - begun


def run_all(children: list[Child], wanted: list[str] | None, until: float, rates: Rates) -> None:
    """Wait until all have started; then each has its turn."""
    ready = []
    begun = time.monotonic()
    latest = begun + START_SHARE * (until - begun)
    for child in children:
        if (answer := child.ask(None, latest)) is not None:
            print(f"{child.engine:9} {child.name:16} start {answer['start_s']:.1f} s", flush=True)
            ready.append(child)
    for child in ready:
        for case in wanted or MODELS[child.name].cases:
            if (answer := child.ask(case, until)) is None:
                break
            rates[child.name, case] = answer
            line = f"{child.engine:9} {child.name:16} {case:24} {told(child.name, case, rates)}"
            print(line, flush=True)


def raise_timeout(number: int, frame: object) -> None:
    raise TimeoutError


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=DEFAULT)
    parser.add_argument("--workloads", nargs="+", help="only these, of every model")
    parser.add_argument("--smollm2", help="a directory of SmolLM2 with safetensors and tokenizer")
    parser.add_argument("--seconds", type=float, default=540, help="for all of it")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--vllm-python", default=sys.executable)
    parser.add_argument("--logs", help="a directory that keeps what the engines print")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        engine, name, folder = arguments.child
        serve(engine, name, Path(folder))
        return
    names = [name for name in arguments.models if name != "smollm2" or arguments.smollm2]
    signal.signal(signal.SIGALRM, raise_timeout)
    until = time.monotonic() + arguments.seconds
    measured: list[Rates] = []
    for engine in arguments.engines:
        python = arguments.vllm_python if engine == "vllm" else sys.executable
        if find_spec(engine) is None and python == sys.executable:
            print(f"{engine} is not installed: skipped")
            continue
        last = engine == arguments.engines[-1]
        left = until if last else time.monotonic() + arguments.seconds * 0.4
        rates, seconds = measure(engine, names, arguments, left)
        print(f"{engine}: {seconds:.0f} s in all", flush=True)
        measured.append(rates)
    first, *others = measured
    print(f"{'model':16} {'workload':24} {'nanovllm':>9} {'vLLM':>9} {'ratio':>6}")
    for (name, case), answer in first.items():
        other = others[0].get((name, case)) if others else None
        beside = (
            " " * 17
            if other is None
            else f"{other['rate']:9.0f} {answer['rate'] / other['rate']:6.2f} "
        )
        own = told(name, case, first)
        print(f"{name:16} {case:24} {own[:9]} {beside}{own[9:]}")


if __name__ == "__main__":
    main()
