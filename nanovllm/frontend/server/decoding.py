"""A body's bytes → its struct, or what is wrong with them.

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
from nanovllm.limits import MAX_JSON_DIGITS, MAX_JSON_LISTS, MAX_JSON_TEXTS, MAX_JSON_VALUES

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


class JsonCounts:
    """How much there is to decode in a text of JSON, by its punctuation. Values and lists within
    texts are counted, too: such a text is longer than any model reads."""

    def __init__(self) -> None:
        self._values = self._lists = self._quotes = self._digits = 0
        self._last = 0  # byte

    def add(self, piece: bytes | bytearray) -> None:
        """The next bytes, of which there are some."""
        content = np.frombuffer(piece, np.uint8)
        is_quote = content == ord('"')
        is_escaped = is_quote[1:] & (content[:-1] == ord("\\"))
        self._values += int(np.count_nonzero(content == ord(",")))
        self._lists += int(np.count_nonzero((content | 0x20) == ord("{")))  # "[" has not that bit
        self._digits += int(np.count_nonzero(content - np.uint8(ord("0")) < 10))
        self._quotes += int(np.count_nonzero(is_quote) - np.count_nonzero(is_escaped))
        self._quotes -= bool(is_quote[0]) and self._last == ord("\\")
        self._last = piece[-1]

    @property
    def num_texts(self) -> int:
        """At least half of those that there are: a quote behind two backslashes ends a text."""
        return self._quotes // 2

    @property
    def excess(self) -> str | None:
        """What there is too much of, if anything."""
        counts = (
            (self._values, MAX_JSON_VALUES, "values"),
            (self._lists, MAX_JSON_LISTS, "lists and objects"),
            (self.num_texts, MAX_JSON_TEXTS, "names and texts"),
            (self._digits - 8 * self._values, MAX_JSON_DIGITS, "digits beyond eight of each value"),
        )
        for count, most, what in counts:
            if count > most:
                return f"the body holds {count} {what}: at most {most} are allowed"
        return None
