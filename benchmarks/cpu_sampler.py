"""What one row's wishes cost a step on a CPU: the native sampler beside the plain one in torch.

    python benchmarks/cpu_sampler.py [--rows 8 --threads 1 --vocab-size 49152]

Rows have a prompt of 200 tokens and 100 of output. Printed are microseconds a row, the least of
`--turns` calls by each in turn, and ids are compared.
"""

import argparse
import random
import time
from typing import Any

import numpy as np
import torch
from workloads import ASKS, GRAMMARS, TEXTS

from nanovllm import SamplingParams
from nanovllm.protocol.plan import NewRow, StepMasks, StepPlan
from nanovllm.worker.kernels.native import library as native
from nanovllm.worker.kernels.native.sampler import NativeSampler
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling.sampler import Sampler, SamplingTargets

PROMPT, LENGTH = 200, 300
ALLOWED = 0.3  # of the ids, by a mask

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    **{name: fields for name, fields in ASKS.items() if not (GRAMMARS | TEXTS) & set(fields)},
    "mask": {},
    "mask and all": ASKS["penalties"] | ASKS["logprobs"] | ASKS["bias"],
}
del CASES["prompt_logprobs"]


def admitted(num_rows: int, vocab_size: int, fields: dict[str, Any]) -> RequestRows:
    """Rows that all ask for these."""
    rows = RequestRows(
        num_rows=num_rows,
        max_model_len=2 * LENGTH,
        block_size=16,
        vocab_size=vocab_size,
        eos_token_ids=[0],
        device=torch.device("cpu"),
    )
    drawn = random.Random(0)
    new_rows = [
        NewRow(
            row=row,
            token_ids=[drawn.randrange(vocab_size) for _ in range(LENGTH)],
            num_prompt_tokens=PROMPT,
            block_ids=[],
            params=SamplingParams(temperature=0.8, max_tokens=LENGTH, **fields),
            seed=row,
            bad_words_token_ids=[],
        )
        for row in range(num_rows)
    ]
    plan = StepPlan(
        step=0,
        new_rows=new_rows,
        block_appends=[],
        rows=[],
        num_computed=[],
        num_scheduled=[],
        sampling=[],
    )
    rows.write(torch.from_numpy(rows.record(plan)))
    return rows


def measure(name: str, num_rows: int, vocab_size: int, turns: int) -> tuple[float, float]:
    """Microseconds a row: native, and plain."""
    rows = admitted(num_rows, vocab_size, CASES[name])
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 3
    positions = np.full(num_rows, LENGTH, np.int32)
    every = np.arange(num_rows, dtype=np.int32)
    targets = SamplingTargets.of(every, positions, torch.device("cpu"))
    masks = None
    if name.startswith("mask"):
        bits = np.random.default_rng(0).random((num_rows, -(-vocab_size // 32) * 32)) < ALLOWED
        packed = np.packbits(bits, axis=1, bitorder="little")
        lines = list(range(num_rows))
        masks = StepMasks(lines, lines, lines, memoryview(packed.tobytes()))
        rows.masks.take(masks)
    samplers = Sampler(rows, NativeSampler(rows)), Sampler(rows)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(turns):
        chosen = []
        for sampler, found in zip(samplers, times, strict=True):
            edited = logits.clone()
            started = time.perf_counter()
            chosen.append(sampler.sample(edited, targets, masks).token_ids)
            found.append(time.perf_counter() - started)
        assert chosen[0].equal(chosen[1])
    least = [min(found) / num_rows * 1e6 for found in times]
    return least[0], least[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--turns", type=int, default=20)
    args = parser.parse_args()
    native.use(native.choose_isa(), num_threads=args.threads)
    torch.set_num_threads(args.threads)
    print(f"{args.rows} rows, {args.vocab_size} ids, {native.in_use()}: microseconds a row")
    print(f"{'':16}{'native':>8}{'torch':>8}")
    for name in CASES:
        ours, plain = measure(name, args.rows, args.vocab_size, args.turns)
        print(f"{name:16}{ours:8.0f}{plain:8.0f}", flush=True)


if __name__ == "__main__":
    main()
