"""How one request wants its tokens chosen and returned; names, defaults and meanings are vLLM's.

Owns the only validation of these values: it runs when a `SamplingParams` is made, and again when
one is decoded from a socket. Raises `ValueError` naming the field and what it takes.
"""

import json
import math
from array import array
from collections.abc import Collection, Sequence
from copy import copy
from functools import lru_cache
from typing import Any, Literal, NoReturn, get_args

import msgspec

from nanovllm.config import unknown_name
from nanovllm.limits import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_CHOICE_BYTES,
    MAX_CHOICE_TEXTS,
    MAX_GRAMMAR_BYTES,
    MAX_LOGIT_BIAS,
    MAX_N,
    MAX_REGEX_BYTES,
    MAX_SCHEMA_DEPTH,
    MAX_SCHEMA_REFS,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
    check_count,
)

OutputKind = Literal["cumulative", "delta", "final_only"]
GREEDY_BELOW = 1e-5  # vLLM's threshold under which a temperature means greedy
MAX_LOGPROBS = 20
INT32_MAX = 2**31 - 1  # the device's integers
MAX_BYTES = {"regex": MAX_REGEX_BYTES, "choice": MAX_CHOICE_BYTES}  # of structured_outputs
# Fields that hold many values, as they are where nothing is asked.
LISTS: dict[str, object] = {
    **{"stop": [], "stop_token_ids": [], "bad_words": []},
    **{"logit_bias": {}, "allowed_token_ids": None},
}
ABOVE_0 = math.nextafter(0.0, 1.0)
# Field → its least and its largest value, and what is said of them.
RANGES = {
    "presence_penalty": (-2.0, 2.0, "in [-2, 2]"),
    "frequency_penalty": (-2.0, 2.0, "in [-2, 2]"),
    "temperature": (0.0, math.inf, "in [0, inf]"),
    "min_p": (0.0, 1.0, "in [0, 1]"),
    "repetition_penalty": (ABOVE_0, math.inf, "above 0"),
    "top_p": (ABOVE_0, 1.0, "in (0, 1]"),
}
INTEGER_RANGES = {
    "n": (1, MAX_N),
    "top_k": (0, INT32_MAX),
    "min_tokens": (0, INT32_MAX),
    "max_tokens": (1, INT32_MAX),
    "seed": (-(2**63), 2**63 - 1),
    "logprobs": (-1, MAX_LOGPROBS),
    "prompt_logprobs": (-1, MAX_LOGPROBS),
}
OPTIONAL_INTS = ("max_tokens", "seed", "logprobs", "prompt_logprobs")
OUTPUT_KINDS = get_args(OutputKind)


class WrongKeywordError(TypeError, ValueError):
    """A `TypeError` as of any call, and a `ValueError` as all that users get wrong here."""


class _Keywords(msgspec.StructMeta):
    """Suggests the right keyword for a wrong one."""

    def __call__(self, *args: Any, **fields: Any) -> Any:
        if args:
            raise WrongKeywordError(f"{self.__name__} takes keywords only: such as temperature=0.8")
        for name in fields:
            if name not in self.__struct_fields__:
                kind, known = f"field of {self.__name__}", list(self.__struct_fields__)
                raise WrongKeywordError(unknown_name(kind, name, known))
        return super().__call__(**fields)


class _Params(msgspec.Struct, metaclass=_Keywords):
    """Made by keywords."""


class StructuredOutputsParams(
    msgspec.Struct, metaclass=_Keywords, frozen=True, kw_only=True, omit_defaults=True
):
    """What the output must be, from its first to its last character: exactly one of these.

    json: a JSON schema, as a dict or as text (which is what a dict becomes). json_object: any JSON
    object. regex: in the syntax of Rust's `regex` crate, matched as a whole. choice: one of these
    texts. grammar: context-free, in Lark's or in GBNF/EBNF notation, from its rule `start`/`root`.
    after: the output is free up to and with this text, and what follows must match: "</think>" for
    a model that is about to reason. Before it the output does not end by EOS.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    after: str | None = None

    def __post_init__(self) -> None:
        given = self._given
        if len(given) != 1:
            raise ValueError(
                "structured_outputs needs exactly one of json, regex, choice, grammar and "
                f"json_object, not {' and '.join(given) or 'none'}"
            )
        if self.json is not None:
            msgspec.structs.force_setattr(self, "json", _schema_text(self.json))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"structured_outputs.{name} must be a non-empty string")
        if self.after is not None and (not isinstance(self.after, str) or not self.after):
            raise ValueError("structured_outputs.after must be a non-empty string")
        if self.json_object not in (True, False):
            raise ValueError("structured_outputs.json_object must be True or False")
        if self.choice is not None:
            is_list = isinstance(self.choice, list | tuple)
            if is_list:
                check_count(
                    "structured_outputs.choice", len(self.choice), MAX_CHOICE_TEXTS, "texts"
                )
            if not (is_list and set(map(type, self.choice)) == {str} and all(self.choice)):
                raise ValueError("structured_outputs.choice must be a list of non-empty strings")
        num_bytes = len(msgspec.json.encode(getattr(self, self.kind)))
        most = MAX_BYTES.get(self.kind, MAX_GRAMMAR_BYTES)
        check_count(f"structured_outputs.{self.kind}", num_bytes, most, "bytes")

    @property
    def kind(self) -> str:
        """The name of the field that is set."""
        return self._given[0]

    @property
    def _given(self) -> list[str]:
        fields = msgspec.structs.asdict(self)
        del fields["after"]
        return [name for name, value in fields.items() if value not in (None, False)]


class SamplingParams(
    msgspec.Struct, metaclass=_Keywords, frozen=True, kw_only=True, omit_defaults=True
):
    """Sampling and stopping of one request.

    n: outputs per prompt. temperature: below 1e-5 is greedy. top_k: 0 or -1 is off.
    min_p: relative to the largest probability. presence/frequency_penalty act on output tokens,
    repetition_penalty on prompt and output. seed: same seed, same prompt, same tokens, whatever
    else runs. stop: text that ends the output (cut off unless include_stop_str_in_output).
    max_tokens: None means up to max_model_len. min_tokens: before this many, EOS and
    stop_token_ids cannot be sampled and stop strings are not looked for.
    logprobs / prompt_logprobs: how many alternatives, besides the token itself; -1 is the whole
    vocabulary. logit_bias: token id to an addend in [-100, 100]. output_kind: "cumulative" repeats
    all so far in each output, "delta" only what is new, "final_only" yields once.
    structured_outputs: what the output must be; it wins over all else that limits the choice.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: OutputKind = "cumulative"
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        if any(getattr(self, name) != nothing for name, nothing in LISTS.items()):
            _check_counts(self)
            _canonicalize_lists(self)
            _check_lists(self)
        _check_reals(self)
        _check_integers(self)
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise ValueError("structured_outputs must be a StructuredOutputsParams")
        _check_combinations(self)

    def with_values(self, **fields: Any) -> "SamplingParams":
        """A copy with these values, which are known to be valid: nothing is checked again."""
        made = copy(self)
        for name, value in fields.items():
            msgspec.structs.force_setattr(made, name, value)
        return made

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def edits_logits(self) -> bool:
        """Whether it forbids ids, or adds to the logits of some (`sampling/logits_processors`)."""
        some = self.min_tokens or self.logit_bias or self.bad_words
        return bool(some) or self.allowed_token_ids is not None

    def check_prompt(
        self, token_ids: Collection[int], *, num_outputs: int = 0, most: int, vocab_size: int
    ) -> None:
        """That a prompt leaves room for output, and that its ids and those named here are the
        model's. num_outputs: tokens generated before; most: max_model_len. `ValueError`."""
        if not token_ids:
            raise ValueError("prompt_token_ids is empty: send at least one token id")
        num_known = len(token_ids) + num_outputs
        if num_known >= most:
            raise ValueError(
                f"prompt has {num_known} tokens, which leaves no room for output: "
                f"max_model_len is {most}; shorten the prompt or raise max_model_len"
            )
        check_in_vocabulary("prompt_token_ids", token_ids, vocab_size)
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            if token_ids := getattr(self, name):
                check_in_vocabulary(name, token_ids, vocab_size)

    def stop_ids(self, eos_token_ids: Collection[int]) -> frozenset[int]:
        """The token ids that end an output which has `min_tokens`. eos_token_ids: the model's."""
        return frozenset(self.stop_token_ids).union(() if self.ignore_eos else eos_token_ids)

    def stop_reason(self, token_id: int, eos_token_ids: Collection[int]) -> int | None:
        """What is said of an output that one of `stop_ids` has ended: the id, or None for EOS."""
        return token_id if self.ignore_eos or token_id not in eos_token_ids else None

    def length_limit(self, num_prompt_tokens: int, max_model_len: int) -> int:
        """Tokens, with the prompt, at which an output ends with reason "length"."""
        if self.max_tokens is None:
            return max_model_len
        return min(max_model_len, num_prompt_tokens + self.max_tokens)


def check_in_vocabulary(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    """`ValueError` naming the field if one is outside of [0, vocab_size): ids index tables on the
    device."""
    if token_ids and not _are_below(vocab_size, token_ids):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise ValueError(
            f"{name} holds {wrong}, which is outside the model's vocabulary: "
            f"token ids are in [0, {vocab_size})"
        )


def _are_below(limit: int, token_ids: Collection[int]) -> bool:
    """Whether all are in [0, limit). Long prompts wait for this: a third of a loop's time."""
    import numpy as np  # the command line's help does not wait for it

    try:
        words = array("I", token_ids)
    except OverflowError:
        return False
    return int(np.frombuffer(words, np.uint32).max()) < limit


def _check_counts(params: SamplingParams) -> None:
    """First, so that nothing below takes long."""
    for name, most, what in (
        ("stop_token_ids", MAX_STOP_TOKEN_IDS, "token ids"),
        ("allowed_token_ids", MAX_ALLOWED_TOKEN_IDS, "token ids"),
        ("logit_bias", MAX_LOGIT_BIAS, "token ids"),
        ("bad_words", MAX_BAD_WORDS, "words"),
    ):
        value = getattr(params, name)
        if not isinstance(value, Collection | None):
            raise ValueError(f"{name} must be a list of {what}, not {value!r}")
        check_count(name, len(value or ()), most, what)
    stops = [params.stop] if isinstance(params.stop, str) else params.stop or []
    check_count("stop", len(stops), MAX_STOPS, "strings")


def leaves_nothing(
    params: SamplingParams,
    *,
    bad_words_token_ids: Sequence[list[int]],
    eos_token_ids: Collection[int],
    output_token_ids: Sequence[int] = (),
) -> bool:
    """Whether min_tokens and bad words forbid all of allowed_token_ids after these outputs."""
    if params.allowed_token_ids is None or params.structured_outputs is not None:
        return False
    forbidden: set[int] = set()
    if len(output_token_ids) < params.min_tokens:
        forbidden = {*params.stop_token_ids, *eos_token_ids}
    for *before, last in bad_words_token_ids:
        if not before or [*output_token_ids[-len(before) :]] == before:
            forbidden.add(last)
    return bool(forbidden) and all(token_id in forbidden for token_id in params.allowed_token_ids)


def _canonicalize_lists(params: SamplingParams) -> None:
    """Accept the spellings vLLM accepts: one stop string, None for empty."""
    changed: dict[str, object] = {}
    if isinstance(params.stop, str):
        changed["stop"] = [params.stop]
    for name in ("stop", "stop_token_ids", "bad_words"):
        if getattr(params, name) is None:
            changed[name] = []
    if params.logit_bias is None:
        changed["logit_bias"] = {}
    elif params.logit_bias:
        changed["logit_bias"] = {
            int(token): bias if math.isnan(bias) else max(-100.0, min(100.0, float(bias)))
            for token, bias in params.logit_bias.items()
        }
    for name, value in changed.items():
        msgspec.structs.force_setattr(params, name, value)


def _check_reals(params: SamplingParams) -> None:
    for name, (low, high, wanted) in RANGES.items():
        value = _number(params, name)
        if not low <= value <= high:
            raise ValueError(f"{name} must be {wanted}, not {value}")


def _check_integers(params: SamplingParams) -> None:
    if params.top_k == -1:  # as vLLM and others spell that there is none
        msgspec.structs.force_setattr(params, "top_k", 0)
    if params.seed == -1:
        msgspec.structs.force_setattr(params, "seed", None)
    for name, (least, most) in INTEGER_RANGES.items():
        value = getattr(params, name)
        if value is None and name in OPTIONAL_INTS:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
        if value > most:
            raise ValueError(f"{name} must be at most {most}, not {value}")


def _check_combinations(params: SamplingParams) -> None:
    if params.greedy and params.n > 1:
        raise ValueError(f"n must be 1 with temperature 0 (all would be equal), not {params.n}")
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise ValueError(
            f"min_tokens ({params.min_tokens}) must not exceed max_tokens ({params.max_tokens})"
        )
    if params.stop and not params.detokenize:
        raise ValueError("stop strings need detokenize=True; or use stop_token_ids")
    if params.output_kind not in OUTPUT_KINDS:
        raise ValueError(
            f"output_kind must be 'cumulative', 'delta' or 'final_only', not {params.output_kind!r}"
        )


def _check_lists(params: SamplingParams) -> None:
    for token, bias in params.logit_bias.items():
        if math.isnan(bias):
            raise ValueError(f"logit_bias of token {token} is not a number")
    if any(not isinstance(text, str) or not text for text in params.stop):
        raise ValueError("stop must hold non-empty strings only")
    check_count("stop", sum(map(len, params.stop)), MAX_STOP_CHARS, "characters")
    if any(not isinstance(text, str) or not text for text in params.bad_words):
        raise ValueError("bad_words must hold non-empty strings only")
    longest = max(map(len, params.bad_words), default=0)
    check_count("bad_words", longest, MAX_BAD_WORD_CHARS, "characters in one word")
    if params.allowed_token_ids is not None and not params.allowed_token_ids:
        raise ValueError("allowed_token_ids is empty: nothing could be sampled; leave it None")
    for name in ("stop_token_ids", "allowed_token_ids"):
        token_ids = getattr(params, name) or ()
        if set(map(type, token_ids)) - {int} or min(token_ids, default=0) < 0:
            odd = next(one for one in token_ids if type(one) is not int or one < 0)
            raise ValueError(f"{name} must hold integers of at least 0, not {odd!r}")


def _schema_text(schema: str | dict[str, Any]) -> str:
    try:
        text = schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
        if len(text) > MAX_GRAMMAR_BYTES:
            return text  # refused by its length
        depth, num_refs = _depth_and_refs(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"structured_outputs.json must be a JSON schema, as a dict or its text: {error}"
        ) from None
    # Both are compiled recursively.
    if depth > MAX_SCHEMA_DEPTH:
        raise ValueError(
            f"structured_outputs.json nests more than {MAX_SCHEMA_DEPTH} objects and arrays: "
            "use $defs and $ref for what repeats, or a flatter schema"
        )
    check_count("structured_outputs.json", num_refs, MAX_SCHEMA_REFS, "times $ref")
    return text


@lru_cache(32)  # most schemas come again and again
def _depth_and_refs(text: str) -> tuple[int, int]:
    """Of a schema: objects and arrays within one another, and `$ref`s, level by level. Raises
    `ValueError`, `TypeError` or `RecursionError` if it is none."""
    # Not msgspec, which takes 20 µs for each of some numbers with exponents.
    level: list[Any] = [json.loads(text, parse_constant=_no_number)]
    if not isinstance(level[0], dict):
        raise TypeError("it is no object")
    depth = num_refs = 0
    while level and depth <= MAX_SCHEMA_DEPTH:
        depth += 1
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                num_refs += "$ref" in one
                below += one.values()
            else:
                below += one
        level = [one for one in below if isinstance(one, dict | list)]
    return depth, num_refs


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _number(params: SamplingParams, name: str) -> float:
    value = getattr(params, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    return value
