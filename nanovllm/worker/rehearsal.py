"""Steps that are run for what they cost, not for their tokens; only the padding row is touched.

`Worker` runs the heaviest one at its start, to see how much memory the allocator then holds; that
also compiles most kernels.
"""

from nanovllm.config import StepLimits
from nanovllm.protocol import NewRow, StepPlan
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.model_runner import ModelRunner

# Asks for every operation of the sampler that takes much memory.
HEAVY = SamplingParams(top_p=0.9, top_k=1000, min_p=0.01, repetition_penalty=1.1, logprobs=20)


def run_heaviest_step(runner: ModelRunner, limits: StepLimits, *, max_model_len: int) -> None:
    """Let the allocator take what the largest step needs."""
    num_entries, num_tokens = largest_step(limits, max_model_len=max_model_len)
    run_step(runner, limits, HEAVY, num_entries=num_entries, num_tokens=num_tokens)
    run_step(runner, limits, SamplingParams(temperature=0.0), num_entries=1, num_tokens=1)


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
    num_entries: int,
    num_tokens: int,
) -> None:
    """One step in which every entry is the padding row, from its first token on."""
    padding = limits.max_num_seqs
    new = NewRow(padding, [0], 1, [], params, 0, [])
    entries, zeros, counts = [padding] * num_entries, [0] * num_entries, [num_tokens] * num_entries
    runner.execute(
        StepPlan(0, [new], [], entries, zeros, counts, list(range(num_entries)))
    ).result()
