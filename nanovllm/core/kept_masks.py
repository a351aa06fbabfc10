"""Masks of one grammar, by where outputs are in it: for whoever comes to a place next.

`Matcher` goes from one `State` to the next and `GrammarCompiler` gathers their masks. llguidance
does not tell its state, so where an output is must be found out beside it: `json_place` does so for
schemas, `regex_place` for regular expressions; of a choice, all of its text counts.
"""

import re
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

MAX_BYTES = 64 << 20  # of the masks of all grammars
MAX_LINES = 16_384  # of them
SHARE = 4  # of one grammar: no more of the lines than one of so many
MAX_STATES = 8_000  # of one grammar: under 1 kB each …
MAX_TRANSITIONS = 50_000  # … and from one to another: 100 bytes each
MAX_TEXT_BYTES = 256  # of an output of which all counts; what is longer has no key
FREE_LINE = 0  # the mask of an output whose grammar has not begun
NO_TOKEN = -1
PLAIN = re.compile(rb'[^"\\\x00-\x1f\x7f-\xff]+')
Mask = npt.NDArray[np.int32]  # [num_words], a bit per id, lowest first


class Kept:
    """In which line a mask is kept; -1: in none. spare: the mask, if it came with the grammar."""

    __slots__ = ("line", "spare")

    def __init__(self, spare: Mask | None = None) -> None:
        self.line = -1
        self.spare = spare


class Vocabulary:
    """The tokens, and the masks of all grammars over them: in one array, so that those of a batch
    are gathered by one call.

    spelling: bytes of each token. longest: of any; what is farther away changes no mask. ways: of
    each token whose characters stand for themselves in JSON, minus their number (see `State`).
    special: ids that end an output or are no text. words: [num_lines, num_words].
    """

    def __init__(
        self, spelling: list[bytes], free: Mask, special: frozenset[int] = frozenset()
    ) -> None:
        """free: the mask of `FREE_LINE`."""
        self.spelling = spelling
        self.longest = max(map(len, spelling), default=0)
        self.special = special
        self.ways = [
            -len(one) if PLAIN.fullmatch(one) and token_id not in special else None
            for token_id, one in enumerate(spelling)
        ]
        num_lines = max(2 * SHARE, min(MAX_LINES, MAX_BYTES // free.nbytes))
        self.words = np.empty((num_lines, len(free)), np.int32)
        self.words[FREE_LINE] = free
        self.of_nobody = deque[Kept]()  # those that belong to no grammar
        self._bytes = self.words.data.cast("B")
        self._line_bytes = free.nbytes
        self._owners: list[Kept | None] = [None] * num_lines
        self._next = FREE_LINE + 1
        self._single: dict[int, Kept] = {}

    def keep(self, kept: Kept, mask: Mask, mine: deque[Kept]) -> None:
        """In place of the oldest: of `mine`, those of the same grammar, if it has its share."""
        while mine and mine[0].line < 0:
            mine.popleft()
        if len(mine) >= len(self._owners) // SHARE:
            line = mine[0].line
        else:
            line, self._next = self._next, self._next % (len(self._owners) - 1) + 1
        oldest = self._owners[line]
        if oldest is not None:
            oldest.line = -1
        self.words[line] = mask
        self._owners[line], kept.line = kept, line
        mine.append(kept)

    def single(self, token_id: int) -> Kept:
        """The mask of a token that must come next."""
        kept = self._single.setdefault(token_id, Kept())
        if kept.line < 0:
            mask = np.zeros(self.words.shape[1], np.uint32)
            mask[token_id >> 5] = 1 << (token_id & 31)
            self.keep(kept, mask.view(np.int32), self.of_nobody)
        return kept

    def allows(self, kept: Kept, token_id: int) -> bool:
        """Whether its mask is kept, and a token that goes on is in it."""
        line = kept.line
        if line < 0 or token_id in self.special:
            return False
        return bool(self._bytes[line * self._line_bytes + (token_id >> 3)] >> (token_id & 7) & 1)


class State:
    """One place in a grammar, where outputs have been, and where tokens have led from it.

    place: None if it cannot be followed from here. kept: its mask. forced: the tokens that must
    come next, often none; None while that is not known, nor the mask. last: the token that led
    here, where that counts. next: by a token, or by minus the number of its characters where
    nothing else counts.
    """

    __slots__ = ("forced", "kept", "last", "next", "place")

    def __init__(
        self, place: "Place | None", kept: Kept, forced: list[int] | None, last: int = NO_TOKEN
    ) -> None:
        self.place = place
        self.kept = kept
        self.forced = forced
        self.last = last
        self.next: dict[int | None, State] = {}


END = State(None, Kept(), None)  # where a token leads that ends the output


@dataclass(slots=True, eq=False)
class KeptMasks:
    """What is known of one grammar.

    Where keys are equal, masks are, and whether a text must follow. Where it must, what masks are
    depends on the last token, too, unless llguidance finds no tokens that it must be.
    """

    vocabulary: Vocabulary
    mine: deque[Kept] = field(default_factory=deque, init=False)  # those in lines, oldest first
    _free: dict[Hashable, Kept] = field(
        default_factory=dict, init=False
    )  # by key: none must follow
    _bound: dict[Hashable, Kept] = field(default_factory=dict, init=False)  # by key: some text must
    _forced: dict[tuple[Hashable, int], tuple[Kept, list[int]]] = field(
        default_factory=dict, init=False
    )  # by such a key and the last token
    _states: dict[Hashable, State] = field(default_factory=dict, init=False)  # by `Place.exact`
    _num_transitions: int = field(default=0, init=False)

    @property
    def first(self) -> State:
        """Where all outputs begin."""
        return self._states[FIRST]

    def begin(self, place: "Place | None") -> None:
        """place: of outputs that have not begun; None if they cannot be followed."""
        self._states[FIRST] = State(place, Kept(), None)

    def arrive(
        self, state: State | None, token_id: int, place: "Place", *, is_forced: bool
    ) -> State | None:
        """Where an output is that has gone on by a token; None if that is not known. It goes on.

        state: where it came from, if known. place: behind the token, for the state to have.
        is_forced: whether some text must follow.
        """
        if place.exact is None:
            return None
        key = place.key
        if len(self._free) + len(self._bound) >= MAX_STATES:
            self._states, self._free, self._bound, self._forced = self._cut(), {}, {}, {}
        (self._bound if is_forced else self._free).setdefault(key, Kept())
        found = self._state_at(place, key, token_id, is_forced=is_forced)
        if state is not None:
            self.lead(state, token_id, found, is_forced=is_forced)
        return found

    def find(self, state: State, token_id: int) -> State | None:
        """Where a token leads that has not been taken there before; None if it may not come there,
        or nobody has been where as much may follow."""
        if state.place is None or not self.vocabulary.allows(state.kept, token_id):
            return None
        place = state.place.copy()
        place.take(token_id)
        key = place.key
        is_forced = key in self._bound
        if place.exact is None or not (is_forced or key in self._free):
            return None
        found = self._state_at(place, key, token_id, is_forced=is_forced)
        self.lead(state, token_id, found, is_forced=is_forced)
        return found

    def _state_at(self, place: "Place", key: Hashable, token_id: int, *, is_forced: bool) -> State:
        way: Hashable = (place.exact, token_id) if is_forced else place.exact
        found = self._states.get(way)
        if found is not None:
            return found
        if len(self._states) >= MAX_STATES:
            self._states = self._cut()
        if not is_forced:
            found = State(place, self._free[key], [])
        elif (known := self._forced.get((key, token_id))) is not None:
            found = State(place, *known, token_id)
        else:
            found = State(place, Kept(), None, token_id)
        self._states[way] = found
        return found

    def note_forced(self, state: State, token_ids: list[int], *, num_bytes: int) -> None:
        """What must come next in a state of which that was not known. num_bytes: of the text that
        must; if it is long, what keys do not tell counts as well."""
        state.forced = token_ids
        if token_ids:
            state.kept = self.vocabulary.single(token_ids[0])
        if state.place is None or state.last == NO_TOKEN or num_bytes >= self.vocabulary.longest:
            return
        key = state.place.key
        if not token_ids:
            state.kept = self._bound.setdefault(key, state.kept)
        if len(self._forced) >= MAX_TRANSITIONS:
            self._forced.clear()
        self._forced[key, state.last] = state.kept, token_ids

    def lead(self, state: State, token_id: int, to: State, *, is_forced: bool) -> None:
        """Note where a token leads. is_forced: by itself, and not by its length alone."""
        if self._num_transitions >= MAX_TRANSITIONS:
            self._cut()
        self._num_transitions += 1
        length = 0 if is_forced or state.place is None else state.place.num_plain(token_id)
        state.next[-length or token_id] = to

    def _cut(self) -> dict[Hashable, State]:
        """Forget where tokens lead. Returns the first state, to begin anew with: outputs in others
        find no way on from there but to new ones."""
        self._num_transitions = 0
        for state in self._states.values():
            state.next.clear()
        return {FIRST: self.first}


FIRST = "first"  # the key of the state where outputs begin


class Place(Protocol):
    """Where one output is."""

    @property
    def kept(self) -> KeptMasks: ...

    @property
    def key(self) -> Hashable:
        """Where it is equal, so are masks, but where a text is forced. None: it is not known."""

    @property
    def exact(self) -> Hashable:
        """Where it is equal, so is all that may follow. None: it is not known."""

    def num_plain(self, token_id: int) -> int:
        """Characters of a token of which only their number counts here; 0 if more does."""

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
        """See `Place`."""
        return self._text if len(self._text) <= MAX_TEXT_BYTES else None

    exact = key

    def num_plain(self, token_id: int) -> int:
        """See `Place`."""
        return 0

    def take(self, token_id: int) -> None:
        """Go on by a token that has been accepted."""
        if len(self._text) <= MAX_TEXT_BYTES:
            self._text += self.kept.vocabulary.spelling[token_id]

    def copy(self) -> "TextPlace":
        """Another one at the same place."""
        return TextPlace(self.kept, self._text)
