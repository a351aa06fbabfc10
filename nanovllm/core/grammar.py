"""Structured output by llguidance: from what a request asks to which tokens may come next.

`Compilations` calls `GrammarCompiler` in threads; each `Sequence` owns a `Matcher`, which
`Scheduler.update` advances; `EngineCore` calls `begin_masks` for the sequences a step samples
for. llguidance (Earley parsing over lexer derivatives) is imported with the first such request.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol
from weakref import WeakSet

import msgspec
import numpy as np
import numpy.typing as npt

from nanovllm.core.free_text import FreeText
from nanovllm.core.grammar_sandbox import GrammarSandbox
from nanovllm.core.grammar_source import Source, first_line, make_matcher, make_tokenizer, read
from nanovllm.core.json_place import JsonMasks
from nanovllm.core.json_shape import shape_of
from nanovllm.core.kept_masks import (
    END,
    FREE_LINE,
    Context,
    Kept,
    KeptMasks,
    Mask,
    Node,
    State,
    TextMasks,
    Vocabulary,
    single,
)
from nanovllm.core.plain_schema import plain_source
from nanovllm.core.regex_place import RegexMasks, term_of
from nanovllm.protocol.plan import WorkerInfo, num_mask_lines
from nanovllm.sampling_params import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

TokenizerSource = Callable[[], str]  # the model's tokenizer, as the text of a tokenizer.json
Words = npt.NDArray[np.int32]  # masks: [num_matchers, num_words], a bit per id, lowest first
MAX_COPIES = 64
MAX_LEXERS = min(8, max(1, (os.cpu_count() or 1) // 2))  # of one grammar: each serves one thread
COPIES_PER_LEXER = 8  # live ones of a grammar, until it has as many lexers as it may
FEW = 4  # matchers whose masks are not worth waking other threads for
LOOK_FIRST = 2 * COPIES_PER_LEXER  # fewer are asked what they force before their masks are made
MAX_FORCED = 64  # tokens that a grammar forces which are looked for at a time
MAX_OWED = 2_048  # tokens of which llguidance is told later: 1 µs each
WORTH_A_THREAD_S = 3e-4  # masks that take longer are computed beside the loop: it costs 70 µs
SLOW_S = 0.01  # a mask or a token accepted that takes longer is held against its output …
LOOK_INTERVAL = 16  # batches from one search for slow ones that found none to the next
MAX_SLOW_S = 1.0  # … which ends when it has come to so much: others wait meanwhile


@dataclass(slots=True, eq=False)
class Family:
    """What copies of a matcher have in common: llguidance lets them share the lexer's states, so
    that one's masks are quick where another has been, its limits as well, and a lock: of one family
    only one mask is computed at a time."""

    known: KeptMasks  # of the grammar
    num_copies: int = 0  # ever made
    failed: bool = False
    live: WeakSet[Matcher] = field(default_factory=WeakSet)  # those that somebody still holds

    @property
    def is_spent(self) -> bool:
        """Whether it is time for a fresh lexer: after an error, or many copies."""
        return self.failed or self.num_copies >= MAX_COPIES


class Matcher:
    """Where one output is in its grammar. Once ended, by whatever reason, it stays so.

    Where others have been before, its tokens are only noted down, and llguidance takes them in when
    there is something to ask of it.

    free_text: what comes before the grammar begins; None from then on. state: where it is in its
    context, if that is known; else it may come from node to a state again. context: None if it
    cannot be followed any more.
    """

    __slots__ = (
        *("__weakref__", "_is_suspect", "_matcher", "_owed", "_slow_s", "_ways"),
        *("context", "error", "family", "free_text", "node", "state"),
    )

    def __init__(
        self, matcher: LLMatcher, family: Family, free_text: FreeText | None = None
    ) -> None:
        self._matcher = matcher
        self._owed: list[int] = []  # tokens that it has not been told of
        self._ways = family.known.ways
        self._is_suspect = False  # a call for it has taken long
        self._slow_s = 0.0
        self.family = family
        self.free_text = free_text
        self.context: Context | None = family.known.root
        self.node: Node = family.known.first.node
        self.state: State | None = family.known.first if free_text is None else None
        self.error: str | None = None  # why it cannot go on; None unless something went wrong

    @property
    def has_failed(self) -> bool:
        """Whether it cannot go on: it came to a dead end, or exceeded a limit."""
        return self.error is not None

    def follow(self, token_id: int) -> bool:
        """Go on by one token, if it is known that it may and where it leads; else nothing has
        happened. Most tokens pass here."""
        state, context = self.state, self.context
        if state is None or context is None or len(self._owed) >= MAX_OWED:
            return False
        to = state.next.get(token_id) or state.next.get(self._ways[token_id])
        if to is None:
            found = context.leaps.get((state, token_id))
            found = found or self.family.known.find(context, state, token_id)
            if found is None:
                return False
            self.context, to = found
        elif to is END:
            return False
        self._owed.append(token_id)
        self.state = to
        return True

    def accept(self, token_id: int) -> bool:
        """Go on by one token. False if the output ends with it, by grammar or by `error`."""
        if self.follow(token_id):
            return True
        leads = {} if self.state is None else self.state.next
        if END in (leads.get(token_id), leads.get(self._ways[token_id])):
            self._owed.append(token_id)
            self.state = None
            return False
        if self.error is None and self.free_text is not None:
            begun = self.free_text.take(token_id)
            if begun is None:
                return True
            self.free_text, self.state = None, self.family.known.first
            return all(map(self.accept, begun))
        self.catch_up()
        if self.error is not None:
            return False
        clock = self.clock
        start = clock()
        goes_on = self._matcher.consume_token(token_id) and not self._matcher.is_stopped()
        if goes_on:
            self._arrive(token_id)
        self.note_time(clock() - start)
        if goes_on:
            return self.error is None
        self.note_error()
        if self.state is not None:
            self.family.known.lead(self.state, token_id, END)
            self.state = None
        return False

    def _arrive(self, token_id: int) -> None:
        """Find out where a token has led."""
        known, state, context = self.family.known, self.state, self.context
        self.state = None
        if context is None:
            return
        found = known.walk(context, self.node if state is None else state.node, token_id)
        if found is None:
            self.context = None
            return
        self.context, self.node = found
        if self.node.key is not None:
            self.state = known.arrive(*found)
            if state is not None and context is self.context:
                known.lead(state, token_id, self.state)

    def catch_up(self) -> None:
        """Have llguidance take in what has been noted down."""
        if not self._owed:
            return
        clock = self.clock
        start = clock()
        owed, self._owed = self._owed, []
        self._matcher.consume_tokens(owed)
        self.note_time(clock() - start)
        self.note_error()

    def forced_tokens(self, most: int) -> list[int]:
        """The next tokens, up to `most`, if the grammar leaves one way to go on; often none.

        They are what sampling under the masks would give, one at a time: the canonical tokens of
        the text that must follow, less those that what comes after may merge with (llguidance's
        fast-forward tokens). There are some where, and only where, the mask has one bit. Nothing is
        taken in: `accept` each, as if it had been sampled.
        """
        self.catch_up()
        if self.error is not None or self.free_text is not None or most <= 0:
            return []
        clock = self.clock
        start = clock()
        token_ids = self._matcher.compute_ff_tokens()
        self.note_time(clock() - start)
        self.note_error()
        return [] if self.error is not None else token_ids[:most]

    @property
    def may_be_forced(self) -> bool:
        """Whether it is not known that there are no tokens which must come next."""
        return self.state is None or self.state.kept.forced != []

    def note_forced(self, token_ids: list[int]) -> None:
        """For others that come to its state: what must come next there."""
        if self.state and self.context and self.state.kept.forced is None:
            length = len(self._matcher.compute_ff_bytes())
            self.family.known.note_forced(self.context, self.state, token_ids, num_bytes=length)

    @property
    def has_forced_text(self) -> bool:
        """Whether the grammar leaves one next byte: `forced_tokens` finds none without. It takes a
        thirtieth of what they take."""
        self.catch_up()
        if self.error is not None or self.free_text is not None:
            return False
        return bool(self._matcher.compute_ff_bytes())

    @property
    def clock(self) -> Callable[[], float]:
        """By which its calls are timed: the wall's, until one has been slow by that. From then on
        the thread's, which takes longer to read: beside others, anyone may be slow."""
        return time.thread_time if self._is_suspect else time.perf_counter

    def note_time(self, seconds: float) -> None:
        """What one call for this output has taken, by `clock`; `error` if slow ones have taken too
        much of the processor's time."""
        if seconds < SLOW_S:
            return
        if not self._is_suspect:
            self._is_suspect = True
            return
        self._slow_s += seconds
        if self._slow_s > MAX_SLOW_S and self.error is None:
            self._fail(
                f"following its grammar has held others up for {self._slow_s:.1f} s: simplify it "
                "(make it less ambiguous, with fewer alternatives and optional parts)"
            )

    def _fail(self, why: str) -> None:
        self.error, self.state, self.context = why, None, None
        self.family.failed = True

    def replay(self, token_ids: list[int]) -> None:
        """Take in tokens generated before. `ValueError` if they are not the begin of an output."""
        for index, token_id in enumerate(token_ids):
            if not self.accept(token_id):
                why = self.error or "it is complete already"
                raise ValueError(f"output_token_ids[{index}] does not fit the grammar: {why}")

    def copy(self) -> Matcher:
        """Another one at the same place."""
        self.family.num_copies += 1
        free_text = None if self.free_text is None else self.free_text.copy()
        copy = Matcher(self._matcher.deep_copy(), self.family, free_text)
        copy.context, copy.node, copy.state = self.context, self.node, self.state
        copy._owed = self._owed.copy()
        self.family.live.add(copy)
        return copy

    def note_error(self) -> None:
        """Take over what llguidance says has gone wrong, if anything has."""
        if self.error is None and self._matcher.is_error():
            self._fail(first_line(self._matcher.get_error()))


class Grammar:
    """What a request's grammar has compiled to; it makes a matcher for each output.

    Matchers of one family wait for one another when masks are computed, so a grammar that many
    outputs use at a time gets several lexers. Old ones are replaced one by one.
    """

    def __init__(self, make_first: Callable[[], Matcher]) -> None:
        """make_first: a new matcher at the beginning, with a lexer of its own. `ValueError`: none
        can be made."""
        self._make_first = make_first
        started = time.perf_counter()
        self._firsts = [make_first()]
        self.lexer_s = time.perf_counter() - started  # what one more will take
        self._is_adding = False  # some thread makes a lexer

    @property
    def is_spent(self) -> bool:
        """Whether nothing can be copied from any of its lexers: all have failed."""
        return all(first.family.failed for first in self._firsts)

    @property
    def num_lexers(self) -> int:
        return len(self._firsts)

    def matcher(self) -> Matcher:
        """At the beginning of an output, of the family that has the fewest of them now."""

        def rank(first: Matcher) -> tuple[bool, bool, int]:
            return first.family.failed, first.family.is_spent, len(first.family.live)

        return min(self._firsts, key=rank).copy()

    def wants_lexer(self) -> bool:
        """Whether some thread should call `add_lexer` now. True once, until that has been done."""
        num_live = sum(len(first.family.live) for first in self._firsts)
        wants_more = self.num_lexers < lexers_for(num_live)
        if self._is_adding or not (wants_more or any(one.family.is_spent for one in self._firsts)):
            return False
        self._is_adding = True
        return True

    def add_lexer(self) -> None:
        """Take one lexer more, or one in place of a spent one; as long as it takes to compile."""
        try:
            fresh = self._make_first()
            for index, first in enumerate(self._firsts):
                if first.family.is_spent:
                    self._firsts[index] = fresh
                    return
            self._firsts.append(fresh)
        finally:  # only now: who looks before would want the same one again
            self._is_adding = False

    def renewed(self) -> Grammar:
        """The same with a fresh lexer. It has been tried before: the sandbox is not asked."""
        return Grammar(self._make_first)


def lexers_for(num_outputs: int) -> int:
    """How many lexers so many outputs of one grammar should share."""
    return min(MAX_LEXERS, 1 + num_outputs // COPIES_PER_LEXER)


class Masks(NamedTuple):
    """Of some matchers, what may come next: in which line of the vocabulary's table, until the next
    masks are begun. forced: index of a matcher → the tokens that must come next, where there are
    some, which its mask allows one by one."""

    lines: list[int]
    forced: dict[int, list[int]]
    vocabulary: Vocabulary

    @property
    def words(self) -> Words:
        """A copy of each."""
        return self.vocabulary.words[self.lines]


class Gathered(NamedTuple):
    """Masks of which some, those with the indices `new`, are still to be computed."""

    masks: Masks
    new: list[int]


class MasksUnderWay(Protocol):
    """What a `Future` of masks is asked."""

    def done(self) -> bool: ...

    def result(self) -> Masks: ...

    def exception(self) -> BaseException | None: ...


@dataclass(frozen=True, slots=True)
class MasksAtHand:
    """Those that are there already, which most are: a `Future` takes as long as a tenth of them."""

    masks: Masks

    def done(self) -> bool:
        return True

    def result(self) -> Masks:
        return self.masks

    def exception(self) -> None:
        return None


class GrammarCompiler:
    """Knows the vocabulary. Threads may share it; nothing is loaded before it is needed.

    info: of the model, whose vocabulary may be smaller or larger than its tokenizer's.
    """

    def __init__(
        self,
        load_tokenizer: TokenizerSource,
        info: WorkerInfo,
        *,
        sandbox: GrammarSandbox | None = None,
        max_num_seqs: int = 256,
    ) -> None:
        """max_num_seqs: of whose masks are begun at a time."""
        self._load_tokenizer = load_tokenizer
        self._max_num_seqs = max_num_seqs
        self._vocab_size = info.vocab_size
        self._eos_token_ids = info.eos_token_ids
        self._sandbox = sandbox
        self._tokenizer: LLTokenizer | None = None
        self._executors: list[LLExecutor] = []  # of one thread each
        self._lock = threading.Lock()
        self.vocabulary = Vocabulary([], np.zeros(1, np.int32))  # until it is loaded
        self._last_s = self._lasting_s = 0.0  # what they took; the less of that and of those before
        self._looks_for_slow_ones = False  # it was long, and it is not known which
        self._num_until_look = 0  # batches for which nobody is searched: many take long together
        # They have no threads before they are used: one for a batch, and those that share it out.
        self._beside = ThreadPoolExecutor(1, "masks")
        self._sharing = ThreadPoolExecutor(MAX_LEXERS, "masks of a lexer")

    def load(self) -> None:
        """Make the vocabulary's trie, once: a second or more, for which Python's lock is held.

        Raises `ValueError` if there is no tokenizer, `OSError` if there can be no sandbox.
        """
        with self._lock:
            if self._tokenizer is not None:
                return
            from llguidance import LLExecutor

            text = self._load_tokenizer()
            size, eos = self._vocab_size, self._eos_token_ids
            if self._sandbox is not None:
                self._sandbox.set_up(text, vocab_size=size, eos_token_ids=eos)
            tokenizer = make_tokenizer(text, vocab_size=size, eos_token_ids=eos)
            spelling = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
            special = {*filter(tokenizer.is_special_token, range(len(spelling)))}
            special.update(self._eos_token_ids, tokenizer.eos_tokens)
            free = self._all_but_eos(-(-tokenizer.vocab_size // 32))
            self.vocabulary = Vocabulary(
                spelling,
                free,
                frozenset(special),
                num_lines=num_mask_lines(vocab_size=size, max_num_seqs=self._max_num_seqs),
                num_spare=self._max_num_seqs,
            )
            self._executors = [LLExecutor(num_threads=1) for _ in range(MAX_LEXERS)]
            self._tokenizer = tokenizer

    def compile(self, wanted: StructuredOutputsParams) -> Grammar:
        """What makes matchers of it, after a trial in the sandbox where it needs one.

        Raises `ValueError` naming the field, if nothing can match it or it is beyond the limits.
        """
        self.load()
        assert self._tokenizer is not None
        source = plain_source(wanted)
        known = None if source is None else self._known(source)
        if source is None or known is None:  # alternatives that only their content tells apart
            if self._sandbox is not None:
                self._sandbox.try_out(wanted)
            source = source or read(wanted)
            known = self._known(source) or KeptMasks(self.vocabulary)
        return Grammar(partial(self._make_first, source, known))

    def _known(self, source: Source) -> KeptMasks | None:
        """Of its outputs, if they can be followed."""
        if source.schema is not None:
            root = shape_of(source)
            return None if root is None else JsonMasks(self.vocabulary, root)
        if source.wanted.choice is not None:
            return TextMasks(self.vocabulary)
        pattern = source.wanted.regex
        term = None if pattern is None else term_of(pattern)
        return None if term is None else RegexMasks(self.vocabulary, term)

    def _make_first(self, source: Source, known: KeptMasks) -> Matcher:
        assert self._tokenizer is not None
        end = source.wanted.after
        after = None if end is None else FreeText(end.encode(), self._tokenizer)
        matcher, mask = make_matcher(self._tokenizer, source)
        words = np.frombuffer(mask, np.int32)[: -(-self._tokenizer.vocab_size // 32)]
        first = known.first.kept
        if first.forced is None and np.bitwise_count(words.view(np.uint32)).sum() > 1:
            first.given, first.forced = words, []  # nothing is forced
        return Matcher(matcher, Family(known), after)

    def begin_masks(self, matchers: Sequence[Matcher]) -> MasksUnderWay:
        """Compute them beside the caller, who must leave the matchers alone until it is done.

        What takes too little to be worth a thread is done when this returns.
        """
        begun = self._gather(matchers)
        if not begun.new:
            return MasksAtHand(begun.masks)
        if self._lasting_s < WORTH_A_THREAD_S:
            try:
                return MasksAtHand(self._complete(matchers, begun))
            except Exception as error:
                failed: Future[Masks] = Future()
                failed.set_exception(error)
                return failed
        has_begun = threading.Lock()
        has_begun.acquire()
        masks = self._beside.submit(self._complete_beside, matchers, begun, has_begun)
        # Python's lock is handed over here: else the thread would wait for it for milliseconds.
        has_begun.acquire()
        return masks

    def _complete_beside(
        self, matchers: Sequence[Matcher], begun: Gathered, has_begun: threading.Lock
    ) -> Masks:
        has_begun.release()
        return self._complete(matchers, begun)

    def compute_masks(self, matchers: Sequence[Matcher]) -> Words:
        """For each, the ids that may come next.

        A matcher that exceeds its limits, or its time, has its `error` set: its row is of no use.
        """
        begun = self._gather(matchers)
        masks = self._complete(matchers, begun) if begun.new else begun.masks
        return masks.words[:, : -(-self._vocab_size // 32)]

    def _gather(self, matchers: Sequence[Matcher]) -> Gathered:
        """Those that are kept, which most are where a grammar is not new; others in spare lines."""
        first_spare = self.vocabulary.first_spare
        lines, new, forced = list[int](), list[int](), dict[int, list[int]]()
        for index, matcher in enumerate(matchers):
            state = matcher.state
            if state is not None and (line := (kept := state.kept).line) >= 0:
                lines.append(line)
                if kept.forced:
                    forced[index] = kept.forced
            elif matcher.free_text is not None or matcher.error is not None:
                lines.append(FREE_LINE)
            else:
                lines.append(first_spare + len(new))
                new.append(index)
        assert len(new) <= self._max_num_seqs
        return Gathered(Masks(lines, forced, self.vocabulary), new)

    def _complete(self, matchers: Sequence[Matcher], begun: Gathered) -> Masks:
        """With those that are not kept. Each is computed once, for whoever is where its key is, but
        for those that force tokens: how many, keys need not tell."""
        leaders: dict[Kept, int] = {}
        followers = list[tuple[int, int]]()
        others = list[int]()
        for index in begun.new:
            state = matchers[index].state
            leader = index if state is None else leaders.setdefault(state.kept, index)
            if leader == index:
                others.append(index)
            else:
                followers.append((index, leader))
        masks = begun.masks
        self._compute(matchers, others, masks)
        left = [i for i, leader in followers if matchers[leader].error or leader in masks.forced]
        if left:
            self._compute(matchers, left, masks)
        for index, leader in followers:
            if index not in left:
                masks.lines[index] = masks.lines[leader]
        return masks

    def _compute(self, matchers: Sequence[Matcher], new: list[int], masks: Masks) -> None:
        """Those of `new`, and what they force. That is looked for first, since a mask of one bit
        need not be computed then. Of many, masks come first: threads make them without Python's
        lock, so that fewer are asked with it.

        Many are computed by several threads.
        """
        start = time.perf_counter()
        lines, forced, vocabulary = masks
        for index in new:
            matchers[index].catch_up()
            vocabulary.note_write(lines[index])
        comes_first = len(new) < LOOK_FIRST
        if comes_first:
            self._note_forced(matchers, new, masks)
        rest = []
        for index in new:
            if (mask := self._known_mask(matchers[index], forced.get(index))) is None:
                rest.append(index)
            else:
                vocabulary.words[lines[index]] = mask
        if len(rest) < FEW or self._looks_for_slow_ones:
            self._compute_one_by_one(matchers, rest, lines)
        else:
            self._share_out(matchers, rest, lines)
        for index in rest:
            matchers[index].note_error()
        if not comes_first:
            self._note_forced(matchers, new, masks, has_masks=True)
        for index in new:
            self._keep(matchers[index], index, lines)
        if rest:
            before_s, self._last_s = self._last_s, time.perf_counter() - start
            self._lasting_s = min(before_s, self._last_s)  # one that takes long may be the only one
        self._num_until_look = max(0, self._num_until_look - 1)
        self._looks_for_slow_ones = self._last_s > SLOW_S and self._num_until_look == 0

    def _note_forced(
        self,
        matchers: Sequence[Matcher],
        new: list[int],
        masks: Masks,
        *,
        has_masks: bool = False,
    ) -> None:
        """Look for tokens that must come next. has_masks: it is known where these have one bit."""
        asked = [(index, one) for index in new if (one := matchers[index]).may_be_forced]
        lines, forced, words = masks.lines, masks.forced, self.vocabulary.words
        few = (e for e in asked if not has_masks or np.count_nonzero(words[lines[e[0]]]) == 1)
        forced |= find_forced(few)
        for index, matcher in asked:
            matcher.note_forced(forced.get(index, []))

    def _known_mask(self, matcher: Matcher, forced: list[int] | None) -> Mask | None:
        """Of one whose forced tokens are known, if that makes its mask known."""
        if matcher.state is not None and matcher.state.kept.given is not None:
            return matcher.state.kept.given
        return single(forced[0], self.vocabulary.words.shape[1]) if forced else None

    def _keep(self, matcher: Matcher, index: int, lines: list[int]) -> None:
        """The mask computed just now, for others that come to the matcher's state."""
        kept = None if matcher.state is None else matcher.state.kept
        if kept is not None and kept.line < 0 and kept.forced is not None:
            mask = self.vocabulary.words[lines[index]]
            if self.vocabulary.keep(kept, mask, matcher.family.known.mine, in_use=lines):
                lines[index] = kept.line

    def _compute_one_by_one(
        self, matchers: Sequence[Matcher], begun: list[int], lines: list[int]
    ) -> None:
        address, slowest_s = self.vocabulary.address, 0.0
        row_bytes = self.vocabulary.words.strides[0]
        for index in begun:
            clock, one = matchers[index].clock, matchers[index]._matcher
            began = clock()
            one.unsafe_compute_mask_ptr(address + lines[index] * row_bytes, row_bytes)
            seconds = clock() - began
            matchers[index].note_time(seconds)
            slowest_s = max(slowest_s, seconds)
        if self._looks_for_slow_ones and slowest_s < SLOW_S:
            self._num_until_look = LOOK_INTERVAL

    def _share_out(self, matchers: Sequence[Matcher], begun: list[int], lines: list[int]) -> None:
        vocabulary = self.vocabulary
        parts = share_out(begun, matchers, len(self._executors))
        first, *others = [
            partial(
                executor.unsafe_compute_mask_ptr,
                [(matchers[index]._matcher, lines[index]) for index in part],
                vocabulary.address,
                vocabulary.words.strides[0],
                len(vocabulary.words),
            )
            for executor, part in zip(self._executors, parts, strict=False)
        ]
        under_way = [self._sharing.submit(other) for other in others]
        try:
            first()
        finally:
            wait(under_way)
        for other_part in under_way:
            other_part.result()

    def _all_but_eos(self, num_words: int) -> npt.NDArray[np.int32]:
        """What may come before a grammar has begun: an output cannot end there."""
        bits = np.zeros(32 * num_words, np.uint8)
        bits[: self._vocab_size] = 1
        bits[list(self._eos_token_ids)] = 0
        return np.packbits(bits, bitorder="little").view(np.int32)


def find_forced(matchers: Iterable[tuple[int, Matcher]]) -> dict[int, list[int]]:
    """As `Masks.forced`. matchers: with their indices."""
    looked = ((i, one.forced_tokens(MAX_FORCED)) for i, one in matchers if one.has_forced_text)
    return {index: token_ids for index, token_ids in looked if token_ids}


def share_out(indices: list[int], matchers: Sequence[Matcher], most: int) -> list[list[int]]:
    """The indices in up to `most` parts of like size. A family is in one part, as it has one lock:
    threads that wait for each other's locks would take longer than one alone."""
    families: dict[int, list[int]] = {}
    for index in indices:
        families.setdefault(id(matchers[index].family), []).append(index)
    parts: list[list[int]] = [[] for _ in range(min(most, len(families)))]
    for family in sorted(families.values(), key=len, reverse=True):
        min(parts, key=len).extend(family)
    return parts


MakeCompiler = Callable[[WorkerInfo], GrammarCompiler]


def cache_key(wanted: StructuredOutputsParams) -> bytes:
    """Equal for what compiles to the same."""
    return msgspec.msgpack.encode(wanted)
