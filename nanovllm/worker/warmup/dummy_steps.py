"""Steps that are run for what they cost, not for their tokens; only the padding row is touched.

`Worker` runs the heaviest one at its start, to see how much memory the allocator then holds; that
also compiles most kernels. Before requests come, and while it has nothing else to do, it goes
through the shapes that CUDA graphs come in, so that requests find them compiled and captured.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from nanovllm.config import StepLimits
from nanovllm.protocol.plan import NewRow, StepMasks, StepPlan, num_mask_lines
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.cuda_graph import StepShape
from nanovllm.worker.model_runner import ModelRunner

PLAIN = SamplingParams(temperature=0.5)
EDITS: tuple[dict[str, Any], ...] = (
    {},  # for a grammar
    {"repetition_penalty": 1.1},
    {"logit_bias": {0: 1.0}},
    {"repetition_penalty": 1.1, "logit_bias": {0: 1.0}},
)
TOLD = SamplingParams(temperature=0.5, logprobs=5)
# What rows may ask of the second half of a step, and whether a grammar masks them: each runs other
# kernels, by a graph that is the same for any number of rows that has one.
KINDS = (
    *((SamplingParams(temperature=0.5, **edits), not edits) for edits in EDITS),
    (TOLD, False),
    *((SamplingParams(temperature=0.5, logprobs=5, **edits), not edits) for edits in EDITS),
)
# Of steps that first requests are likely to want: rows where they decode, tokens where prompts come
# (of few rows), each of which can stand in for smaller ones.
USUAL_ROWS = (1, 8, 64)
USUAL_TOKENS = (256, 512, 1024)
SHORT_PROMPT = 48
# Asks for every operation of the sampler.
HEAVY = SamplingParams(
    top_p=0.9,
    top_k=1000,
    min_p=0.01,
    repetition_penalty=1.1,
    logprobs=20,
    logit_bias={0: 1.0},
    min_tokens=1,
)


def run_heaviest_step(runner: ModelRunner, limits: StepLimits, *, max_model_len: int) -> None:
    """Let the allocator take what the largest step needs."""
    for params, counts in heaviest_steps(limits, max_model_len=max_model_len):
        run_step(runner, limits, params, counts=counts)


def heaviest_steps(
    limits: StepLimits, *, max_model_len: int
) -> Iterator[tuple[SamplingParams, list[int]]]:
    """The largest step, the usual least one and that of a short prompt, which runs kernels of its
    own: what all entries ask for, tokens of each."""
    num_entries, num_tokens = largest_step(limits, max_model_len=max_model_len)
    yield HEAVY, [num_tokens] * num_entries
    yield PLAIN, [1]
    most = max(1, limits.max_num_batched_tokens // 2)  # never the largest step's size
    yield PLAIN, [min(SHORT_PROMPT, most, max_model_len - 1)]


def warm_up_steps(runner: ModelRunner, limits: StepLimits, *, max_model_len: int) -> Iterator[None]:
    """Steps of every shape that runs by graph, one with each `next`; what is wanted soonest first:
    `num_usual` of them."""
    shapes = runner.graph_shapes
    possible = [one for one in shapes if one.num_tokens <= one.num_rows * (max_model_len - 1)]
    usual = _usual(possible)
    others = [shape for shape in possible if shape not in usual]
    if usual:
        yield from _twice(runner, limits, usual)
        decode = [shape for shape in usual if shape.is_decode]
        for params, is_masked in KINDS:
            yield from _twice(runner, limits, decode[:1], params, is_masked=is_masked)
    yield from _twice(runner, limits, sorted(others, key=_how_late))


def num_usual(runner: ModelRunner) -> int:
    """Of the warm-up steps, those that should come before any request, where that takes little."""
    shapes = runner.graph_shapes
    return 2 * (len(_usual(shapes)) + len(KINDS)) if shapes else 0


def _usual(shapes: list[StepShape]) -> list[StepShape]:
    """Of all shapes, in their order."""
    few = min((one.num_rows for one in shapes if not one.is_decode), default=0)
    wanted = {(size, size) for size in USUAL_ROWS} | {(size, few) for size in USUAL_TOKENS}
    return [shape for shape in shapes if shape in wanted]


def _how_late(shape: StepShape) -> tuple[bool, bool, int]:
    """Sorts by how soon a shape should be captured: first a few of which one holds any step and at
    most doubles it, so that it can stand in for those that are not captured yet."""
    is_coarse = shape.num_tokens.bit_count() == 1
    return not is_coarse, not shape.is_decode, -shape.num_rows


def _twice(
    runner: ModelRunner,
    limits: StepLimits,
    shapes: list[StepShape],
    params: SamplingParams = PLAIN,
    *,
    is_masked: bool = False,
) -> Iterator[None]:
    """Eagerly, which compiles; then it is captured."""
    for num_tokens, num_rows in shapes:
        each, more = divmod(num_tokens, num_rows)
        counts = [each + 1] * more + [each] * (num_rows - more)
        for _ in range(2):
            run_step(runner, limits, params, counts=counts, is_masked=is_masked)
            yield


def largest_step(limits: StepLimits, *, max_model_len: int) -> tuple[int, int]:
    """How many entries it has, all of which sample, and of how many tokens each."""
    num_entries = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    # Fewer rows than the budget could fill: the largest step is all of them at full length, with
    # room for the sampled token.
    return num_entries, min(limits.max_num_batched_tokens // num_entries, max_model_len - 1)


def run_step(
    runner: ModelRunner,
    limits: StepLimits,
    params: SamplingParams,
    *,
    counts: list[int],
    is_masked: bool = False,
) -> None:
    """One step in which every entry is the padding row, with so many tokens from its first on.

    is_masked: by a mask that allows every id, in a line in which the core keeps none.
    """
    padding, num_entries = limits.max_num_seqs, len(counts)
    new = NewRow(padding, [0], 1, [], params, 0, [])
    entries, zeros = [padding] * num_entries, [0] * num_entries
    sampling = list(range(num_entries))
    plan = StepPlan(0, [new], [], entries, zeros, counts, sampling)
    masks = None
    if is_masked:
        last = num_mask_lines(vocab_size=runner.vocab_size, max_num_seqs=limits.max_num_seqs) - 1
        words = np.full(-(-runner.vocab_size // 32), -1, np.int32)
        masks = StepMasks(sampling, [last] * num_entries, [last], words.view(np.uint8).data)
    runner.execute(plan, masks, is_practice=True).result()
