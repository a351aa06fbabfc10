"""Mistral: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or, from tokenizer v11 on,
`[TOOL_CALLS]name[ARGS]{…}`, repeated."""

import re
from collections.abc import Collection

from nanovllm.frontend.server.tool_parsers.json_calls import NO_ARGUMENTS, JsonCallArray, JsonValue
from nanovllm.frontend.server.tool_parsers.pieces import (
    CallArguments,
    CallBegin,
    Content,
    MarkerScan,
    Piece,
    Words,
)

MARKER = "[TOOL_CALLS]"
NAME = re.compile(r"\s*([^\s\[{]+)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)")
BARE_NAME = re.compile(r"\s*([^\s\[{]+)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?:null)?\s*")


class MistralParser:
    """The marker leaves no doubt, so function names are taken as they come; but where no arguments
    follow, only one of the request's tools is a call."""

    def __init__(self, known: Collection[str]) -> None:
        self._known = known
        self._held = ""
        self._words = Words()
        self._scan = MarkerScan(MARKER)
        self._marked = False
        self._array: JsonCallArray | None = None
        self._arguments: JsonValue | None = None

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        self._held += text
        while self._held:
            before = len(self._held), self._marked, self._array, self._arguments
            pieces += self._inside() if self._marked else self._outside()
            if (len(self._held), self._marked, self._array, self._arguments) == before:
                break
        return pieces

    def finish(self) -> list[Piece]:
        held, self._held = self._held, ""
        if not self._marked:
            return self._words.say(held) + self._words.finish()
        if self._arguments is not None:
            return []
        if self._array is not None and self._array.begun:
            return self._array.finish()
        raw = self._array.raw if self._array is not None else ""
        return self._bare_call(held) or [Content(MARKER + raw + held)]

    def _bare_call(self, text: str) -> list[Piece]:
        """A call that is all of `text`: a name without arguments; [] if it is none."""
        found = BARE_NAME.fullmatch(text)
        if self._array is not None or found is None or found[1] not in self._known:
            return []
        return [CallBegin(found[1]), CallArguments(NO_ARGUMENTS)]

    def _outside(self) -> list[Piece]:
        text, self._held, marker = self._scan.cut(self._held)
        if marker is not None:
            self._marked, self._array, self._arguments = True, None, None
        return self._words.say(text)

    def _inside(self) -> list[Piece]:
        if self._array is not None:
            return self._in_array(self._array)
        if self._arguments is not None:
            return self._in_arguments(self._arguments)
        if self._held.lstrip().startswith("["):
            self._array = JsonCallArray()
        elif found := NAME.match(self._held):
            self._words.call()
            self._arguments, self._held = JsonValue(), self._held[found.end() :]
            return [CallBegin(found[1])]
        elif MARKER in self._held:  # the next one: this was a call without arguments, or none
            before, _, after = self._held.partition(MARKER)
            self._marked = False
            if call := self._bare_call(before):
                self._words.call()
                self._held = MARKER + after
                return call
            return self._words.say(MARKER)
        return []

    def _in_array(self, array: JsonCallArray) -> list[Piece]:
        pieces, self._held = array.feed(self._held)
        if array.begun:
            self._words.call()
        if array.broken and not array.begun:
            self._marked = False
            return self._words.say(MARKER + array.raw)
        self._marked = not (array.done or array.broken)
        return pieces

    def _in_arguments(self, arguments: JsonValue) -> list[Piece]:
        taken = arguments.feed(self._held)
        text, self._held = self._held[:taken], self._held[taken:]
        self._marked = not arguments.done
        return [CallArguments(text)] if text else []
