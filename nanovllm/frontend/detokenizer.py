"""Token ids to text as they come: whole characters only, and cut exactly at stop strings.

`Completion` calls it with every new token. It begins after the prompt, which tells whether a first
space counts and may end within a character. Text handed out is never taken back, and joined it is
what `tokenizers.DecodeStream` makes of the same ids after the same prompt.
"""

import codecs
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from nanovllm.frontend.tokenizer import PieceSpelling, Tokenizer

REPLACEMENT = "\ufffd"
MAX_CHARACTER_BYTES = 4
NUM_CONTEXT_TOKENS = 6  # of a prompt: enough for a window to begin with something that is text


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

    def __init__(self, pieces: TokenBytes, prompt_token_ids: Sequence[int] = ()) -> None:
        self._pieces = pieces
        self._unfinished = b""
        start, num_bytes = len(prompt_token_ids), 0
        while start and num_bytes < MAX_CHARACTER_BYTES:
            start -= 1
            num_bytes += len(pieces[prompt_token_ids[start]])
        self.feed(prompt_token_ids[start:])

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


class TokenPieces(dict[int, "str | int | None"]):
    """Token id to characters or to one byte, None if it is skipped; filled as needed."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()

    def __missing__(self, token_id: int) -> str | int | None:
        skipped = token_id in self._skipped
        piece = self[token_id] = None if skipped else self._tokenizer.token_piece(token_id)
        return piece


class PieceDetokenizer:
    """For SentencePiece's vocabularies: words with their spaces, and bytes where no word fits.

    Only the beginning of a whole text loses a space, so a completion keeps its first one wherever
    its prompt has any text. A run of byte tokens that is no UTF-8 becomes one U+FFFD per byte, from
    the first byte that is wrong to the end of the run, as in `tokenizers`' ByteFallback.
    """

    __slots__ = ("_is_ill_formed", "_num_to_strip", "_pieces", "_stripped", "_unfinished")

    def __init__(
        self, pieces: TokenPieces, spelling: PieceSpelling, prompt_token_ids: Sequence[int]
    ) -> None:
        self._pieces = pieces
        self._stripped = spelling.stripped
        self._num_to_strip = spelling.num_stripped
        self._unfinished = b""  # bytes of the present run that are no text yet
        self._is_ill_formed = False  # the present run of bytes
        run: list[int] = []
        for token_id in reversed(prompt_token_ids):
            piece = pieces[token_id]
            if piece is not None:
                self._num_to_strip = 0 if piece != "" else self._num_to_strip
                if isinstance(piece, int):
                    run.append(token_id)
                elif run or piece:
                    break
        self.feed(run[::-1])

    def feed(self, token_ids: Sequence[int]) -> str:
        found = []
        for token_id in token_ids:
            piece = self._pieces[token_id]
            if isinstance(piece, str):
                if self._unfinished or self._is_ill_formed:
                    found.append(self._end_run())
                found.append(piece)
            elif piece is not None:
                found.append(self._add_byte(piece))
        text = "".join(found)
        return self._without_first_space(text) if self._num_to_strip and text else text

    def flush(self) -> str:
        return self._end_run()  # bytes that were no text yet: no space is among them

    def _add_byte(self, byte: int) -> str:
        if self._is_ill_formed:
            return REPLACEMENT
        content = self._unfinished + bytes([byte])
        try:
            text, num_bytes = codecs.utf_8_decode(content, "strict", False)
        except UnicodeDecodeError:
            self._unfinished, self._is_ill_formed = b"", True
            return REPLACEMENT * len(content)
        if text.endswith(REPLACEMENT):  # well-formed, but three of them if the run is not
            text, num_bytes = "", 0
        self._unfinished = content[num_bytes:]
        return text

    def _end_run(self) -> str:
        content, self._unfinished, self._is_ill_formed = self._unfinished, b"", False
        try:
            return content.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(content)

    def _without_first_space(self, text: str) -> str:
        num_found = 0
        while num_found < self._num_to_strip and text[num_found : num_found + 1] == self._stripped:
            num_found += 1
        self._num_to_strip = 0
        return text[num_found:]


class WindowDetokenizer:
    """For all other vocabularies: decodes a short window twice and hands out the difference.

    The window begins with the tokens of the last piece handed out, or the prompt's last ones,
    because what a token looks like may depend on whether something stands before it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []
        for token_id in reversed(prompt_token_ids):
            if len(self._window) == NUM_CONTEXT_TOKENS:
                break
            if token_id not in self._skipped:
                self._window.insert(0, token_id)
        self._num_given = len(self._window)  # tokens of the window that have been handed out

    def feed(self, token_ids: Sequence[int]) -> str:
        window = self._window
        window += [token_id for token_id in token_ids if token_id not in self._skipped]
        # A character has at most four bytes, so at most three tokens can be the beginning of one.
        for num_open in range(MAX_CHARACTER_BYTES):
            text = self._new_text(len(window) - num_open)
            if not text.endswith(REPLACEMENT):
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
    """Makes the detokenizers of one tokenizer; those of one kind share a table of its tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._makers = {skip: _maker(tokenizer, skip_special_tokens=skip) for skip in (False, True)}

    def make(
        self, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool
    ) -> Detokenizer:
        """Of an output that goes on from the prompt."""
        return self._makers[skip_special_tokens](prompt_token_ids)


def _maker(
    tokenizer: Tokenizer, *, skip_special_tokens: bool
) -> Callable[[Sequence[int]], Detokenizer]:
    """What makes a detokenizer behind a prompt, of the kind that the vocabulary allows."""
    skip = skip_special_tokens
    if tokenizer.byte_level:
        return partial(ByteDetokenizer, TokenBytes(tokenizer, skip_special_tokens=skip))
    if tokenizer.piece_spelling is not None:
        pieces = TokenPieces(tokenizer, skip_special_tokens=skip)
        return partial(PieceDetokenizer, pieces, tokenizer.piece_spelling)
    return partial(WindowDetokenizer, tokenizer, skip_special_tokens=skip)


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
