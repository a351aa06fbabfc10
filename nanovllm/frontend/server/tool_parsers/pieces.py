"""What an answer consists of, and the shape of everything that finds it in generated text.

Invariant of all parsers: how the text is cut into pieces of `feed` does not matter, so streamed and
whole answers agree; and no text is lost, except white space and markers around calls.
"""

from typing import NamedTuple, Protocol


class Content(NamedTuple):
    """Words for the user."""

    text: str


class Reasoning(NamedTuple):
    """Words the model wrote for itself."""

    text: str


class CallBegin(NamedTuple):
    """A call of this function begins; what precedes belongs to the call before."""

    name: str


class CallArguments(NamedTuple):
    """The next characters of the call's arguments: JSON, if the model is right."""

    text: str


Piece = Content | Reasoning | CallBegin | CallArguments


class ToolParser(Protocol):
    """Of one answer."""

    def feed(self, text: str) -> list[Piece]:
        """What is certain now; the beginning of a marker is held back."""

    def finish(self) -> list[Piece]:
        """The end: what was held back."""


class MarkerScan:
    """Looks for markers in text that comes in pieces."""

    def __init__(self, *markers: str) -> None:
        self._markers = markers
        self._longest = max(map(len, markers)) - 1

    def cut(self, text: str) -> tuple[str, str, str | None]:
        """What of `text` is before the first marker, what is behind it, and that marker. If there
        is none: what cannot be the beginning of one, what may be, and None."""
        found = [(start, marker) for marker in self._markers if (start := text.find(marker)) >= 0]
        if found:
            start, marker = min(found)
            return text[:start], text[start + len(marker) :], marker
        certain = self._num_certain(text)
        return text[:certain], text[certain:], None

    def _num_certain(self, text: str) -> int:
        """How much of `text`, which holds no marker, cannot be the beginning of one."""
        for length in range(min(self._longest, len(text)), 0, -1):
            end = text[-length:]
            if any(marker.startswith(end) for marker in self._markers):
                return len(text) - length
        return len(text)


class Words:
    """Content around calls: white space next to a call, or at its edge, belongs to nobody."""

    def __init__(self) -> None:
        self._blank = ""
        self._after_call = False

    def say(self, text: str) -> list[Piece]:
        text = self._blank + text
        if self._after_call:
            text = text.lstrip()
        words = text.rstrip()
        self._blank = text[len(words) :]
        if not words:
            return []
        self._after_call = False
        return [Content(words)]

    def call(self) -> None:
        """A call begins here."""
        self._blank, self._after_call = "", True

    def finish(self) -> list[Piece]:
        blank, self._blank = self._blank, ""
        return [Content(blank)] if blank and not self._after_call else []
