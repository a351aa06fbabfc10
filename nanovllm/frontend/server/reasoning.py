"""Separates what a model writes between `<think>` and `</think>` from its answer.

Called by `reply_format.ReplyParser`. White space at the edges of the two parts belongs to neither.
"""

from nanovllm.frontend.server.tool_parsers.pieces import Content, MarkerScan, Piece, Reasoning

OPEN, CLOSE = "<think>", "</think>"


class ThinkSplitter:
    """inside: the prompt ended with the opening tag, so the answer begins within it."""

    def __init__(self, *, inside: bool) -> None:
        self._part = "reasoning" if inside else "start"
        self._held = ""
        self._blank = True  # nothing but white space in this part so far
        self._scan = MarkerScan(CLOSE)

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        if self._part == "start":
            self._start()
        if self._part == "reasoning":
            pieces += self._reason()
        if self._part == "answer" and self._held:
            text = self._held.lstrip() if self._blank else self._held
            self._held = ""
            if text:
                self._blank = False
                pieces.append(Content(text))
        return pieces

    def finish(self) -> list[Piece]:
        held, self._held = self._held, ""
        if self._part == "reasoning":
            words = held.strip() if self._blank else held.rstrip()
            return [Reasoning(words)] if words else []
        return [Content(held)] if held else []

    def _start(self) -> None:
        text = self._held.lstrip()
        if text.startswith(OPEN):
            self._part, self._held = "reasoning", text.removeprefix(OPEN)
        elif not OPEN.startswith(text):
            self._part, self._blank = "answer", False

    def _reason(self) -> list[Piece]:
        text, rest, marker = self._scan.cut(self._held)
        certain = text.rstrip()
        self._held = rest if marker is not None else text[len(certain) :] + rest
        words = certain.lstrip() if self._blank else certain
        pieces: list[Piece] = [Reasoning(words)] if words else []
        self._blank = self._blank and not words
        if marker is not None:
            self._part, self._blank = "answer", True
        return pieces
