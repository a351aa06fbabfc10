"""How long a core takes from the start of its process to ready, phase by phase.

Each round is a fresh process, as a frontend starts one: with an empty Triton cache ("cold"), then
with the one it left ("warm"). After ready, the first requests show what was still left to do.
"""

import argparse
import os
import shutil
import tempfile
import time

from rich.console import Console
from rich.table import Table

from nanovllm import LLM, SamplingParams
from nanovllm.flags import add_config_flags, config_values

FIRST_ID = 10
PROMPT_LENS = (100, 17)  # tokens


def measure(settings: dict[str, object], batch_sizes: list[int]) -> dict[str, float]:
    """Seconds of one start, by phase, and of the first and second request of each batch size."""
    started = time.perf_counter()
    with LLM(skip_tokenizer_init=True, **settings) as llm:
        ready = time.perf_counter() - started
        phases = dict(llm.info.worker.phase_seconds)
        found = {**phases, "process, imports": ready - sum(phases.values()), "ready": ready}
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
        for size in batch_sizes:
            for name, length in zip(("first", "second"), PROMPT_LENS, strict=True):
                prompts = [
                    {"prompt_token_ids": [FIRST_ID + index % 50 + at for at in range(length)]}
                    for index in range(size)
                ]
                begun = time.perf_counter()
                llm.generate(prompts, params, use_tqdm=False)
                found[f"{name} batch of {size}"] = time.perf_counter() - begun
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 8, 64])
    add_config_flags(parser)
    arguments = parser.parse_args()
    settings = config_values(arguments)
    columns: dict[str, dict[str, float]] = {}
    for number in range(1, arguments.rounds + 1):
        cache = tempfile.mkdtemp(prefix="nanovllm-start-")
        os.environ["TRITON_CACHE_DIR"] = cache  # the core inherits it
        try:
            for kind in ("cold", "warm"):
                columns[f"{kind} {number}"] = measure(settings, arguments.batch_sizes)
        finally:
            shutil.rmtree(cache)
    table = Table("seconds", box=None)
    for name in columns:
        table.add_column(name, justify="right")
    for row in next(iter(columns.values())):
        table.add_row(row, *(f"{found.get(row, 0.0):.2f}" for found in columns.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
