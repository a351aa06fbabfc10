"""What the server answers: the JSON shapes of OpenAI's API, with vLLM's additions.

Encoded by msgspec as they are; the OpenAPI document is derived from them. A field that is `UNSET`
is left out. Requests are in `requests.py`.
"""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

FinishReasonName = Literal["stop", "length", "tool_calls"]


class ErrorDetails(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(msgspec.Struct):
    """The body of every answer that is not a success; also an event within a stream."""

    error: ErrorDetails


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int = 0


class Usage(msgspec.Struct):
    """cached_tokens: prompt tokens whose KV was reused."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(msgspec.Struct):
    logprob: float
    rank: int
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None]  # token id, as text → its log-probability


# ---- chat completions


class Function(msgspec.Struct):
    """`arguments` is JSON as the model wrote it."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    id: str
    function: Function
    type: Literal["function"] = "function"


class FunctionDelta(msgspec.Struct):
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallDelta(msgspec.Struct):
    """id, type and name come with the first delta of a call."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob] | None
    refusal: None = None


class AssistantMessage(msgspec.Struct):
    """reasoning_content: what the model wrote between its thinking tags."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName | None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Delta(msgspec.Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReasonName | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct):
    """One event of a stream. The last has no choices but the usage, if that was asked for."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


# ---- completions


class CompletionLogprobs(msgspec.Struct):
    """Parallel lists, one entry per token; a prompt's first token (with echo) has none."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(msgspec.Struct):
    """Also in the events of a stream, where it holds what is new. error: why the prompt has no
    answer, where others of its batch have one; finish_reason is "error" then."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReasonName | Literal["error"] | None
    stop_reason: int | str | None = None
    error: ErrorDetails | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(msgspec.Struct):
    """Also one event of a stream. The last has no choices but the usage, if asked for."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: Usage | UnsetType | None = UNSET


# ---- the rest


class ModelCard(msgspec.Struct):
    id: str
    created: int
    root: str
    max_model_len: int
    default_sampling_params: dict[str, int | float]  # where a request leaves a field out
    object: Literal["model"] = "model"
    owned_by: str = "nanovllm"
    parent: None = None


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class Tokens(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(msgspec.Struct):
    prompt: str


class ApiRoot(msgspec.Struct):
    """What `/v1` is, for who opens it; links are relative to it."""

    about: str
    page: str
    docs: str
    openapi: str
    models: str
    chat: str


class Version(msgspec.Struct):
    version: str


class Health(msgspec.Struct):
    """`status`: loading, ready, draining, stalled or dead. `since_progress_s`: since the core was
    last heard of."""

    status: str
    phase: str | None = None
    progress: float | None = None
    since_progress_s: float | None = None
    details: dict[str, Any] | UnsetType = UNSET
