"""A body's bytes → its struct, or what is wrong with them, and whether to find out takes long.

Called by `endpoint.read`, and by `body_trial` in a process of its own for what takes long.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
import numpy as np

from nanovllm.frontend.server.api_errors import (
    from_decoding,
    from_value_error,
    is_of_unknown_field,
)
from nanovllm.frontend.server.bodies import Body, ChatBody
from nanovllm.limits import (
    MAX_JSON_DIGITS,
    MAX_JSON_EXPONENTS,
    MAX_JSON_LISTS,
    MAX_JSON_TEXTS,
    MAX_JSON_VALUES,
)

OPAQUE = {"arguments", "chat_template_kwargs", "documents", "json", "parameters", "schema"}
LONG_BODY = 1 << 16  # bytes: up to half a millisecond to decode
MANY_LISTS = 1024  # lists and objects, which take as long as a hundred bytes each
NO_BODY = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
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


def takes_long(content: bytes | bytearray) -> bool:
    """Whether decoding it may hold up streams: it is long, or may hold many lists, or many numbers
    with exponents."""
    is_short = len(content) <= MANY_LISTS  # it has no room for many of anything
    return len(content) > LONG_BODY or (not is_short and _may_hold_many(content))


def _may_hold_many(content: bytes | bytearray) -> bool:
    letters = np.frombuffer(content, np.uint8)  # `bytes.count` is slow for frequent ones
    lower = letters | 0x20
    if np.count_nonzero(lower == ord("{")) > MANY_LISTS:  # "[" is that without the bit
        return True
    # Numbers that take long have a digit, the letter and three digits.
    num_exponents = np.count_nonzero(lower == ord("e"))
    num_digits = np.count_nonzero(letters - np.uint8(ord("0")) < 10)
    return bool(num_exponents > MAX_JSON_EXPONENTS and num_digits > 4 * MAX_JSON_EXPONENTS)


def excess(content: bytes) -> str | None:
    """What there is too much of to decode, if anything, by the punctuation between texts. Any bytes
    may be asked about: of what is no JSON, it says something."""
    unescaped = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    num_texts = unescaped.count(b'"') // 2
    if num_texts > MAX_JSON_TEXTS:
        return _told(num_texts, MAX_JSON_TEXTS, "names and texts")
    bare = b"".join(unescaped.split(b'"')[::2])
    num_values = bare.count(b",")
    num_digits = len(bare) - len(bare.translate(None, b"0123456789"))
    num_exponents = bare.count(b"e") + bare.count(b"E") - bare.count(b"true") - bare.count(b"false")
    counts = (
        (num_values, MAX_JSON_VALUES, "values"),
        (bare.count(b"[") + bare.count(b"{"), MAX_JSON_LISTS, "lists and objects"),
        (num_digits - 8 * num_values, MAX_JSON_DIGITS, "digits beyond eight of each value"),
        (num_exponents, MAX_JSON_EXPONENTS, "numbers with exponents"),
    )
    return next((_told(*one) for one in counts if one[0] > one[1]), None)


def _told(count: int, most: int, what: str) -> str:
    return f"the body holds {count} {what}: at most {most} are allowed"
