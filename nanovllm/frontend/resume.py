"""What to ask of a core that knows nothing, so that a request goes on where it was cut off.

`Session` sends it when the core is back. Randomness is counter-based, by (seed, position), so all
that it takes is the effective seed and the tokens that have arrived.
"""

import msgspec

from nanovllm.frontend.request import Completion, Request
from nanovllm.protocol import AddRequest, Finished, FinishReason, WorkerInfo

SEED_MASK = 2**63 - 1  # the core's: output i of a request runs with seed + i


def resumption(request: Request) -> list[AddRequest]:
    """Messages for all completions that have not ended.

    If nothing has arrived it is the first message again, whose `n` outputs share a prompt.
    Otherwise each completion, with what it has, becomes a request of its own.
    """
    unfinished = [one for one in request.completions if one.finish_reason is None]
    if not any(one.num_received for one in request.completions):
        return [request.message]
    return [_resumption_of(one) for one in unfinished]


def missed_end(completion: Completion, info: WorkerInfo) -> Finished | None:
    """The end a completion had reached if its last token has arrived, but the word of it has not.

    Such a one must not be sent: it would run past its end.
    """
    params, message = completion.request.params, completion.request.message
    num_tokens = completion.num_received
    reason: FinishReason | None = None
    stop_reason = None
    if num_tokens and num_tokens >= params.min_tokens:
        last = completion.last_token_id
        is_eos = last in info.eos_token_ids and not params.ignore_eos
        if is_eos or last in params.stop_token_ids:
            reason, stop_reason = "stop", None if is_eos else last
    num_known = len(message.prompt_token_ids) + num_tokens
    at_cap = params.max_tokens is not None and num_tokens >= params.max_tokens
    if reason is None and (at_cap or num_known >= info.max_model_len):
        reason = "length"
    return None if reason is None else Finished(completion.number, reason, stop_reason, 0)


def _resumption_of(completion: Completion) -> AddRequest:
    message = completion.request.message
    params, index = message.params, completion.index
    # The whole prompt had been run when the first token of the first completion came.
    reported = index > 0 or completion.num_received > 0
    params = msgspec.structs.replace(
        params,
        n=1,
        seed=None if params.seed is None else (params.seed + index) & SEED_MASK,
        prompt_logprobs=None if reported else params.prompt_logprobs,
    )
    return msgspec.structs.replace(
        message,
        number=completion.number,
        params=params,
        output_token_ids=completion.received_token_ids(),
    )
