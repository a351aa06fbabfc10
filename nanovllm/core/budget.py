"""How many tokens a step may hold; `Scheduler` asks before each.

All of it is prompts' while nobody decodes. Whoever decodes waits for the prompts beside it, and
whoever does not yet wants them done at once: between these two the budget is shared out by heads.
"""

from collections.abc import Collection

from nanovllm.config import StepLimits
from nanovllm.core.sequence import Sequence


def token_budget(limits: StepLimits, running: Collection[Sequence], *, num_admissible: int) -> int:
    """Tokens of the next step. num_admissible: waiting sequences for which there is a row."""
    most = limits.max_num_batched_tokens
    num_decoding = sum(one.num_computed >= one.num_prompt_tokens for one in running)
    num_ended = sum(one.num_computed >= one.max_total - 1 for one in running)
    num_decoding -= num_ended  # all they may sample is sampled, or on its way
    num_others = len(running) - num_ended - num_decoding + num_admissible
    for_prompts = most
    while num_others < num_decoding and for_prompts > limits.mixed_prefill_tokens:
        for_prompts = max(for_prompts // 2, limits.mixed_prefill_tokens)
        num_others *= 2
    return min(most, num_decoding + for_prompts)
