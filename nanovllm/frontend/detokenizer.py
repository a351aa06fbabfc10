"""Token ids to text as they come: whole characters only, and cut exactly at stop strings.

`Completion` calls it with every new token. Invariant: text handed out is never taken back, and all
of it joined equals decoding all ids at once.
"""

import codecs
from collections.abc import Sequence
from typing import Protocol

from nanovllm.frontend.tokenizer import Tokenizer


class Detokenizer(Protocol):
    """The text of one growing sequence of token ids."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """What these ids add; the beginning of an unfinished character is held back."""

    def flush(self) -> str:
        """The end: an unfinished character becomes U+FFFD."""


class TokenBytes(dict[int, bytes]):
    """Token id to bytes, filled as needed; one per tokenizer and way of decoding."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()

    def __missing__(self, token_id: int) -> bytes:
        piece = b"" if token_id in self._skipped else self._tokenizer.token_bytes(token_id)
        self[token_id] = piece
        return piece


class ByteDetokenizer:
    """For byte-level vocabularies, where the text is the concatenated bytes of the tokens.

    Python's "replace" and Rust's lossy conversion agree on what becomes U+FFFD (both replace
    maximal subparts, Unicode 15 §3.9), so this equals `Tokenizer.decode`.
    """

    __slots__ = ("_pieces", "_unfinished")

    def __init__(self, pieces: TokenBytes) -> None:
        self._pieces = pieces
        self._unfinished = b""

    def feed(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        content = self._unfinished + b"".join([pieces[token_id] for token_id in token_ids])
        text, num_bytes = codecs.utf_8_decode(content, "replace", False)
        self._unfinished = content[num_bytes:]
        return text

    def flush(self) -> str:
        text, _ = codecs.utf_8_decode(self._unfinished, "replace", True)
        self._unfinished = b""
        return text


class WindowDetokenizer:
    """For all other vocabularies: decodes a short window twice and hands out the difference.

    The window begins with the tokens of the last piece handed out, because what a token looks like
    may depend on whether something stands before it (SentencePiece drops a leading space).
    An ill-formed run of byte tokens may show another number of U+FFFD than decoding all at once.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._num_given = 0  # tokens of the window that have been handed out

    def feed(self, token_ids: Sequence[int]) -> str:
        window = self._window
        window += [token_id for token_id in token_ids if token_id not in self._skipped]
        # A character has at most four bytes, so at most three tokens can be the beginning of one.
        for num_open in range(4):
            text = self._new_text(len(window) - num_open)
            if not text.endswith("\ufffd"):
                return self._give(text, len(window) - num_open)
        return self._give(self._new_text(len(window)), len(window))  # ill-formed: no use waiting

    def flush(self) -> str:
        return self._give(self._new_text(len(self._window)), len(self._window))

    def _new_text(self, end: int) -> str:
        """What the window's tokens up to `end` add to those handed out."""
        if end <= self._num_given:
            return ""
        decode, window = self._tokenizer.decode, self._window
        given = decode(window[: self._num_given], skip_special_tokens=False)
        return decode(window[:end], skip_special_tokens=False)[len(given) :]

    def _give(self, text: str, end: int) -> str:
        if text:  # tokens without text stay in front of the next piece: they may not be context
            del self._window[: self._num_given]
            self._num_given = end - self._num_given
        return text


class DetokenizerFactory:
    """Makes the detokenizers of one tokenizer; those of byte-level ones share two tables."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._tables = {
            skip: TokenBytes(tokenizer, skip_special_tokens=skip) for skip in (False, True)
        }

    def make(self, *, skip_special_tokens: bool) -> Detokenizer:
        if self.tokenizer.byte_level:
            return ByteDetokenizer(self._tables[skip_special_tokens])
        return WindowDetokenizer(self.tokenizer, skip_special_tokens=skip_special_tokens)


class StopStrings:
    """Finds the stop string that is completed first, and holds back only what may become one.

    Of several completed by the same character the longest counts. Thus the result does not depend
    on how the text is cut into tokens.
    """

    __slots__ = ("_held", "_include", "_stops")

    def __init__(self, stops: Sequence[str], *, include_in_output: bool) -> None:
        self._stops = stops
        self._include = include_in_output
        self._held = ""

    def feed(self, text: str, *, look: bool = True) -> tuple[str, str | None]:
        """The text that is certain now, and the stop string that ended it, if one did.

        look: False (until min_tokens) means that a stop string ending in `text` does not count.
        """
        num_held = len(self._held)
        text = self._held + text
        if look and (match := self._first_match(text, num_held)) is not None:
            end, stop = match
            self._held = ""
            return text[: end if self._include else end - len(stop)], stop
        num_certain = len(text) - self._num_ambiguous(text)
        self._held = text[num_certain:]
        return text[:num_certain], None

    def flush(self) -> str:
        """What was held back, when no more text can come."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str, num_held: int) -> tuple[int, str] | None:
        """(end, stop string) of the match to end first among those that end in new text."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop, max(0, num_held - len(stop) + 1))
            if start >= 0:
                candidate = (start + len(stop), start, stop)
                best = candidate if best is None else min(best, candidate)
        return None if best is None else (best[0], best[2])

    def _num_ambiguous(self, text: str) -> int:
        """Length of the longest suffix of `text` that a stop string, not yet whole, begins with."""
        longest = max(map(len, self._stops)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            suffix = text[-length:]
            if any(len(stop) > length and stop.startswith(suffix) for stop in self._stops):
                return length
        return 0
