"""The messages between frontend and core: tagged unions, `ToCore` and `FromCore`.

msgspec structs, encoded as MessagePack; nothing is ever pickled. No torch here.
A *number* is a client's own id of one output sequence: a request with `n` outputs owns the
numbers `number … number + n - 1`. What viewers are shown is in `watch.py`.
"""

from typing import Literal

import msgspec

from nanovllm.protocol.plan import PositionLogprobs, TokenLogprobs, WorkerInfo
from nanovllm.protocol.watch import BlockContents, Observation, Observe, ShowBlock
from nanovllm.sampling_params import SamplingParams

PROTOCOL_VERSION = 6
HEARTBEAT_INTERVAL_S = 2.0
STATUS_INTERVAL_S = 1.0
PULSE_INTERVAL_S = 0.25
STALL_S = 6 * PULSE_INTERVAL_S  # of silence: a ready core speaks once a PULSE_INTERVAL_S
MAX_PACE_S = 60.0  # for which one `SetPace` may hold a core
FinishReason = Literal["stop", "length", "abort", "timeout", "error"]
FailureCause = Literal["engine", "request", "grammar"]


# ---- frontend -> core


class Hello(msgspec.Struct, frozen=True, tag=True):
    """First message of a client; answered by `Loading` (repeatedly) and then one `Welcome`."""

    protocol_version: int = PROTOCOL_VERSION


class AddRequest(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """One request. `output_token_ids` were generated before (preemption, resume, replay).

    `bad_words_token_ids` are the token sequences of `params.bad_words`, encoded by the frontend.
    `tenant`: who shares fairly with whom; by default each client is a tenant of its own.
    Counted from its arrival at the core, a sequence without a token after `ttft_deadline_ms`, or
    unfinished after `deadline_ms`, ends with reason "timeout". Sent again after the core's death,
    a request has what is left of them. `is_suspect`: it had got nowhere when a core died, so it
    begins only after a `TrialOffered`.
    """

    number: int
    prompt_token_ids: list[int]
    params: SamplingParams
    output_token_ids: list[int] = []
    bad_words_token_ids: list[list[int]] = []
    priority: int = 0
    cache_salt: str | None = None
    tenant: str | None = None
    deadline_ms: float | None = None
    ttft_deadline_ms: float | None = None
    is_suspect: bool = False


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Stop these sequences; each still unfinished one is answered with reason "abort"."""

    numbers: list[int]


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Renews the client's lease, as any message does."""


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """The client leaves; its requests are aborted and nothing more is sent to it."""


class TrialAccepted(msgspec.Struct, frozen=True, tag=True):
    """Answers `TrialOffered`: the client will know, should the core die of this request."""

    number: int


class TrialOver(msgspec.Struct, frozen=True, tag=True):
    """The client has seen this request get its first token since it was sent, or end."""

    number: int


class DeathsExplained(msgspec.Struct, frozen=True, tag=True):
    """These lives of the core ended by requests of this client that will not be sent again."""

    epochs: list[str]


class ResetPrefixCache(msgspec.Struct, frozen=True, tag=True):
    """Forget all cached blocks. Result: True, or False if blocks in use made it partial."""


class SetPace(msgspec.Struct, frozen=True, tag=True):
    """Hold the engine, let it take some steps, or slow it down, to look at it. Result: True.

    `num_steps` more steps may begin (0: none for now; None: as many as there are), each
    `interval_ms` after the one before. That holds for `for_s` seconds, and ends earlier with the
    client that asked or when the core drains; asking again renews it. Only of a core with
    `allow_debug`.
    """

    num_steps: int | None = None
    interval_ms: float = 0.0
    for_s: float = 30.0


Operation = ResetPrefixCache | Observe | ShowBlock | SetPace
Answer = bool | Observation | BlockContents


class Call(msgspec.Struct, frozen=True, tag=True):
    """A typed operation; answered by the `CallResult` with the same `call_id`."""

    call_id: int
    operation: Operation


ToCore = (
    Hello
    | AddRequest
    | Abort
    | Heartbeat
    | Goodbye
    | Call
    | TrialAccepted
    | TrialOver
    | DeathsExplained
)


# ---- core -> frontend


class Loading(msgspec.Struct, frozen=True, tag=True):
    """The core is not ready yet: what it does, and how far that is in [0, 1]."""

    phase: str
    progress: float


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The core is ready and knows the client. `epoch` names this life of the core.

    `served_model_name` is what answers say; requests may use one of the others as well.
    `after_crash_of`: the epoch of the life before at this address, if that failed by itself.
    """

    client_id: int
    epoch: str
    model: str
    served_model_name: str
    block_size: int
    max_num_seqs: int
    worker: WorkerInfo
    other_served_names: list[str] = []
    after_crash_of: str = ""


class Started(msgspec.Struct, frozen=True, array_like=True):
    """A sequence ran for the first time."""

    number: int
    num_cached_tokens: int
    queued_ms: float


class Why(msgspec.Struct, frozen=True, array_like=True):
    """Why a sequence took as long as it did, as the core saw it; times since its arrival there.

    `seats_ms`, `budget_ms` and `kv_ms` are the parts of its waiting for which admission was held up
    by `max_num_seqs`, by `max_num_batched_tokens` and by lack of KV blocks. `num_recomputed_tokens`
    were computed before a preemption took their KV, `num_forced_tokens` of the output were not
    sampled, since its grammar left no choice. `ttft_ms` is None without a token,
    `inter_token_ms` (the mean) without a second one.
    """

    queued_ms: float
    seats_ms: float
    budget_ms: float
    kv_ms: float
    num_cached_tokens: int
    num_preemptions: int
    num_recomputed_tokens: int
    ttft_ms: float | None
    inter_token_ms: float | None
    num_forced_tokens: int = 0


class Finished(msgspec.Struct, frozen=True, array_like=True):
    """A sequence ended. `stop_reason`: the stop token id, if one of `stop_token_ids` ended it.

    `last_is_text`: a grammar was complete with the last token, which is no EOS or stop token then.
    """

    number: int
    reason: FinishReason
    stop_reason: int | None
    num_preemptions: int
    last_is_text: bool = False
    why: Why | None = None


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of some next prompt tokens, in order; position 0 has none."""

    number: int
    logprobs: PositionLogprobs


class Outputs(msgspec.Struct, tag=True, omit_defaults=True):
    """What one step (or several, merged) brought one client.

    `numbers[i]` got the new token `token_ids[i]`; a number may occur more than once. `logprobs`
    is empty or maps an index i to that token's log-probabilities. `finished` comes after tokens.
    """

    numbers: list[int] = []
    token_ids: list[int] = []
    logprobs: dict[int, TokenLogprobs] = {}
    prompt_logprobs: list[PromptLogprobs] = []
    started: list[Started] = []
    finished: list[Finished] = []


class RequestFailed(msgspec.Struct, frozen=True, tag=True):
    """Only this sequence failed. `number` is -1 if the frame was too bad to tell which.

    `cause`: the request cannot be honoured as it is, or what its output must be cannot be compiled
    or followed ("grammar"); else the engine is at fault.
    """

    number: int
    message: str
    cause: FailureCause = "engine"


class Overloaded(msgspec.Struct, frozen=True, tag=True):
    """This request was refused; nothing of it runs. `draining`: the core is about to end."""

    number: int
    retry_after_s: float
    draining: bool = False


class TrialOffered(msgspec.Struct, frozen=True, tag=True):
    """This suspect may begin, and nothing else will: say `TrialAccepted`, and later `TrialOver`."""

    number: int


class Detached(msgspec.Struct, frozen=True, tag=True):
    """The core does not know the client (any more), and runs nothing for it: say `Hello`."""

    reason: str


class CoreStatus(msgspec.Struct, frozen=True, tag=True):
    """Sent once a second to every client, the same to all. Counters count from the core's start.

    It tells of progress: `step` has moved on, or there was nothing to do, or `stalled_s` says for
    how long no step has finished although there was. A loop that is stuck sends none at all, and no
    `Pulse` either; but within `patience_s` it may just be busy, as in `Pulse`.
    `num_waiting` includes those not yet started, which alone count in `num_queued…`; `num_paused`
    wait for their client to read. `loop_cpu_s` is CPU time of the loop's thread, `messaging_cpu_s`
    the part of it outside of steps: receiving, decoding, sorting, encoding, sending.
    `num_forced_tokens`: of the generation tokens, those that a grammar left no choice about.
    `explained_epochs`: lives before this one that clients say were ended by a request of theirs.
    `is_held`: no step begins until somebody says so (`SetPace`); that is no stall.
    """

    epoch: str
    step: int
    last_step_ms: float
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_clients: int
    num_preemptions: int
    num_prompt_tokens: int
    num_generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_paused: int = 0
    num_queued: int = 0
    num_queued_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_failed_steps: int = 0
    num_failed: int = 0
    num_timeouts: int = 0
    num_overloaded: int = 0
    num_expired_clients: int = 0
    uptime_s: float = 0.0
    stalled_s: float = 0.0
    loop_cpu_s: float = 0.0
    messaging_cpu_s: float = 0.0
    draining: bool = False
    explained_epochs: list[str] = []
    num_forced_tokens: int = 0
    patience_s: float = 0.0
    is_held: bool = False


class Pulse(msgspec.Struct, frozen=True, tag=True):
    """Between two `CoreStatus`, from the loop that also runs the steps: it is not stuck.

    patience_s: how long the loop may now be silent without being stuck, because its recent steps
    took long or it compiles kernels. 0: no longer than it always may.
    """

    patience_s: float = 0.0


class CallResult(msgspec.Struct, frozen=True, tag=True):
    """`error` is None, or why the call failed. `is_refused`: the client's key does not allow it."""

    call_id: int
    result: Answer | None = None
    error: str | None = None
    is_refused: bool = False


class CoreFailed(msgspec.Struct, frozen=True, tag=True):
    """The core dies of this; sent to every client, also while loading.

    `usage`: the user's configuration is at fault (a `ValueError` at the frontend), not the engine.
    `from_outside`: no request can have been the cause.
    """

    message: str
    details: str
    usage: bool = False
    from_outside: bool = False


FromCore = (
    Loading
    | Welcome
    | Outputs
    | RequestFailed
    | Overloaded
    | TrialOffered
    | CoreStatus
    | Pulse
    | CallResult
    | Detached
    | CoreFailed
)
