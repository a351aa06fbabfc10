"""What a caller gets: names and meanings are vLLM's.

Made by `Request`; yielded by `AsyncLLM`, returned by `LLM`. Every output is a snapshot of its own:
nothing in it changes later.
"""

import msgspec

from nanovllm.protocol.messages import FinishReason, Why


class Logprob(msgspec.Struct, frozen=True, gc=False):
    """A token's natural-log probability, and its rank among all tokens, from 1."""

    logprob: float
    rank: int
    decoded_token: str | None


TokenAlternatives = dict[int, Logprob]  # token id → log-probability; the token itself comes first


class CompletionOutput(msgspec.Struct):
    """One of the `n` outputs of a request.

    With output_kind "delta", text, token_ids and logprobs are only what is new since the last
    output; otherwise all so far. cumulative_logprob: of all tokens so far, if logprobs were asked
    for. finish_reason: None while it runs. stop_reason: the stop string or stop token id that
    ended it; None for EOS.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenAlternatives] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


class RequestMetrics(msgspec.Struct):
    """Times are seconds since the epoch, as seen by the frontend; the rest is the core's.

    With n > 1, num_… count all outputs together; why tells of each, by index, once it has finished
    there: what it waited for, what preemption cost it, how fast it ran (see `protocol.Why`).
    num_forced_tokens: generated ones that were not sampled, since a grammar left no choice.
    num_resumes: how often the request was continued by another core after its own had died.
    """

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    queued_ms: float | None = None
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    num_generation_tokens: int = 0
    num_forced_tokens: int = 0
    num_resumes: int = 0
    why: dict[int, Why] = {}


class RequestOutput(msgspec.Struct):
    """A request so far. `outputs` holds, by index, what this output has news of ("delta": only
    those with something new).

    prompt_logprobs: one entry per prompt token, None for the first; with "delta", only in the first
    output. num_cached_tokens: prompt tokens whose KV was reused.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[TokenAlternatives | None] | None = None
    num_cached_tokens: int | None = None
