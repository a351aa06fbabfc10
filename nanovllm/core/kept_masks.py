"""Masks of one grammar, by where outputs are in it: for whoever comes there next.

`Matcher` goes from one `State` to the next and `GrammarCompiler` gathers their masks. llguidance
does not tell its state, so where an output is must be found out beside it, byte by byte: by a
pushdown automaton that is made as outputs pass. `json_place` knows that of schemas, `regex_place`
that of regular expressions; of a choice, all of its text counts.
"""

import re
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nanovllm.protocol.plan import StepMasks

SHARE = 4  # of one grammar: no more of the lines than one of so many
MAX_SIZE = 150_000  # of what is known of one grammar, in units of 100 bytes or less: a way …
NODE_SIZE, CONTEXT_SIZE, STATE_SIZE = 6, 6, 4  # … is one
MAX_TEXT_BYTES = 256  # of an output of which all counts; what is longer has no key
FREE_LINE = 0  # the mask of an output whose grammar has not begun
PLAIN = re.compile(rb'[^"\\\x00-\x1f\x7f-\xff]+')
NO_WORDS = np.empty(0, np.int32)
Mask = npt.NDArray[np.int32]  # [num_words], a bit per id, lowest first


class Kept:
    """In which line a mask is kept; -1: in none. forced: tokens that must come next, often none;
    None while that is not known. given: the mask, if it came with the grammar."""

    __slots__ = ("forced", "given", "line")

    def __init__(self, forced: list[int] | None = None) -> None:
        self.line = -1
        self.forced = forced
        self.given: Mask | None = None


class Vocabulary:
    """The tokens, and the masks of all grammars over them, in one table.

    spelling: bytes of each token. longest: of any; what is farther away changes no mask. ways: of
    each token whose characters stand for themselves in JSON, minus their number (see `State`).
    special: ids that end an output or are no text. words: [num_lines, num_words], at `address`.
    first_spare: of the lines at the end, in which no mask is kept. versions: of each line, another
    one whenever it has been written.
    """

    def __init__(
        self,
        spelling: list[bytes],
        free: Mask,
        special: frozenset[int] = frozenset(),
        *,
        num_lines: int = 2,
        num_spare: int = 1,
    ) -> None:
        """free: the mask of `FREE_LINE`."""
        self.spelling = spelling
        self.longest = max(map(len, spelling), default=0)
        self.special = special
        self.ways = [
            -len(one) if PLAIN.fullmatch(one) and token_id not in special else None
            for token_id, one in enumerate(spelling)
        ]
        self.words = np.empty((num_lines, len(free)), np.int32)
        self.words[FREE_LINE] = free
        self.first_spare = num_lines - num_spare
        self.versions = [0] * num_lines
        self._num_writes = 0
        self.address = self.words.ctypes.data
        self._bytes = self.words.data.cast("B")
        self._line_bytes = free.nbytes
        self._owners: list[Kept | None] = [None] * self.first_spare
        self._next = FREE_LINE + 1

    def note_write(self, line: int) -> None:
        """What lies there is another mask from now on."""
        self._num_writes += 1
        self.versions[line] = self._num_writes

    def keep(self, kept: Kept, mask: Mask, mine: deque[Kept], *, in_use: list[int]) -> bool:
        """In place of the oldest: of `mine`, those of the same grammar, if it has its share. Not at
        all if that is `in_use`, by another mask of the batch; others are older then."""
        while mine and mine[0].line < 0:
            mine.popleft()
        if has_its_share := len(mine) >= max(1, self.first_spare // SHARE):
            line = mine[0].line
        else:
            line, self._next = self._next, self._next % (self.first_spare - 1) + 1
        if line in in_use:
            mine.rotate(-has_its_share)
            return False
        oldest = self._owners[line]
        if oldest is not None:
            oldest.line = -1
        self.words[line] = mask
        self.note_write(line)
        self._owners[line], kept.line = kept, line
        mine.append(kept)
        return True

    def allows(self, kept: Kept, token_id: int) -> bool:
        """Whether its mask is kept, and a token that goes on is in it."""
        line = kept.line
        if line < 0 or token_id in self.special:
            return False
        return bool(self._bytes[line * self._line_bytes + (token_id >> 3)] >> (token_id & 7) & 1)


class SentMasks:
    """Which lines of the table an executor has, and in which version."""

    def __init__(self, *, vocab_size: int) -> None:
        """vocab_size: of the model, whose masks may be shorter than the tokenizer's."""
        self._num_words = -(-vocab_size // 32)
        self._versions: dict[int, int] = {}

    def forget(self) -> None:
        """It may not have got what was sent."""
        self._versions.clear()

    def pack(self, indices: list[int], lines: list[int], vocabulary: Vocabulary) -> StepMasks:
        """The masks of a step, which is sent next: in these lines, for entries `indices`."""
        sent, versions = self._versions, vocabulary.versions
        new = list({line: None for line in lines if sent.get(line) != versions[line]})
        sent |= {line: versions[line] for line in new}
        words = vocabulary.words[new, : self._num_words] if new else NO_WORDS
        return StepMasks(indices, lines, new, words.reshape(-1).view(np.uint8).data)


def single(token_id: int, num_words: int) -> Mask:
    """The mask of a token that must come next."""
    mask = np.zeros(num_words, np.uint32)
    mask[token_id >> 5] = 1 << (token_id & 31)
    return mask.view(np.int32)


class Node:
    """Where an output is in what it writes just now, whatever that is part of.

    what: as its grammar has it. key: what of it masks depend on; None: they are not known here.
    counts: whether tokens of the same way (`KeptMasks.ways`) lead to the same places.
    after: by a byte, where it leads whatever is around.
    """

    __slots__ = ("after", "counts", "key", "what")

    def __init__(self, what: Any, key: Hashable, *, counts: bool) -> None:
        self.what = what
        self.key = key
        self.counts = counts
        self.after: dict[int, Node] = {}


class Context:
    """What is around. It and a node are all that what may follow depends on.

    what, key: as of a node. is_exact: whether the key tells all. states: of all contexts with this
    key, by their nodes. turns: by a node and a byte, where that leads from here, if it depends on
    what is around. leaps: by a state and a token, where that leads out of here.
    """

    __slots__ = ("is_exact", "key", "leaps", "states", "turns", "what")

    def __init__(
        self, what: Any, key: Hashable, states: "dict[Node, State]", *, is_exact: bool
    ) -> None:
        self.what = what
        self.key = key
        self.is_exact = is_exact
        self.states = states
        self.turns: dict[tuple[Node, int], tuple[Context, Node]] = {}
        self.leaps: dict[tuple[State, int], tuple[Context, State]] = {}


class State:
    """A node in contexts of one key, where outputs have been.

    next: where tokens lead that do not lead out of the context, by way where those count, or token.
    """

    __slots__ = ("kept", "next", "node")

    def __init__(self, node: Node, kept: Kept) -> None:
        self.node = node
        self.kept = kept
        self.next: dict[int | None, State] = {}


NOWHERE = Node(None, None, counts=False)
END = State(NOWHERE, Kept())  # where a token leads that ends the output


class KeptMasks:
    """What is known of one grammar. Of one of this class it is the first mask: its outputs cannot
    be followed.

    Where keys are equal, masks are, and so is what must follow, unless that is long. How a text
    that must follow is cut into tokens may depend on the token before, besides: then all do as the
    first that has come there.
    """

    def __init__(self, vocabulary: Vocabulary, what: Any = None) -> None:
        """what: the node where all outputs begin."""
        self.vocabulary = vocabulary
        self.ways: Sequence[int | None] | dict[int, int | None] = vocabulary.ways
        self.mine = deque[Kept]()  # those in lines, oldest first
        self._nodes: dict[Any, Node] = {}
        self._contexts: dict[Any, Context] = {}
        self._states: dict[Hashable, dict[Node, State]] = {}  # by the keys of contexts
        self._kept: dict[Hashable, Kept] = {}  # by the keys of context and node
        self._size = 0
        self.root = self.context(None)
        self.first = State(self.node(what), Kept())

    # ---- what each kind of grammar knows

    def inside(self, node: Node, byte: int) -> Node | None:
        """Where a byte leads whatever is around; None if that counts, or it is not known."""
        return None

    def across(self, context: Context, node: Node, byte: int) -> tuple[Context, Node] | None:
        """Where it leads if what is around counts; None if it is not known."""
        return None

    def key(self, what: Any) -> Hashable:
        """Of a node."""
        return None

    def counts(self, what: Any) -> bool:
        """Of a node."""
        return False

    def context_key(self, what: Any) -> tuple[Hashable, bool]:
        """Of a context, and whether it tells all."""
        return None, True

    # ---- the automaton

    def node(self, what: Any) -> Node:
        """The one that is this."""
        found = self._nodes.get(what)
        if found is None:
            self._size += NODE_SIZE
            found = self._nodes[what] = Node(what, self.key(what), counts=self.counts(what))
        return found

    def context(self, what: Any) -> Context:
        """The one that is this; None is around the whole output."""
        found = self._contexts.get(what)
        if found is None:
            self._size += CONTEXT_SIZE
            key, is_exact = self.context_key(what)
            states = self._states.setdefault(key, {})
            found = self._contexts[what] = Context(what, key, states, is_exact=is_exact)
        return found

    def walk(self, context: Context, node: Node, token_id: int) -> tuple[Context, Node] | None:
        """Where a token leads; None if that is not known."""
        if self._size > MAX_SIZE:
            self._forget()
        for byte in self.vocabulary.spelling[token_id]:
            to = node.after.get(byte)
            if to is None:
                turn = context.turns.get((node, byte)) or self._step(context, node, byte)
                if turn is None:
                    return None
                context, to = turn
            node = to
        return context, node

    def _step(self, context: Context, node: Node, byte: int) -> tuple[Context, Node] | None:
        """One of `walk`, for the first time."""
        self._size += 1
        to = self.inside(node, byte)
        if to is not None:
            node.after[byte] = to
            return context, to
        turn = self.across(context, node, byte)
        if turn is not None:
            context.turns[node, byte] = turn
        return turn

    def _forget(self) -> None:
        """Begin anew: outputs find no way on from where they are but to what is found out again."""
        for node in self._nodes.values():
            node.after.clear()
        for context in self._contexts.values():
            context.turns.clear()
            context.leaps.clear()
        for states in self._states.values():
            for state in states.values():
                state.next.clear()
            states.clear()
        self.first.next.clear()
        for known in (self._nodes, self._contexts, self._states, self._kept):
            known.clear()
        self._size = 0

    # ---- states

    def find(self, context: Context, state: State, token_id: int) -> tuple[Context, State] | None:
        """Where a token leads that has not been taken there before; None if it may not come there,
        or nobody has been where as much may follow."""
        if not self.vocabulary.allows(state.kept, token_id):
            return None
        found = self.walk(context, state.node, token_id)
        if found is None:
            return None
        to = self._state_at(*found)
        if to is None:
            return None
        if found[0] is context:
            self.lead(state, token_id, to)
        else:
            self._size += 2
            context.leaps[state, token_id] = found[0], to
        return found[0], to

    def arrive(self, context: Context, node: Node) -> State:
        """The state of an output that llguidance has let come to where masks have a key."""
        self._kept.setdefault((context.key, node.key), Kept())
        state = self._state_at(context, node)
        assert state is not None
        return state

    def _state_at(self, context: Context, node: Node) -> State | None:
        found = context.states.get(node)
        if found is None and (kept := self._kept.get((context.key, node.key))) is not None:
            self._size += STATE_SIZE
            found = context.states[node] = State(node, kept)
        return found

    def lead(self, state: State, token_id: int, to: State) -> None:
        """Note where a token leads, within one context."""
        self._size += 1
        way = self.ways[token_id] if state.node.counts else None
        state.next[way or token_id] = to

    def note_forced(
        self, context: Context, state: State, token_ids: list[int], *, num_bytes: int
    ) -> None:
        """What must come next in a state of which that was not known. num_bytes: of the text that
        must; if it is long, what keys do not tell counts as well."""
        if num_bytes < self.vocabulary.longest:
            state.kept.forced = token_ids
        elif context.is_exact:
            state.kept = Kept(token_ids)


class TextMasks(KeptMasks):
    """Of a choice of texts: a node is all that has been written."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary, b"")

    def key(self, what: bytes) -> Hashable:
        """See `KeptMasks`."""
        return what if len(what) <= MAX_TEXT_BYTES else None

    def inside(self, node: Node, byte: int) -> Node:
        """See `KeptMasks`."""
        return node if node.key is None else self.node(node.what + bytes((byte,)))
