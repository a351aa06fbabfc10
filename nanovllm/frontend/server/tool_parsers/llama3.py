"""Llama 3: the whole answer is `{"name": …, "parameters": {…}}`, several separated by `;`."""

from collections.abc import Collection

from nanovllm.frontend.server.tool_parsers.json_calls import BLANK, JsonCall
from nanovllm.frontend.server.tool_parsers.pieces import Content, Piece

PYTHON_TAG = "<|python_tag|>"


class Llama3Parser:
    """Any answer may begin with a brace, so only the names of the request's tools make a call."""

    def __init__(self, known: Collection[str]) -> None:
        self._known = known
        self._held = ""
        self._call: JsonCall | None = None
        self._is_text = False
        self._num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        if self._is_text:
            return [Content(text)]
        pieces: list[Piece] = []
        self._held += text
        while self._held and not self._is_text:
            if self._call is None and not self._begin():
                return pieces
            if self._call is not None:
                pieces += self._inside(self._call)
        if self._is_text and self._held:
            pieces.append(Content(self._held))
            self._held = ""
        return pieces

    def finish(self) -> list[Piece]:
        held, self._held = self._held, ""
        if self._call is not None and self._call.begun:
            return self._call.finish()
        if self._call is not None:
            held = self._call.raw + held
        elif self._num_calls:
            held = held.strip(BLANK + ";,")
        return [Content(held)] if held else []

    def _begin(self) -> bool:
        """At the start, or between calls. False if more text is needed to tell."""
        blank = BLANK + ";," if self._num_calls else BLANK
        text = self._held.lstrip(blank)
        if not text or (len(text) < len(PYTHON_TAG) and PYTHON_TAG.startswith(text)):
            return False
        text = text.removeprefix(PYTHON_TAG)
        if text.lstrip().startswith("{"):
            self._call, self._held = JsonCall(self._known), text.lstrip()
        elif text.strip() or not self._held.lstrip(blank).startswith(PYTHON_TAG):
            self._is_text = True
            self._held = text if self._num_calls else self._held
        else:
            return False
        return True

    def _inside(self, call: JsonCall) -> list[Piece]:
        pieces, self._held = call.feed(self._held)
        if call.done:
            self._num_calls += 1
            self._call = None
        elif call.broken:
            self._call, self._is_text = None, True
            if not call.begun:
                self._held = call.raw + self._held
        return pieces
