"""How many tokens a step may hold; `Scheduler` asks before each.

All of it is prompts' while nobody decodes. Whoever decodes waits for the prompts beside it, and
whoever does not yet wants them done at once: the more of the former there are for each of the
latter, the fewer prompt tokens a step takes. By halves, so that steps come in few sizes.
"""

from collections.abc import Collection

from nanovllm.config import StepLimits
from nanovllm.core.sequence import Sequence


def token_budget(limits: StepLimits, running: Collection[Sequence], *, num_admissible: int) -> int:
    """Tokens of the next step. num_admissible: waiting sequences for which there is a row."""
    most = limits.max_num_batched_tokens
    # `has_computed_prompt`, spelled out: as a property it costs a step of 256 sequences 8 µs more.
    num_prompts = sum(one.num_computed < one.num_prompt_tokens for one in running)
    if num_prompts + num_admissible == 0:
        return most  # for nobody
    # The last token of some is sampled, or on its way.
    num_ended = sum(one.num_computed >= one.max_total - 1 for one in running)
    num_decoding = len(running) - num_prompts - num_ended
    num_others, for_prompts = num_prompts + num_admissible, most
    while num_others < num_decoding and for_prompts > limits.mixed_prefill_tokens:
        for_prompts = max(for_prompts // 2, limits.mixed_prefill_tokens)
        num_others *= 2
    return min(most, num_decoding + for_prompts)
