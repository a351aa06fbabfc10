"""Request bodies → `SamplingParams`, and the refusal of what cannot be honoured.

Called by the completion endpoints. Values are checked by `SamplingParams` itself; here is decided
which of the fields that OpenAI and vLLM know have only one value that means anything.
"""

from typing import Any

from nanovllm.frontend.server.api_errors import ApiError, refused
from nanovllm.frontend.server.bodies import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    NamedTool,
    StructuredOutputs,
)
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams

# Same name, same meaning. None is "not given": the default of `SamplingParams` holds.
SAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
)
# Field → the values that ask for nothing this server does not do anyway; all others are refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "suffix": ("",),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
}


def chat_params(body: ChatBody, constraint: StructuredOutputsParams | None) -> SamplingParams:
    """Unless limited, an answer may be as long as the model's context allows."""
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.max_tokens not in (None, limit):
        raise refused("max_tokens", "differs from max_completion_tokens: send only the latter")
    logprobs = None
    if body.logprobs:
        logprobs = body.top_logprobs or 0
    elif body.top_logprobs:
        raise refused("top_logprobs", "needs logprobs=true")
    return _params(body, constraint, max_tokens=limit, logprobs=logprobs)


def completion_params(
    body: CompletionBody, constraint: StructuredOutputsParams | None
) -> SamplingParams:
    """max_tokens 0 (to score a prompt with echo) generates one token that is not shown."""
    limit = body.max_tokens
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise refused("best_of", "must equal n: all generated outputs are returned")
    if limit == 0 and not body.echo:
        raise refused("max_tokens", "0 returns nothing without echo=true")
    more: dict[str, Any] = {} if limit is None else {"max_tokens": max(limit, 1)}
    if body.echo and body.logprobs is not None:
        if body.prompt_logprobs is not None and body.prompt_logprobs != body.logprobs:
            raise refused("prompt_logprobs", "must equal logprobs if echo=true")
        more["prompt_logprobs"] = body.logprobs
    return _params(body, constraint, logprobs=body.logprobs, **more)


def constraint_of(body: GenerationBody) -> StructuredOutputsParams | None:
    """What `response_format`, `structured_outputs` and `tool_choice` ask the output to be."""
    asked: dict[str, dict[str, Any]] = {}
    if body.structured_outputs is not None:
        asked["structured_outputs"] = _own_constraint(body.structured_outputs)
    if body.response_format is not None and body.response_format.type != "text":
        asked["response_format"] = _format_constraint(body)
    if isinstance(body, ChatBody) and (tools := _tools_constraint(body)) is not None:
        asked["tool_choice"] = tools
    if len(asked) > 1:
        first, second = list(asked)[:2]
        raise refused(second, f"cannot be combined with {first}")
    for field, constraint in asked.items():
        try:
            return StructuredOutputsParams(**constraint)
        except ValueError as error:
            raise ApiError(400, str(error), param=field) from error
    return None


def called_tools(body: ChatBody) -> str | None:
    """Which calls are forced: "required", the name of a function, or None."""
    choice = body.tool_choice
    if choice is None or choice in ("none", "auto"):
        return None
    return choice.function.name if isinstance(choice, NamedTool) else "required"


def _params(
    body: GenerationBody, constraint: StructuredOutputsParams | None, **given: Any
) -> SamplingParams:
    _check_neutral(body)
    if body.stream_options is not None and not body.stream:
        raise refused("stream_options", "needs stream=true")
    if body.prompt_logprobs is not None and body.stream:
        raise refused("prompt_logprobs", "is not available with stream=true")
    for name in SAME:
        value = getattr(body, name)
        if value is not None:
            given.setdefault(name, value)
    if constraint is not None:
        given["structured_outputs"] = constraint
    return SamplingParams(output_kind="delta" if body.stream else "final_only", **given)


def _check_neutral(body: GenerationBody) -> None:
    for name in body.__struct_fields__:
        if name in NEUTRAL:
            value, accepted = getattr(body, name), NEUTRAL[name]
            if value is not None and value not in accepted:
                only = " or ".join(map(repr, accepted))
                why = f"only {only} can be honoured, not {value!r}" if only else "is not supported"
                raise refused(name, why)


def _own_constraint(asked: StructuredOutputs) -> dict[str, Any]:
    given = {
        name: value
        for name in asked.__struct_fields__
        if (value := getattr(asked, name)) is not None and value is not False
    }
    if len(given) != 1:
        names = ", ".join(asked.__struct_fields__)
        raise ApiError(
            400, f"structured_outputs: give exactly one of {names}", param="structured_outputs"
        )
    return given


def _format_constraint(body: GenerationBody) -> dict[str, Any]:
    asked = body.response_format
    assert asked is not None
    if asked.type == "json_object":
        return {"json_object": True}
    if asked.json_schema is None or not isinstance(asked.json_schema.schema, dict):
        raise refused("response_format", "type json_schema needs json_schema.schema, an object")
    return {"json": asked.json_schema.schema}


def _tools_constraint(body: ChatBody) -> dict[str, Any] | None:
    """A forced call is written as plain JSON, whatever the model's own way: the arguments of the
    named function, or an array of {"name": …, "parameters": …}."""
    forced = called_tools(body)
    if forced is None:
        return None
    schemas = {
        tool.function.name: tool.function.parameters or {"type": "object"}
        for tool in body.tools or []
    }
    if not schemas:
        raise refused("tool_choice", "needs tools")
    if forced != "required":
        if forced not in schemas:
            raise refused("tool_choice", f"names {forced!r}, which is not among the tools")
        return {"json": schemas[forced]}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": schema},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name, schema in schemas.items()
    ]
    array: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if body.parallel_tool_calls is False:
        array["maxItems"] = 1
    return {"json": array}
