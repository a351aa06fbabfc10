"""The messages by which a restarted core continues a request where it was cut off.

`Session` sends it when the core is back. Randomness is counter-based, by (seed, position), so all
that it takes is the effective seed and the tokens that have arrived. Deadlines go on counting from
when the request was made: the new core is told what is left of them.
"""

import msgspec

from nanovllm.frontend.request import Completion, Request
from nanovllm.protocol.messages import AddRequest, Finished, FinishReason
from nanovllm.protocol.plan import WorkerInfo

SEED_MASK = 2**63 - 1  # the core's: output i of a request runs with seed + i


def resumption(request: Request, now: float) -> list[AddRequest]:
    """Messages for all completions that have not ended. now: on `time.monotonic`'s clock.

    If nothing has arrived it is the first message again, whose `n` outputs share a prompt.
    Otherwise each completion, with what it has, becomes a request of its own.
    """
    unfinished = [one for one in request.completions if one.finish_reason is None]
    if not any(one.num_received for one in request.completions):
        return [_as_of(request.message, unfinished[0], now)]
    return [_as_of(_resumption_of(one), one, now) for one in unfinished]


def missed_end(completion: Completion, info: WorkerInfo, now: float) -> Finished | None:
    """The end a completion had reached if its last token has arrived, but the word of it has not;
    or that its time has run out while the core was away.

    Such a one must not be sent: it would run past its end.
    """
    params, message = completion.request.params, completion.request.message
    num_tokens = completion.num_received
    num_prompt_tokens = len(message.prompt_token_ids)
    reason: FinishReason | None = None
    stop_reason = None
    if num_tokens and num_tokens >= params.min_tokens:
        last = completion.last_token_id
        if last in params.stop_ids(info.eos_token_ids):
            reason, stop_reason = "stop", params.stop_reason(last, info.eos_token_ids)
    length_limit = params.length_limit(num_prompt_tokens, info.max_model_len)
    if reason is None and num_prompt_tokens + num_tokens >= length_limit:
        reason = "length"
    if reason is None and any(left <= 0 for left in _times_left(completion, now).values()):
        reason = "timeout"
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


def _times_left(completion: Completion, now: float) -> dict[str, float]:
    """Milliseconds until each deadline that can still be missed."""
    message = completion.request.message
    limits = {"deadline_ms": message.deadline_ms}
    if not completion.num_received:
        limits["ttft_deadline_ms"] = message.ttft_deadline_ms
    gone_ms = (now - completion.request.made_at) * 1e3
    return {name: limit - gone_ms for name, limit in limits.items() if limit is not None}


def _as_of(message: AddRequest, completion: Completion, now: float) -> AddRequest:
    left = _times_left(completion, now)
    return msgspec.structs.replace(
        message,
        deadline_ms=left.get("deadline_ms"),
        ttft_deadline_ms=left.get("ttft_deadline_ms"),
        is_suspect=bool(completion.deaths),
    )
