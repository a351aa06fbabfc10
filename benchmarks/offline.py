"""Offline throughput on fixed workloads, beside the floor, and beside vLLM where it is installed.

    python benchmarks/offline.py --model benchmarks/models/qwen3-0.6b --load-format dummy \
        --workload nano256,decode_bs1

One line per engine and workload: seconds (best of --repeats), output tokens/s, all tokens/s, and
the roofline time over the time taken. Each engine runs in a process of its own, one after another.
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

from workloads import WORKLOADS, Workload, floor_seconds, keeps_cache

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
        skip_tokenizer_init=True,
        dtype=arguments.dtype,
        max_model_len=MAX_MODEL_LEN,
        gpu_memory_utilization=0.85,
        **own,
    )
    return llm, module.SamplingParams


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
    for name, repeats in wanted_workloads(arguments):
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
    unknown = {name for name, _ in wanted_workloads(arguments)} - set(WORKLOADS)
    if unknown:
        parser.error(f"unknown workload {', '.join(unknown)}: known are {', '.join(WORKLOADS)}")
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
