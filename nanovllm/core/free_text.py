"""Text that passes freely before a grammar begins: a model's reasoning, up to its closing tag.

Owned by a `Matcher`, which begins its grammar when `take` has seen the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLTokenizer


class FreeText:
    """end: the text that ends it. It is found however it is cut into tokens."""

    __slots__ = ("_end", "_tail", "_tokenizer")

    def __init__(self, end: bytes, tokenizer: LLTokenizer, tail: bytes = b"") -> None:
        self._end = end
        self._tokenizer = tokenizer
        self._tail = tail

    def take(self, token_id: int) -> list[int] | None:
        """Take in one token. None while the end is still to come; then what stands behind it in
        the same token, as tokens of its own, without white space."""
        text = self._tail + self._tokenizer.decode_bytes([token_id])
        _, found, behind = text.partition(self._end)
        if found:
            return self._tokenizer.tokenize_bytes(behind.lstrip())
        self._tail = text[-len(self._end) + 1 :] if len(self._end) > 1 else b""
        return None

    def copy(self) -> FreeText:
        return FreeText(self._end, self._tokenizer, self._tail)
