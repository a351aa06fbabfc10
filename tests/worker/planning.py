"""Hand-made rows and plans for tests of the worker."""

from typing import Protocol

import numpy as np
import pytest
import torch

from nanovllm.protocol.plan import BlockAppend, NewRow, StepHandle, StepMasks, StepPlan
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.request_rows import RequestRows

BLOCK_SIZE = 4
VOCAB_SIZE = 200
EOS = 0
GREEDY = SamplingParams(temperature=0.0)
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CUDA = pytest.param("cuda", marks=NEEDS_GPU)
ON_A_CPU_ALONE = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU Triton's kernels take no tensors of the CPU"
)


class Executor(Protocol):
    """What runs steps: an executor, or a worker."""

    def submit(self, plan: StepPlan) -> StepHandle: ...

    def sample(self, step: int, masks: StepMasks | None) -> None: ...


def make_rows(
    *, vocab_size: int = VOCAB_SIZE, device: str = "cpu", blocks: tuple[int, ...] = (1,)
) -> RequestRows:
    return RequestRows(
        num_rows=8,
        max_model_len=64,
        block_size=BLOCK_SIZE,
        vocab_size=vocab_size,
        eos_token_ids=[EOS],
        device=torch.device(device),
        blocks=blocks,
    )


def new_row(
    row: int,
    token_ids: list[int],
    params: SamplingParams = GREEDY,
    *,
    num_prompt_tokens: int | None = None,
    block_ids: list[int] | None = None,
    seed: int = 0,
    bad_words_token_ids: list[list[int]] | None = None,
) -> NewRow:
    """A row whose blocks, unless given, are those of `blocks_of(row)` that its tokens need."""
    if block_ids is None:
        block_ids = blocks_of(row)[: -(-len(token_ids) // BLOCK_SIZE)]
    return NewRow(
        row=row,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids) if num_prompt_tokens is None else num_prompt_tokens,
        block_ids=block_ids,
        params=params,
        seed=seed,
        bad_words_token_ids=bad_words_token_ids or [],
    )


def rows_with_biases(turn: int, *, vocab_size: int = VOCAB_SIZE) -> list[NewRow]:
    """Greedy rows of the device's eight, at turn 0 all of them, then every third: each turn with
    one biased logit more, of other tokens. Row 0 has none."""
    found = []
    for row in range(8):
        if turn == 0 or row % 3 == turn % 3:
            bias = {(row + turn * 20 + i) % vocab_size: 10.0 + i for i in range(turn + 1)}
            params = SamplingParams(temperature=0.0, logit_bias=bias if row else {})
            found.append(new_row(row, [1], params))
    return found


def blocks_of(row: int) -> list[int]:
    """Sixteen blocks of the row's own, in no simple order."""
    return [1 + row * 16 + (index * 5) % 16 for index in range(16)]


def make_plan(
    step: int,
    entries: list[tuple[int, int, int]],
    *,
    new_rows: list[NewRow] | None = None,
    sampling: list[int] | None = None,
) -> StepPlan:
    """entries: (row, num_computed, num_scheduled); all sample unless `sampling` says otherwise.

    Rows get the blocks their tokens need beyond those a new row brings: one whenever a step starts
    a block.
    """
    brought = {new.row for new in new_rows or ()}
    appends = [
        BlockAppend(row, start // BLOCK_SIZE, blocks_of(row)[start // BLOCK_SIZE])
        for row, start, count in entries
        if row not in brought and count == 1 and start % BLOCK_SIZE == 0
    ]
    return StepPlan(
        step=step,
        new_rows=new_rows or [],
        block_appends=appends,
        rows=[row for row, _, _ in entries],
        num_computed=[start for _, start, _ in entries],
        num_scheduled=[count for _, _, count in entries],
        sampling=list(range(len(entries))) if sampling is None else sampling,
    )


def run_step(executor: Executor, plan: StepPlan, masks: StepMasks | None = None) -> StepHandle:
    """Both halves, one after the other."""
    handle = executor.submit(plan)
    executor.sample(plan.step, masks)
    return handle


def make_masks(
    allowed: dict[int, list[int]], *, vocab_size: int = VOCAB_SIZE, first_line: int = 0
) -> StepMasks | None:
    """index into `sampling` → the ids that may be sampled there. All lines are new, from the first
    one on."""
    if not allowed:
        return None
    bits = np.zeros((len(allowed), -(-vocab_size // 32) * 32), np.uint8)
    for line, token_ids in zip(bits, allowed.values(), strict=True):
        line[token_ids] = 1
    lines = list(range(first_line, first_line + len(allowed)))
    words = memoryview(np.packbits(bits, bitorder="little").tobytes())
    return StepMasks(list(allowed), lines, lines, words)
