"""Calls written as JSON objects, read while they are being written.

`{"name": "f", "arguments": {…}}` becomes `CallBegin("f")` as soon as the name is there, then the
arguments' own characters as they come; a call without arguments, or with null, gets "{}". Used by
the parsers of all formats.
"""

import json
from collections.abc import Collection
from typing import Literal

from nanovllm.frontend.server.tool_parsers.pieces import CallArguments, CallBegin, Piece

ARGUMENT_KEYS = ("arguments", "parameters")
NO_ARGUMENTS = "{}"
BLANK = " \t\r\n"


class JsonValue:
    """Finds the end of one JSON value. It looks at brackets and quotes only."""

    def __init__(self) -> None:
        self.done = False
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._scalar = False

    def feed(self, text: str) -> int:
        """How many of these characters belong to the value, of which `text` is the next part."""
        for index, char in enumerate(text):
            if self._scalar:
                if char in BLANK or char in ",]}":
                    self.done = True
                    return index
            elif self._in_string:
                self._in_string_char(char)
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
            elif not self._depth:
                self._scalar = True
            if not (self._depth or self._in_string or self._scalar):
                self.done = True
                return index + 1
        return len(text)

    def _in_string_char(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False


class JsonCall:
    """Reads one call object. `known`: only functions of these names count, if given.

    Ends `done`, or `broken` if it is no call after all: `raw` is then what it was instead.
    """

    def __init__(self, known: Collection[str] | None = None) -> None:
        self.raw = ""
        self.begun = self.done = self.broken = False
        self._known = known
        self._expect: Literal["{", "key", ":", "value", ","] = "{"
        self._key = ""
        self._value = JsonValue()
        self._start = 0  # of the key or value in `raw`
        self._waiting = ""  # arguments that came before the name
        self._has_arguments = False

    def feed(self, text: str) -> tuple[list[Piece], str]:
        """What is certain now, and the text behind the object."""
        pieces: list[Piece] = []
        while text and not (self.done or self.broken):
            if self._expect in ("key", "value") and self._inside(text):
                taken = self._value.feed(text)
                self._take(text[:taken], pieces)
                text = text[taken:]
            else:
                if self._punctuation(text[0]):
                    self.raw += text[0]
                    text = text[1:]
        if self.done or self.broken:
            pieces += self.finish()
        return pieces, text

    def finish(self) -> list[Piece]:
        """The end of the call, by its own brace or because no more text comes. What is cut off
        within a key or value stays as it is: it may have been arguments."""
        is_whole = self.done or self.broken or self._expect == ","
        if not self.begun or self._has_arguments or not is_whole:
            return []
        self._has_arguments = True
        return [CallArguments(NO_ARGUMENTS)]

    def _inside(self, text: str) -> bool:
        """Whether a key or value goes on or begins here."""
        if len(self.raw) > self._start:
            return True
        return text[0] == '"' if self._expect == "key" else text[0] not in BLANK

    def _punctuation(self, char: str) -> bool:
        """Between keys and values. False if it is not part of the object."""
        if char in BLANK:
            self._start = len(self.raw) + 1
            return True
        following: dict[tuple[str, str], Literal["key", "value", ","]] = {
            ("{", "{"): "key",
            (":", ":"): "value",
            (",", ","): "key",
        }
        if char == "}" and self._expect in ("key", ","):
            self.done = self.begun
            self.broken = not self.begun
            return True
        if (self._expect, char) not in following:
            self.broken = True
            return False
        self._expect = following[self._expect, char]
        self._value, self._start = JsonValue(), len(self.raw) + 1
        return True

    def _take(self, text: str, pieces: list[Piece]) -> None:
        self.raw += text
        is_arguments = self._expect == "value" and self._key in ARGUMENT_KEYS
        if is_arguments and self.raw[self._start] in "{[":
            self._argue(text, pieces)
        if self._value.done:
            self._end(self.raw[self._start :], pieces)

    def _end(self, raw: str, pieces: list[Piece]) -> None:
        """A key or value is complete."""
        if self._expect == "key":
            self._key = _string(raw) or ""
            self._expect = ":"
            return
        self._expect = ","
        if self._key == "name":
            name = _string(raw)
            if name is None or (self._known is not None and name not in self._known):
                self.broken = not self.begun
            elif not self.begun:
                self.begun = True
                pieces.append(CallBegin(name))
                self._argue(self._waiting, pieces)
        elif self._key in ARGUMENT_KEYS and raw[0] not in "{[":
            text = _string(raw) if raw.startswith('"') else raw  # JSON within JSON, or a scalar
            if text not in (None, "null"):
                self._argue(text.strip(), pieces)

    def _argue(self, text: str, pieces: list[Piece]) -> None:
        self._has_arguments = self._has_arguments or bool(text)
        if not self.begun:
            self._waiting += text
        elif text:
            pieces.append(CallArguments(text))


class JsonCallArray:
    """Reads `[{…}, {…}]`. Ends `done`, or `broken` if it is none: `raw` is what it was instead."""

    def __init__(self, known: Collection[str] | None = None) -> None:
        self.raw = ""
        self.begun = self.done = self.broken = False
        self._known = known
        self._opened = False
        self._call: JsonCall | None = None

    def feed(self, text: str) -> tuple[list[Piece], str]:
        """What is certain now, and the text behind the array."""
        pieces: list[Piece] = []
        while text and not (self.done or self.broken):
            if self._call is None:
                text = self._between(text)
                continue
            found, rest = self._call.feed(text)
            self.raw += text[: len(text) - len(rest)]
            pieces, text = pieces + found, rest
            self.begun = self.begun or self._call.begun
            if self._call.broken:
                self.broken = True
            elif self._call.done:
                self._call = None
        return pieces, text

    def finish(self) -> list[Piece]:
        """No more text comes."""
        return [] if self._call is None else self._call.finish()

    def _between(self, text: str) -> str:
        char = text[0]
        if self._opened and char == "{":
            self._call = JsonCall(self._known)
            return text
        if char in BLANK or (self._opened and char == ","):
            pass
        elif not self._opened and char == "[":
            self._opened = True
        elif self._opened and char == "]":
            self.done = True
        else:
            self.broken = True
            return text
        self.raw += char
        return text[1:]


def _string(raw: str) -> str | None:
    """A JSON string's value, if it is one."""
    try:
        value = json.loads(raw)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
