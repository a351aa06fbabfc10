"""What the server takes: OpenAI's request fields and vLLM's additions, as msgspec structs.

Decoding is the check of names and types, so an unknown field is refused by name unless it is null;
values are checked by `SamplingParams`, and what only some values of can be honoured by
`sampling.py`. Of messages, which clients replay with all that they know of them, the rest is left.
"""

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from nanovllm.frontend.server.api_errors import (
    from_decoding,
    from_value_error,
    is_of_unknown_field,
)
from nanovllm.limits import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_DETOKENIZED,
    MAX_LOGIT_BIAS,
    MAX_MESSAGES,
    MAX_METADATA,
    MAX_NAME_CHARS,
    MAX_PARTS,
    MAX_PROMPT_CHARS,
    MAX_REQUEST_ID_CHARS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
    MAX_TOOLS,
    check_json,
)

NumChoices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
Name = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
Stops = Annotated[list[str], Meta(max_length=MAX_STOPS)]
StopTokenIds = Annotated[list[int], Meta(max_length=MAX_STOP_TOKEN_IDS)]
AllowedTokenIds = Annotated[list[int], Meta(max_length=MAX_ALLOWED_TOKEN_IDS)]
LogitBias = Annotated[dict[int, float], Meta(max_length=MAX_LOGIT_BIAS)]
BadWord = Annotated[str, Meta(max_length=MAX_BAD_WORD_CHARS)]
BadWords = Annotated[list[BadWord], Meta(max_length=MAX_BAD_WORDS)]
Deadline = Annotated[float, Meta(gt=0)]
Text = Annotated[str, Meta(max_length=MAX_PROMPT_CHARS)]
# Printable ASCII; what follows the class shuts out the newline that Python's `$` lets pass.
RequestId = Annotated[
    str, Meta(min_length=1, max_length=MAX_REQUEST_ID_CHARS, pattern=r"^[ -~]+$(?!\n)")
]


# Fields whose JSON is the client's own.
OPAQUE = {"arguments", "chat_template_kwargs", "documents", "json", "parameters", "schema"}
NO_BODY = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The JSON body of a request."""


class Replayed(msgspec.Struct, kw_only=True):
    """A part of the conversation so far. Unknown fields ask for nothing."""


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class JsonSchemaFormat(Body):
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None

    def __post_init__(self) -> None:
        check_json("schema", self.schema)


class ResponseFormat(Body):
    """OpenAI's; `json_schema` goes with the type of the same name."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Body):
    """vLLM's: exactly one of them."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        check_json("json", self.json)


class GenerationBody(Body):
    """What both completion endpoints take. None is always "not given"."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: NumChoices | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | Stops | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: LogitBias | None = None
    response_format: ResponseFormat | None = None
    user: Annotated[Name | None, Meta(description="whom it counts for if users share fairly")] = (
        None
    )
    # hints for caching, billing and abuse, which change no answer
    service_tier: Name | None = None
    metadata: Annotated[dict[Name, Any], Meta(max_length=MAX_METADATA)] | None = None
    moderation: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: StopTokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    allowed_token_ids: AllowedTokenIds | None = None
    bad_words: BadWords | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=1)] | None = None
    structured_outputs: StructuredOutputs | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    priority: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    request_id: RequestId | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    logits_processors: Any = None
    kv_transfer_params: Any = None
    vllm_xargs: Any = None
    # ours
    deadline_ms: Deadline | None = None
    ttft_deadline_ms: Deadline | None = None


class CompletionBody(GenerationBody, kw_only=True):
    """`prompt`: a text, token ids, or a list of either."""

    prompt: str | list[int | str | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None


class ContentPart(Replayed):
    type: Name
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Replayed):
    name: Name
    arguments: str | dict[str, Any] | None = None


class MadeCall(Replayed):
    function: CalledFunction
    id: Name | None = None
    type: Literal["function"] | None = None


class ChatMessage(Replayed):
    """One message of the conversation. audio, function_call, partial, prefix: refused unless they
    ask for nothing."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[str | ContentPart], Meta(max_length=MAX_PARTS)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[MadeCall], Meta(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Name | None = None
    reasoning_content: str | None = None
    reasoning: Any = None
    refusal: str | None = None
    function_call: Any = None
    audio: Any = None
    partial: Any = None
    prefix: Any = None
    annotations: Any = None

    def __post_init__(self) -> None:
        if self.annotations is not None:
            check_json("annotations", self.annotations)


class FunctionDefinition(Body):
    name: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    cache_control: Any = None

    def __post_init__(self) -> None:
        check_json("parameters", self.parameters)


class Tool(Body):
    function: FunctionDefinition
    type: Literal["function"] = "function"
    cache_control: Any = None


class FunctionName(Body):
    name: Name


class NamedTool(Body):
    function: FunctionName
    type: Literal["function"] = "function"


Messages = Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
Tools = Annotated[list[Tool], Meta(max_length=MAX_TOOLS)]


class ChatBody(GenerationBody, kw_only=True):
    """`logprobs` is a switch here; `top_logprobs` says how many."""

    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Name | None = None
    verbosity: Any = None
    prediction: Any = None
    # of these only what asks for nothing is taken
    audio: Any = None
    best_of: Any = None
    echo: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    store: Any = None
    suffix: Any = None
    web_search_options: Any = None
    chat_template: Any = None
    mm_processor_kwargs: Any = None
    # vLLM's
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None

    def __post_init__(self) -> None:
        if self.chat_template_kwargs is not None:
            check_json("chat_template_kwargs", self.chat_template_kwargs)
        if self.documents is not None:
            check_json("documents", self.documents)


class TokenizeBody(Body):
    """A prompt, or messages: exactly one of them."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None

    def __post_init__(self) -> None:
        check_json("chat_template_kwargs", self.chat_template_kwargs)


class PaceBody(Body):
    """How the engine goes on: see `protocol.messages.SetPace`."""

    num_steps: Annotated[int, Meta(ge=0, le=1000)] | None = None
    interval_ms: Annotated[float, Meta(ge=0, le=10_000)] = 0.0
    for_s: Annotated[float, Meta(gt=0, le=60)] = 30.0


class DetokenizeBody(Body):
    tokens: Annotated[list[int], Meta(max_length=MAX_DETOKENIZED)]
    model: Name | None = None


B = TypeVar("B", bound=Body)


def decoded(content: bytes | bytearray, kind: type[B]) -> B:
    """The body, of which names and types are checked. Raises `ApiError` 400."""
    try:
        return msgspec.json.decode(content, type=kind)
    except NO_BODY as error:
        return _decoded_without_nulls(content, kind, error)


def _decoded_without_nulls(content: bytes | bytearray, kind: type[B], error: Exception) -> B:
    """A field that is null asks for nothing, whatever it is called. error: of the whole body."""
    if isinstance(error, msgspec.ValidationError) and is_of_unknown_field(error):
        try:
            pruned = msgspec.json.encode(_without_nulls(msgspec.json.decode(content)))
            return msgspec.json.decode(pruned, type=kind)
        except NO_BODY as later:
            error = later
    raise from_decoding(error, kind.__struct_fields__) from None


def _without_nulls(value: Any) -> Any:
    """Of fields of ours; null within JSON of the client's own is a value."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: inner if name in OPAQUE else _without_nulls(inner)
        for name, inner in value.items()
        if inner is not None
    }


@contextlib.contextmanager
def blaming(body: Body) -> Iterator[None]:
    """A `ValueError` inside is the client's mistake: 400, with the field to mend."""
    try:
        yield
    except ValueError as error:
        names = {"logprobs": "top_logprobs"} if isinstance(body, ChatBody) else {}
        raise from_value_error(error, body.__struct_fields__, names) from None
