"""SamplingParams: vLLM's spellings are accepted, and every mistake names its field."""

from typing import Any

import msgspec
import pytest

from nanovllm.limits import MAX_GRAMMAR_BYTES, MAX_REGEX_BYTES, MAX_SCHEMA_DEPTH
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams


def test_defaults_are_vllm_s() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (
        1,
        1.0,
        1.0,
        0,
        0.0,
    )
    assert (params.max_tokens, params.min_tokens, params.output_kind) == (16, 0, "cumulative")
    assert (params.repetition_penalty, params.seed, params.logprobs) == (1.0, None, None)


def test_other_spellings_are_canonicalized() -> None:
    params = SamplingParams(
        stop="END",  # type: ignore[arg-type]
        top_k=-1,
        seed=-1,
        stop_token_ids=None,  # type: ignore[arg-type]
        logit_bias={5: 500},
    )
    assert (params.stop, params.top_k, params.seed, params.stop_token_ids) == (["END"], 0, None, [])
    assert params.logit_bias == {5: 100.0}


@pytest.mark.parametrize(
    ("temperature", "greedy"), [(0, True), (1e-6, True), (1e-4, False), (1, False)]
)
def test_tiny_temperatures_are_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", NAN),
        ("temperature", INFINITY),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", NAN),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("min_p", 2),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", NAN),
        ("n", 0),
        ("max_tokens", 0),
        ("max_tokens", 1.0),
        ("min_tokens", -1),
        ("seed", 2**64),
        ("logprobs", -2),
        ("logprobs", 1000),
        ("prompt_logprobs", 1000),
        ("stop", [""]),
        ("stop", [3]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-5]),
        ("bad_words", [""]),
        ("logit_bias", {3: NAN}),
        ("output_kind", "stream"),
    ],
)
def test_values_out_of_range_name_their_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


def test_combinations_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="n must be 1 with temperature 0"):
        SamplingParams(temperature=0, n=2)
    with pytest.raises(ValueError, match=r"min_tokens \(9\) must not exceed max_tokens \(8\)"):
        SamplingParams(min_tokens=9, max_tokens=8)
    with pytest.raises(ValueError, match="detokenize"):
        SamplingParams(stop=["x"], detokenize=False)


def test_it_is_frozen_and_is_validated_again_when_decoded() -> None:
    params = SamplingParams(temperature=0.5, stop=["a"], logit_bias={3: 1.5})
    with pytest.raises(AttributeError):
        params.top_k = 3  # type: ignore[misc]
    encoded = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(encoded, type=SamplingParams) == params
    with pytest.raises(msgspec.ValidationError, match="top_p"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"top_p": 7.0}), type=SamplingParams)
    for wrong in (TypeError, ValueError):
        with pytest.raises(wrong, match=r"temprature.*did you mean 'temperature'"):
            SamplingParams(temprature=0)  # type: ignore[call-arg]
        with pytest.raises(wrong, match="did you mean 'regex'"):
            StructuredOutputsParams(regexp="a")  # type: ignore[call-arg]
        with pytest.raises(wrong, match="keywords"):
            SamplingParams(0.5)  # type: ignore[misc]


def nested(depth: int) -> dict[str, Any]:
    """A schema of so many objects within one another."""
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "exactly one of json, regex, .* not none"),
        ({"regex": "a", "choice": ["b"]}, "exactly one of .* not regex and choice"),
        ({"json_object": False}, "not none"),
        ({"json": "[1]"}, "structured_outputs.json must be a JSON schema"),
        ({"json": "{"}, "structured_outputs.json must be a JSON schema"),
        ({"json": '{"const": NaN}'}, "structured_outputs.json must be a JSON schema"),
        ({"json": {"a": object()}}, "structured_outputs.json must be a JSON schema"),
        ({"json": 3}, "structured_outputs.json must be a JSON schema"),
        ({"json": "[" * 100_000}, "structured_outputs.json must be a JSON schema"),
        ({"regex": ""}, "structured_outputs.regex must be a non-empty string"),
        ({"grammar": 5}, "structured_outputs.grammar must be a non-empty string"),
        ({"choice": []}, "structured_outputs.choice must be a list"),
        ({"choice": ["a", ""]}, "structured_outputs.choice must be a list"),
        ({"choice": "ab"}, "structured_outputs.choice must be a list"),
        ({"json_object": "yes"}, "structured_outputs.json_object must be"),
        ({"regex": "a" * MAX_REGEX_BYTES}, f"at most {MAX_REGEX_BYTES}"),
        ({"grammar": "a" * MAX_GRAMMAR_BYTES}, f"at most {MAX_GRAMMAR_BYTES}"),
        ({"json": {"const": "a" * MAX_GRAMMAR_BYTES}}, f"at most {MAX_GRAMMAR_BYTES}"),
        ({"json": nested(MAX_SCHEMA_DEPTH + 1)}, f"more than {MAX_SCHEMA_DEPTH} objects"),
        ({"json": {"anyOf": [{"$ref": "#"}] * 1001}}, "holds 1001 times .ref: at most 1000"),
    ],
)
def test_structured_outputs_are_one_thing_and_name_their_field(
    wanted: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(**wanted)


def test_a_schema_may_be_as_deep_and_refer_as_often_as_is_allowed() -> None:
    StructuredOutputsParams(json=nested(MAX_SCHEMA_DEPTH))
    StructuredOutputsParams(json={"anyOf": [{"$ref": "#"}] * 1000})


def test_structured_outputs_cross_a_socket_and_a_schema_becomes_text() -> None:
    wanted = StructuredOutputsParams(json={"type": "integer", "maximum": 2**70})
    assert wanted.kind == "json" and isinstance(wanted.json, str)
    params = SamplingParams(structured_outputs=wanted)
    encoded = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(encoded, type=SamplingParams) == params
    bad = msgspec.msgpack.encode({"structured_outputs": {"regex": "a", "json": {}}})
    with pytest.raises(msgspec.ValidationError, match="exactly one"):
        msgspec.msgpack.decode(bad, type=SamplingParams)
    with pytest.raises(ValueError, match="must be a StructuredOutputsParams"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"stop": ["x"] * 65}, "stop holds 65 strings: at most 64"),
        ({"stop": ["x" * 4097]}, "stop holds 4097 characters: at most 4096"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids holds 1025 token ids"),
        ({"allowed_token_ids": [1] * 65_537}, "allowed_token_ids holds 65537"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias holds 1025"),
        ({"bad_words": ["x"] * 1025}, "bad_words holds 1025 words"),
        ({"bad_words": ["x" * 257]}, "bad_words holds 257 characters in one word"),
        ({"bad_words": 7}, "bad_words must be a list"),
        ({"allowed_token_ids": [1, True]}, "allowed_token_ids must hold integers.*True"),
        ({"allowed_token_ids": [1, -1]}, "allowed_token_ids must hold integers.*-1"),
    ],
)
def test_lists_have_limits_that_are_named(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        SamplingParams(**fields)
    SamplingParams(stop=["x" * 4096], bad_words=["x" * 256] * 1024, allowed_token_ids=[1] * 65_536)


def test_other_values_are_those_of_a_copy() -> None:
    params = SamplingParams(temperature=0.5, stop=["a"])
    other = params.with_values(seed=3, structured_outputs=None)
    assert other == SamplingParams(temperature=0.5, stop=["a"], seed=3)
    assert params.seed is None
