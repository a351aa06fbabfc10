"""Request bodies → `SamplingParams`, and the refusal of what cannot be honoured.

Called by the completion endpoints. Values are checked by `SamplingParams` itself; here is decided
which of the fields that OpenAI and vLLM know have only one value that means anything.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from nanovllm.frontend.server.api_errors import ApiError, from_constraint, refused
from nanovllm.frontend.server.bodies import (
    ChatBody,
    CompletionBody,
    FunctionDefinition,
    GenerationBody,
    NamedTool,
    ResponseFormat,
    StructuredOutputs,
)
from nanovllm.frontend.server.tool_schemas import nested
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams

# Same name, same meaning. None is "not given": the default of `SamplingParams` holds.
SAME = tuple(
    name
    for name in GenerationBody.__struct_fields__
    if name in SamplingParams.__struct_fields__ and name not in ("max_tokens", "structured_outputs")
)
# Field → the values that ask for nothing this server does not do anyway; all others are refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "suffix": ("",),
    "logits_processors": ([],),
    "kv_transfer_params": ({},),
    "vllm_xargs": ({},),
}
CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **NEUTRAL,
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"], []),
    "store": (False,),
    "web_search_options": (),
}
Defaults = Mapping[str, int | float | None]  # fields of `SamplingParams`, as the model wants them


class Constraint(NamedTuple):
    """What the output must be, and the field that asked for it, as errors name it."""

    field: str
    params: StructuredOutputsParams


def chat_params(
    body: ChatBody, constraint: Constraint | None, defaults: Defaults
) -> SamplingParams:
    """Unless limited, an answer may be as long as the model's context allows."""
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.max_tokens not in (None, limit):
        raise refused("max_tokens", "differs from max_completion_tokens: send only the latter")
    logprobs = None
    if body.logprobs:
        logprobs = body.top_logprobs or 0
    elif body.top_logprobs:
        raise refused("top_logprobs", "needs logprobs=true")
    given: dict[str, Any] = {} if limit is None else {"max_tokens": limit}
    return _params(body, constraint, {"max_tokens": None, **defaults}, logprobs=logprobs, **given)


def completion_params(
    body: CompletionBody, constraint: Constraint | None, defaults: Defaults
) -> SamplingParams:
    """max_tokens 0 (to score a prompt with echo) generates one token that is not shown."""
    limit = body.max_tokens
    if body.best_of not in (None, body.n or 1):
        raise refused("best_of", "must equal n: all generated outputs are returned")
    if limit == 0 and not body.echo:
        raise refused("max_tokens", "0 returns nothing without echo=true")
    more: dict[str, Any] = {} if limit is None else {"max_tokens": limit or 1}
    if body.echo and body.logprobs is not None:
        if body.prompt_logprobs is not None and body.prompt_logprobs != body.logprobs:
            raise refused("prompt_logprobs", "must equal logprobs if echo=true")
        more["prompt_logprobs"] = body.logprobs
    return _params(body, constraint, defaults, logprobs=body.logprobs, **more)


def constraint_of(body: GenerationBody, *, after: str | None = None) -> Constraint | None:
    """What `response_format`, `structured_outputs` and `tool_choice` ask the output to be.

    after: the text up to which it is free, such as the end of the model's reasoning.
    """
    choice = body.tool_choice if isinstance(body, ChatBody) else None
    if body.structured_outputs is None and body.response_format is None and choice is None:
        return None
    return _the_one(_constraints(body), after)


def _the_one(asked: dict[str, tuple[str, dict[str, Any]]], after: str | None) -> Constraint | None:
    """Of what `_constraints` has found."""
    if len(asked) > 1:
        first, second = list(asked)[:2]
        raise refused(second, f"cannot be combined with {first}")
    for field, constraint in asked.values():
        try:
            return Constraint(field, StructuredOutputsParams(**constraint, after=after))
        except ValueError as error:
            raise from_constraint(str(error), field) from error
    return None


def _constraints(body: GenerationBody) -> dict[str, tuple[str, dict[str, Any]]]:
    """What the output must be by each field that says so: as errors name it, and the constraint."""
    asked: dict[str, tuple[str, dict[str, Any]]] = {}
    if body.structured_outputs is not None:
        kind = _own_constraint(body.structured_outputs)
        asked["structured_outputs"] = f"structured_outputs.{next(iter(kind))}", kind
    if body.response_format is not None and body.response_format.type != "text":
        asked["response_format"] = _format_constraint(body.response_format)
    if isinstance(body, ChatBody) and body.tool_choice is not None:
        tools = _tools_constraint(body)
        if tools is not None:
            asked["tool_choice"] = tools
    return asked


def called_tools(body: ChatBody) -> str | None:
    """Which calls are forced: "required", the name of a function, or None."""
    choice = body.tool_choice
    if choice is None or choice in ("none", "auto"):
        return None
    return choice.function.name if isinstance(choice, NamedTool) else "required"


def _params(
    body: GenerationBody, constraint: Constraint | None, defaults: Defaults, **given: Any
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
        given["structured_outputs"] = constraint.params
    given["output_kind"] = "delta" if body.stream else "final_only"
    return SamplingParams(**{**defaults, **given})


def _check_neutral(body: GenerationBody) -> None:
    for name, accepted in (CHAT_NEUTRAL if isinstance(body, ChatBody) else NEUTRAL).items():
        value = getattr(body, name, None)
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


def _format_constraint(asked: ResponseFormat) -> tuple[str, dict[str, Any]]:
    if asked.type == "json_object":
        return "response_format", {"json_object": True}
    if asked.json_schema is None or not isinstance(asked.json_schema.schema, dict):
        raise refused("response_format", "type json_schema needs json_schema.schema, an object")
    return "response_format.json_schema.schema", {"json": asked.json_schema.schema}


def _tools_constraint(body: ChatBody) -> tuple[str, dict[str, Any]] | None:
    """A forced call is written as plain JSON, whatever the model's own way: the arguments of the
    named function, or an array of {"name": …, "parameters": …}."""
    forced = called_tools(body)
    if forced is None:
        return None
    tools = {tool.function.name: tool.function for tool in body.tools or []}
    if not tools:
        raise refused("tool_choice", "needs tools")
    if forced != "required":
        if forced not in tools:
            raise refused("tool_choice", f"names {forced!r}, which is not among the tools")
        schema = _arguments_schema(tools[forced])
        constraint = {"choice": ["{}"]} if schema is None else {"json": schema}
        return _parameters_field(body, forced), constraint
    definitions: dict[str, Any] = {}
    calls = []
    for index, (name, tool) in enumerate(tools.items()):
        fields: dict[str, Any] = {"name": {"const": name}}
        if (schema := _arguments_schema(tool)) is not None:
            pointer = f"#/$defs/{index}"
            definitions[str(index)] = nested(schema, pointer)
            fields["parameters"] = {"$ref": pointer}
        calls.append(
            {
                "type": "object",
                "properties": fields,
                "required": list(fields),
                "additionalProperties": False,
            }
        )
    array: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if body.parallel_tool_calls is False:
        array["maxItems"] = 1
    field = _parameters_field(body, next(iter(tools))) if len(tools) == 1 else "tools"
    return field, {"json": {"$defs": definitions, **array}}


def _parameters_field(body: ChatBody, name: str) -> str:
    names = [tool.function.name for tool in body.tools or []]
    return f"tools[{names.index(name)}].function.parameters"


def _arguments_schema(tool: FunctionDefinition) -> dict[str, Any] | None:
    """None: it takes none. Arguments are an object, also where the schema does not say so."""
    schema = tool.parameters
    if not schema or schema.keys() & {"type", "$ref", "anyOf", "oneOf", "allOf"}:
        return schema or None
    return {"type": "object", **schema}
