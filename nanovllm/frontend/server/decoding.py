"""A body's bytes → its struct, or what is wrong with them.

Called by `endpoint.read`, and by `body_trial` in a process of its own for what takes long.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

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
B = TypeVar("B", bound=Body)


def decoded(content: bytes | bytearray, kind: type[B]) -> B:
    """The body, of which names and types are checked. Raises `ApiError` 400."""
    try:
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.ValidationError as error:
            if not is_of_unknown_field(error):
                raise
            # A field that is null asks for nothing, whatever it is called.
            pruned = msgspec.json.encode(_without_nulls(msgspec.json.decode(content)))
            return msgspec.json.decode(pruned, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
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
