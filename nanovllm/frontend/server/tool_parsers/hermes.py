"""Hermes and Qwen: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, anywhere, repeated."""

from collections.abc import Collection

from nanovllm.frontend.server.tool_parsers.json_calls import JsonCall, JsonCallArray
from nanovllm.frontend.server.tool_parsers.pieces import Content, MarkerScan, Piece, Words

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser:
    """An array of calls between the tags, as SmolLM2 writes it, is understood as well.

    Function names are taken as they come: the tags leave no doubt about what is meant.
    """

    def __init__(self, known: Collection[str]) -> None:
        self._held = ""
        self._words = Words()
        self._opening, self._ending = MarkerScan(OPEN), MarkerScan(OPEN, CLOSE)
        self._call: JsonCall | JsonCallArray | None = None
        self._in_tags = False

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        self._held += text
        while self._held:
            before = len(self._held), self._in_tags, self._call
            if not self._in_tags:
                pieces += self._outside()
            elif self._call is None:
                self._choose()
            else:
                pieces += self._inside(self._call)
            if (len(self._held), self._in_tags, self._call) == before:
                break
        return pieces

    def finish(self) -> list[Piece]:
        held, self._held = self._held, ""
        if not self._in_tags:
            return self._words.say(held) + self._words.finish()
        if self._call is None:
            return [Content(OPEN + held)]
        return self._call.finish() if self._call.begun else [Content(OPEN + self._call.raw + held)]

    def _outside(self) -> list[Piece]:
        text, self._held, marker = self._opening.cut(self._held)
        if marker is not None:
            self._in_tags, self._call = True, None
        return self._words.say(text)

    def _choose(self) -> None:
        """The first character tells one call from an array."""
        stripped = self._held.lstrip()
        if stripped:
            self._call = JsonCallArray() if stripped[0] == "[" else JsonCall()

    def _inside(self, call: JsonCall | JsonCallArray) -> list[Piece]:
        if not (call.done or call.broken):
            pieces, self._held = call.feed(self._held)
            if call.begun:
                self._words.call()
            if call.broken and not call.begun:  # no call after all
                self._in_tags, self._call = False, None
                return self._words.say(OPEN + call.raw)
            return pieces
        _, self._held, marker = self._ending.cut(self._held)
        if marker is not None:
            self._in_tags, self._call = False, None
        if marker == OPEN:  # of the next call
            self._held = OPEN + self._held
        return []
