"""Answers that were forced to be calls (`tool_choice` "required" or a name): plain JSON, the same
for every model."""

from collections.abc import Collection

from nanovllm.frontend.server.tool_parsers.json_calls import JsonCallArray
from nanovllm.frontend.server.tool_parsers.pieces import CallArguments, CallBegin, Content, Piece


class NamedParser:
    """All of the text is the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def feed(self, text: str) -> list[Piece]:
        if not text:
            return []
        begin: list[Piece] = [] if self._name is None else [CallBegin(self._name)]
        self._name = None
        return [*begin, CallArguments(text)]

    def finish(self) -> list[Piece]:
        return []


class RequiredParser:
    """An array of calls."""

    def __init__(self, known: Collection[str]) -> None:
        self._array = JsonCallArray(known)

    def feed(self, text: str) -> list[Piece]:
        return self._array.feed(text)[0]

    def finish(self) -> list[Piece]:
        array = self._array
        if array.begun:
            return array.finish()
        return [Content(array.raw)] if array.raw else []
