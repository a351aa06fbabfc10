"""Offline throughput on fixed workloads, beside the floor, and beside vLLM where it is installed.

    python benchmarks/offline.py --model benchmarks/models/qwen3-0.6b --load-format dummy \
        --workload nano256,decode_bs1

One line per engine and workload: seconds (best of --repeats), output tokens/s, all tokens/s, and
the roofline time over the time taken. Each engine runs in a process of its own, one after another.

`ask_…` workloads (`workloads.asking`) are 64 requests of which none, one or all ask for something
of their sampling; "x plain" compares with `ask_nobody` of the same engine, which comes first:

    python benchmarks/offline.py --model benchmarks/models/qwen3-0.6b --load-format dummy \
        --workload ask_nobody,ask_one_penalties,ask_all_penalties,ask_one_logprobs,ask_all_logprobs

Those with a grammar (`…_schema`, `…_regex`) or `…_bad_words` need a checkpoint with a tokenizer;
their tokens/s count what outputs hold, and "forced" those of them that were not sampled.

`first_1,first_8,first_64`, named first of all, are run twice each, the first time right after the
start; "x second" is the first run's time over the second's.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from workloads import (
    ASKS,
    WORKLOADS,
    Asking,
    Workload,
    asking,
    first_requests,
    floor_seconds,
    keeps_cache,
    longest,
)

MAX_MODEL_LEN = 4096
TEMPERATURE = 0.6
ENGINES = ("nanovllm", "vllm")


def make_engine(engine: str, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """An engine's `LLM`, set up like the other's, and its `SamplingParams`."""
    module = import_module(engine)
    own = {"disable_log_stats": True} if engine == "vllm" else json.loads(arguments.config)
    llm = module.LLM(
        arguments.model,
        load_format=arguments.load_format,
        skip_tokenizer_init=not needs_tokenizer(arguments),
        dtype=arguments.dtype,
        max_model_len=max_model_len(arguments),
        gpu_memory_utilization=0.85,
        **own,
    )
    return llm, module.SamplingParams


def max_model_len(arguments: argparse.Namespace) -> int:
    """As much as the wanted workloads need, and no less than a usual setting."""
    names = [name for name, _ in wanted_workloads(arguments) if name in WORKLOADS]
    return max([MAX_MODEL_LEN, *(longest(WORKLOADS[name]()) for name in names)])


def needs_tokenizer(arguments: argparse.Namespace) -> bool:
    """Whether a workload has a grammar, or texts in its parameters."""
    found = [asking(name) for name, _ in wanted_workloads(arguments)]
    return any(one is not None and one.needs_tokenizer for one in found)


def run_first(llm: Any, params_type: Any, workload: Workload) -> tuple[float, float]:
    """Seconds of the first run and of the second, each with a cold prefix cache."""
    prompts, num_out = workload
    params = params_type(
        temperature=TEMPERATURE, ignore_eos=True, max_tokens=num_out[0], detokenize=False
    )
    requests, seconds = [{"prompt_token_ids": prompt} for prompt in prompts], []
    for _ in range(2):
        started = time.perf_counter()
        llm.generate(requests, params, use_tqdm=False)
        seconds.append(time.perf_counter() - started)
        llm.reset_prefix_cache()
    return seconds[0], seconds[1]


def run_asking(llm: Any, params_type: Any, spec: Asking, repeats: int) -> tuple[float, int, int]:
    """Best output tokens per second of `repeats` runs, that run's tokens, and those of them that a
    grammar forced, as far as the engine tells."""
    prompts, num_out = spec.workload
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    fields = dict(spec.fields)
    if spec.is_free:
        module = import_module(f"{params_type.__module__.partition('.')[0]}.sampling_params")
        fields = {"structured_outputs": module.StructuredOutputsParams(**fields)}
    plain = {"temperature": 0.8, "max_tokens": num_out[0]}
    asking = params_type(
        **plain, ignore_eos=not spec.is_free, detokenize=spec.is_free, **fields
    )  # their text is read, if a grammar says what it is to be
    others = params_type(**plain, ignore_eos=True, detokenize=False)
    params = [asking if index < spec.num_asking else others for index in range(len(prompts))]
    best = 0.0, 0, 0
    for _ in range(repeats + 1):  # the first one compiles grammars
        llm.reset_prefix_cache()
        started = time.perf_counter()
        outputs = llm.generate(requests, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        tells = params_type.__module__.startswith("nanovllm")
        num_forced = sum(output.metrics.num_forced_tokens for output in outputs) if tells else 0
        best = max(best, (num_tokens / seconds, num_tokens, num_forced))
    check_grammars(outputs, spec)
    return best


def check_grammars(outputs: list[Any], spec: Asking) -> None:
    """Tells of outputs that have finished and yet are no JSON where that was asked for."""
    num_wrong = 0
    for output in outputs[: spec.num_asking] if "json" in spec.fields else ():
        if output.outputs[0].finish_reason == "stop":
            try:
                json.loads(output.outputs[0].text)
            except ValueError:
                num_wrong += 1
    if num_wrong:
        print(f"{num_wrong} finished outputs are not JSON", file=sys.stderr, flush=True)


def run_workload(llm: Any, params_type: Any, name: str, repeats: int) -> tuple[float, Workload]:
    """Best seconds of `repeats` runs. Cold, unless the workload is about a warm cache."""
    workload = WORKLOADS[name]()
    prompts, num_out = workload
    params = [
        params_type(temperature=TEMPERATURE, ignore_eos=True, max_tokens=count, detokenize=False)
        for count in num_out
    ]
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    best = float("inf")
    llm.reset_prefix_cache()
    for _ in range(repeats + keeps_cache(name)):
        if not keeps_cache(name):
            llm.reset_prefix_cache()
        started = time.perf_counter()
        outputs = llm.generate(requests, params, use_tqdm=False)
        best = min(best, time.perf_counter() - started)
        produced = [len(output.outputs[0].token_ids) for output in outputs]
        assert produced == num_out, "every engine must do the whole work"
    return best, workload


def wanted_workloads(arguments: argparse.Namespace) -> list[tuple[str, int]]:
    """Names, and how often each runs: `--repeats` times, or as `name:times` says."""
    parts = [text.partition(":") for text in arguments.workload.split(",")]
    return [(name, int(times or arguments.repeats)) for name, _, times in parts]


def measure(engine: str, arguments: argparse.Namespace) -> None:
    """Run all workloads on one engine in this process."""
    config = json.loads((Path(arguments.model) / "config.json").read_text())
    own = json.loads(arguments.config) if engine == "nanovllm" else {}
    bytes_each = {
        "layer_bytes": 2 if own.get("quantization") is None else 1,
        "kv_bytes": 2 if own.get("kv_cache_dtype", "auto") == "auto" else 1,
    }
    started = time.perf_counter()
    llm, params_type = make_engine(engine, arguments)
    print(f"{engine:9s} start {time.perf_counter() - started:.1f} s", flush=True)
    plain_rate = 0.0
    for name, repeats in wanted_workloads(arguments):
        if (spec := asking(name)) is not None:
            rate, num_tokens, num_forced = run_asking(llm, params_type, spec, repeats)
            plain_rate = rate if name == "ask_nobody" else plain_rate
            ratio = f"{rate / plain_rate:5.2f} x plain" if plain_rate else ""
            print(
                f"{engine:9s} {Path(arguments.model).name:12s} {name:22s} {rate:9.0f} out tok/s "
                f"{num_tokens:7d} tokens {ratio}{f' {num_forced} forced' * (num_forced > 0)}",
                flush=True,
            )
            continue
        if (first := first_requests(name)) is not None:
            once, again = run_first(llm, params_type, first)
            print(
                f"{engine:9s} {Path(arguments.model).name:12s} {name:22s} first {once:7.3f} s "
                f"second {again:7.3f} s {once / again:5.2f} x second",
                flush=True,
            )
            continue
        seconds, workload = run_workload(llm, params_type, name, repeats)
        num_out = sum(workload[1])
        num_all = num_out + sum(map(len, workload[0]))
        print(
            f"{engine:9s} {Path(arguments.model).name:12s} {name:12s} {seconds:8.3f} s "
            f"{num_out / seconds:9.0f} out tok/s {num_all / seconds:9.0f} tok/s "
            f"floor {floor_seconds(config, workload, **bytes_each) / seconds:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="directory with a config.json")
    parser.add_argument("--load-format", default="auto", choices=["auto", "safetensors", "dummy"])
    parser.add_argument(
        "--workload",
        default=",".join(WORKLOADS),
        help="names, comma-separated; name:1 runs it once",
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--config", default="{}", help="further nanovllm settings, as JSON")
    parser.add_argument("--engine", choices=ENGINES, help="only this one, in this process")
    arguments = parser.parse_args()
    unknown = {
        name
        for name, _ in wanted_workloads(arguments)
        if asking(name) is None and first_requests(name) is None and name not in WORKLOADS
    }
    if unknown:
        known = ", ".join(
            (*WORKLOADS, "first_1", "ask_nobody", *(f"ask_one_{name}" for name in ASKS))
        )
        parser.error(f"unknown workload {', '.join(unknown)}: known are {known}, and ask_all_…")
    if arguments.engine:
        measure(arguments.engine, arguments)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("offline.py: ended"))  # and end the engine
    for engine in ENGINES:
        if find_spec(engine) is None:
            print(f"{engine} is not installed: skipped")
        else:
            subprocess.run([sys.executable, *sys.argv, "--engine", engine], check=False)


if __name__ == "__main__":
    main()
