"""From what a request asks its output to be to llguidance's matcher of it, within fixed limits.

`GrammarCompiler` calls it in the core, `grammar_trial` in the process that tries grammars first, so
both compile the very same thing. llguidance is imported with the first request that needs it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from nanovllm.core.json_schema import prepare
from nanovllm.sampling_params import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

# Blank space in JSON is one space, or a new line and its indent: at a temperature, a small model
# would else fill its max_tokens with blanks, which a schema never forbids.
JSON_WHITESPACE = r" |\n {0,16}"
# `oneOf` as `anyOf`: no parser can see that exactly one alternative fits.
JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": JSON_WHITESPACE, "coerce_one_of": True}
# llguidance adds all tokens that match one of these at once, where any such text may follow; others
# it walks through. Its own bounds of length are 10 and 30: far apart where a maxLength is near.
IN_STRING = r'[^"\\\x00-\x1F\x7F]'
SLICES = [
    r"[\x20\x0A\x0D\x09]+",
    *(f"{IN_STRING}{{1,{length}}}" for length in (4, 6, 8, 10, 12, 16)),
    f"{IN_STRING}+",
]
MAX_LEXER_STATES = 100_000  # bounds memory (0.3 to 2 kB each); llguidance bounds work by itself
MAX_CAUSE_CHARS = 300
LOG_NOTHING = 0


def make_tokenizer(
    tokenizer_json: str, *, vocab_size: int, eos_token_ids: list[int]
) -> LLTokenizer:
    """llguidance's trie of a vocabulary, at least as wide as the model's: about half a second.

    Raises `ValueError` if the text is no tokenizer.
    """
    from llguidance import LLTokenizer

    eos = eos_token_ids or None
    tokenizer_json = _plainly_byte_level(tokenizer_json)
    tokenizer = LLTokenizer(tokenizer_json, eos_token=eos, slices=SLICES)
    if tokenizer.vocab_size < vocab_size:  # an embedding table padded at its end
        tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=eos, slices=SLICES)
    return tokenizer


def _plainly_byte_level(tokenizer_json: str) -> str:
    """The same tokenizer, with nothing around a byte-level decoder.

    llguidance learns from the decoder how tokens spell bytes. Some files have the byte-level one as
    the last of a sequence, behind steps that do nothing to such tokens (ByteFallback, Fuse); it
    takes the first step at its word then, and a line break for the letter Ċ.
    """
    try:
        content = json.loads(tokenizer_json)
        steps = content["decoder"]["decoders"]
    except (ValueError, KeyError, TypeError):
        return tokenizer_json
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    if not byte_level:
        return tokenizer_json
    content["decoder"] = byte_level[-1]
    return json.dumps(content)


class Source(NamedTuple):
    """What is wanted, and the same in llguidance's form. schema: if it is to be JSON, prepared."""

    wanted: StructuredOutputsParams
    grammar: str
    schema: Any = None


def read(wanted: StructuredOutputsParams) -> Source:
    """Raises `ValueError` naming the field, if it says nothing that could be compiled."""
    try:
        return _read(wanted)
    except ValueError as error:
        raise cannot_be_used(wanted, first_line(str(error))) from None


def make_matcher(tokenizer: LLTokenizer, source: Source) -> tuple[LLMatcher, bytes]:
    """At the beginning of an output, with its first mask, whose making builds most of the lexer.

    Raises `ValueError` naming the field, if nothing can match it or it is beyond the limits.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    try:
        matcher = LLMatcher(tokenizer, source.grammar, log_level=LOG_NOTHING, limits=limits)
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(matcher.get_error())
    except ValueError as error:
        raise cannot_be_used(source.wanted, first_line(str(error))) from None
    return matcher, mask


def cannot_be_used(wanted: StructuredOutputsParams, why: str) -> ValueError:
    """What a request is told whose grammar is refused."""
    return ValueError(f"structured_outputs.{wanted.kind} cannot be used: {why}")


def first_line(error: str) -> str:
    """Of an error of llguidance, which appends its state over many lines and quotes at length."""
    return error.strip().partition("\n")[0][:MAX_CAUSE_CHARS] or "no reason given"


def _read(wanted: StructuredOutputsParams) -> Source:
    from llguidance import LLMatcher, grammar_from

    if wanted.regex is not None:
        return Source(wanted, LLMatcher.grammar_from_regex(wanted.regex))
    if wanted.choice is not None:
        # Lark's strings are JSON's. One terminal, not as many rules, which the parser would track.
        texts = " | ".join(map(json.dumps, wanted.choice))
        return Source(wanted, LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}"))
    if wanted.grammar is not None:
        text = wanted.grammar
        return Source(wanted, grammar_from("gbnf" if "::=" in text else "lark", text))
    schema = {"type": "object"} if wanted.json is None else prepare(str(wanted.json))
    if isinstance(schema, dict) and "x-guidance" not in schema:
        # As `grammar_from_json_schema` would, which decodes and encodes it once more.
        whole = {"grammars": [{"json_schema": {**schema, "x-guidance": JSON_OPTIONS}}]}
        return Source(wanted, json.dumps(whole, allow_nan=False), schema)
    text = json.dumps(schema, allow_nan=False)
    return Source(wanted, LLMatcher.grammar_from_json_schema(text, defaults=JSON_OPTIONS), schema)
