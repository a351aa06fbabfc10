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
    if num_decoding == 0:
        return most
    num_heads = len(running) + num_admissible
    share = most * (num_heads - num_decoding) // num_heads
    return min(most, num_decoding + max(share, limits.mixed_prefill_tokens))
