"""Masks of one grammar, by where outputs are in it: for whoever comes to a place next.

`Matcher` keeps them. llguidance does not tell its state, so where an output is must be found out
beside it: `json_place` does so for schemas, `regex_place` for regular expressions; of a choice, all
of its text counts.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

MAX_BYTES = 8 << 20  # of one grammar
MAX_TEXT_BYTES = 256  # of an output of which all counts; what is longer has no key
Mask = npt.NDArray[np.int32]  # [num_words], a bit per id, lowest first


@dataclass(slots=True, eq=False)
class KeptMasks:
    """spelling: bytes of each token. longest: of any; what is farther away changes no mask."""

    spelling: list[bytes]
    longest: int
    _masks: dict[Hashable, Mask] = field(default_factory=dict, init=False)

    def get(self, key: Hashable) -> Mask | None:
        """That of a place, if it is kept. key: its `Place.key`."""
        return self._masks.get(key)

    def keep(self, key: Hashable, mask: Mask) -> None:
        """In place of the oldest, if there are too many."""
        if len(self._masks) * mask.nbytes >= MAX_BYTES:
            del self._masks[next(iter(self._masks))]
        self._masks[key] = mask


class Place(Protocol):
    """Where one output is."""

    @property
    def kept(self) -> KeptMasks: ...

    @property
    def key(self) -> Hashable:
        """Where it is equal, so are masks, but where a text is forced. None: it is not known."""

    def take(self, token_id: int) -> None:
        """Go on by a token that has been accepted."""

    def copy(self) -> Self:
        """Another one at the same place."""


class TextPlace:
    """At the beginning of an output that is one of several texts."""

    __slots__ = ("_text", "kept")

    def __init__(self, kept: KeptMasks, text: bytes = b"") -> None:
        self.kept = kept
        self._text = text

    @property
    def key(self) -> Hashable:
        """What the mask depends on; None: it is not known."""
        return self._text if len(self._text) <= MAX_TEXT_BYTES else None

    def take(self, token_id: int) -> None:
        """Go on by a token that has been accepted."""
        if len(self._text) <= MAX_TEXT_BYTES:
            self._text += self.kept.spelling[token_id]

    def copy(self) -> "TextPlace":
        """Another one at the same place."""
        return TextPlace(self.kept, self._text)
