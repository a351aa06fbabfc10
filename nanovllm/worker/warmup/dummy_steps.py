"""Steps that are run for what they cost, not for their tokens; only the padding row is touched.

`Worker` runs the heaviest one at its start, to see how much memory the allocator then holds; that
also compiles most kernels. While it has nothing else to do it goes through the shapes that CUDA
graphs come in, so that requests find them compiled and captured.
"""

from collections.abc import Iterator

from nanovllm.config import StepLimits
from nanovllm.protocol.plan import NewRow, StepPlan
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.model_runner import ModelRunner

PLAIN = SamplingParams(temperature=0.5)
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
    """The largest step and the usual least one: what all entries ask for, tokens of each."""
    num_entries, num_tokens = largest_step(limits, max_model_len=max_model_len)
    yield HEAVY, [num_tokens] * num_entries
    yield PLAIN, [1]


def rehearsals(runner: ModelRunner, limits: StepLimits, *, max_model_len: int) -> Iterator[None]:
    """Steps of every shape that runs by graph, one with each `next`."""
    for num_tokens, num_rows in runner.graph_shapes:
        if num_tokens > num_rows * (max_model_len - 1):
            continue
        each, more = divmod(num_tokens, num_rows)
        counts = [each + 1] * more + [each] * (num_rows - more)
        for _ in range(2):  # eagerly, which compiles; then it is captured
            run_step(runner, limits, PLAIN, counts=counts)
            yield


def largest_step(limits: StepLimits, *, max_model_len: int) -> tuple[int, int]:
    """How many entries it has, all of which sample, and of how many tokens each."""
    num_entries = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    # Fewer rows than the budget could fill: the largest step is all of them at full length, with
    # room for the sampled token.
    return num_entries, min(limits.max_num_batched_tokens // num_entries, max_model_len - 1)


def run_step(
    runner: ModelRunner, limits: StepLimits, params: SamplingParams, *, counts: list[int]
) -> None:
    """One step in which every entry is the padding row, with so many tokens from its first on."""
    padding, num_entries = limits.max_num_seqs, len(counts)
    new = NewRow(padding, [0], 1, [], params, 0, [])
    entries, zeros = [padding] * num_entries, [0] * num_entries
    plan = StepPlan(0, [new], [], entries, zeros, counts, list(range(num_entries)))
    runner.execute(plan).result()
