"""Structured output by llguidance: from what a request asks to which tokens may come next.

`Compilations` calls `GrammarCompiler` in threads; each `Sequence` owns a `Matcher`, which
`Scheduler.update` advances; `EngineCore` calls `compute_masks` for the sequences a step samples
for. llguidance (Earley parsing over lexer derivatives) is imported with the first such request.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from nanovllm.core.free_text import FreeText
from nanovllm.core.grammar_sandbox import GrammarSandbox
from nanovllm.core.grammar_source import first_line, make_matcher, make_tokenizer
from nanovllm.protocol.plan import WorkerInfo
from nanovllm.sampling_params import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

TokenizerSource = Callable[[], str]  # the model's tokenizer, as the text of a tokenizer.json
MAX_COPIES = 64
MAX_LEXERS = min(4, max(1, (os.cpu_count() or 1) // 2))  # of one grammar: threads can use no more
COPIES_PER_LEXER = 8  # of a grammar that many use, until it has as many lexers as it may
FEW = 4  # matchers whose masks are not worth waking other threads for
SLOW_S = 0.01  # a mask or a token accepted that takes longer is held against its output …
MAX_SLOW_S = 1.0  # … which ends when it has come to so much: others wait meanwhile


@dataclass(slots=True, eq=False)
class Family:
    """What copies of a matcher have in common: llguidance lets them share the lexer's states, so
    that one's masks are quick where another has been, and its limits as well."""

    num_copies: int = 0
    failed: bool = False

    @property
    def is_spent(self) -> bool:
        """Whether it is time for a fresh lexer: after an error, or many copies."""
        return self.failed or self.num_copies >= MAX_COPIES


class Matcher:
    """Where one output is in its grammar. Once ended, by whatever reason, it stays so.

    free_text: what comes before the grammar begins; None from then on.
    """

    __slots__ = ("_matcher", "_slow_s", "error", "family", "free_text")

    def __init__(
        self, matcher: LLMatcher, family: Family, free_text: FreeText | None = None
    ) -> None:
        self._matcher = matcher
        self._slow_s = 0.0
        self.family = family
        self.free_text = free_text
        self.error: str | None = None  # why it cannot go on; None unless something went wrong

    @property
    def has_failed(self) -> bool:
        """Whether it cannot go on: it came to a dead end, or exceeded a limit."""
        return self.error is not None

    def accept(self, token_id: int) -> bool:
        """Go on by one token. False if the output ends with it, by grammar or by `error`."""
        if self.error is not None:
            return False
        if self.free_text is not None:
            begun = self.free_text.take(token_id)
            if begun is None:
                return True
            self.free_text = None
            return all(map(self.accept, begun))
        start = time.perf_counter()
        goes_on = self._matcher.consume_token(token_id) and not self._matcher.is_stopped()
        self.note_time(time.perf_counter() - start)
        if goes_on:
            return self.error is None
        self.note_error()
        return False

    def forced_tokens(self, most: int) -> list[int]:
        """The next tokens, up to `most`, if the grammar leaves one way to go on; often none.

        They are what sampling under the masks would give, one at a time: the canonical tokens of
        the text that must follow, less those that what comes after may merge with (llguidance's
        fast-forward tokens). Nothing is taken in: `accept` each, as if it had been sampled.
        """
        if self.error is not None or self.free_text is not None or most <= 0:
            return []
        start = time.perf_counter()
        token_ids = self._matcher.compute_ff_tokens()
        self.note_time(time.perf_counter() - start)
        self.note_error()
        return [] if self.error is not None else token_ids[:most]

    def note_time(self, seconds: float) -> None:
        """What one call for this output has taken; `error` if slow ones have taken too much."""
        if seconds < SLOW_S:
            return
        self._slow_s += seconds
        if self._slow_s > MAX_SLOW_S and self.error is None:
            self.error = (
                f"following its grammar has held others up for {self._slow_s:.1f} s: simplify it "
                "(make it less ambiguous, with fewer alternatives and optional parts)"
            )
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
        return Matcher(self._matcher.deep_copy(), self.family, free_text)

    def note_error(self) -> None:
        """Take over what llguidance says has gone wrong, if anything has."""
        if self.error is None and self._matcher.is_error():
            self.error = first_line(self._matcher.get_error())
            self.family.failed = True


class Grammar:
    """What a request's grammar has compiled to; it makes a matcher for each output.

    Matchers of one family wait for one another when masks are computed, since llguidance locks the
    lexer that they share. So a grammar that many outputs use gets several.
    """

    def __init__(self, make_first: Callable[[], Matcher], *, max_lexers: int = 1) -> None:
        """make_first: a new matcher at the beginning, with a lexer of its own. `ValueError`: none
        can be made."""
        self._make_first = make_first
        self._max_lexers = max_lexers
        self._firsts = [make_first()]
        self._num_promised = 1  # lexers, with the one that is being made

    @property
    def is_spent(self) -> bool:
        """Whether all its lexers are."""
        return all(first.family.is_spent for first in self._firsts)

    def matcher(self) -> Matcher:
        """At the beginning of an output, of the family that has the fewest."""
        first = min(self._firsts, key=lambda one: (one.family.failed, one.family.num_copies))
        return first.copy()

    def wants_lexer(self) -> bool:
        """Whether `add_lexer` should be called now, by some thread. True once for each."""
        num_copies = sum(first.family.num_copies for first in self._firsts)
        if self._num_promised >= min(self._max_lexers, 1 + num_copies // COPIES_PER_LEXER):
            return False
        self._num_promised += 1
        return True

    def add_lexer(self) -> None:
        """Take one lexer more, as long as it takes to compile again."""
        self._firsts.append(self._make_first())

    def renewed(self) -> Grammar:
        """The same with a fresh lexer. It has been tried before: the sandbox is not asked."""
        return Grammar(self._make_first, max_lexers=self._max_lexers)


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
    ) -> None:
        self._load_tokenizer = load_tokenizer
        self._vocab_size = info.vocab_size
        self._eos_token_ids = info.eos_token_ids
        self._sandbox = sandbox
        self._tokenizer: LLTokenizer | None = None
        self._executor: LLExecutor | None = None
        self._lock = threading.Lock()
        self._words = self._free_words = np.empty((0, 0), np.int32)  # the masks computed last
        self._looks_for_slow_ones = False  # the last ones took long, and it is not known which

    def load(self) -> None:
        """Make the vocabulary's trie, here and in the sandbox, once: about half a second.

        Raises `ValueError` if there is no tokenizer, `OSError` if there can be no sandbox.
        """
        with self._lock:
            if self._tokenizer is not None:
                return
            from llguidance import LLExecutor

            text = self._load_tokenizer()
            size, eos = self._vocab_size, self._eos_token_ids
            if self._sandbox is not None:
                self._sandbox.start(text, vocab_size=size, eos_token_ids=eos)
            tokenizer = make_tokenizer(text, vocab_size=size, eos_token_ids=eos)
            if self._sandbox is not None:
                self._sandbox.warm_up()
            self._executor = LLExecutor()
            self._tokenizer = tokenizer

    def compile(self, wanted: StructuredOutputsParams) -> Grammar:
        """What makes matchers of it, after a trial in the sandbox, if there is one.

        Raises `ValueError` naming the field, if nothing can match it or it is beyond the limits.
        """
        self.load()
        assert self._tokenizer is not None
        if self._sandbox is not None:
            self._sandbox.try_out(wanted)
        return Grammar(partial(self._make_first, wanted), max_lexers=MAX_LEXERS)

    def _make_first(self, wanted: StructuredOutputsParams) -> Matcher:
        assert self._tokenizer is not None
        after = None if wanted.after is None else FreeText(wanted.after.encode(), self._tokenizer)
        return Matcher(make_matcher(self._tokenizer, wanted), Family(), after)

    def compute_masks(self, matchers: Sequence[Matcher]) -> npt.NDArray[np.int32]:
        """For each, the ids that may come next: [num_matchers, ceil(vocab_size / 32)], a bit per
        id, lowest first. The next call writes over it.

        Many are computed by llguidance's threads, while this one waits without Python's lock. A
        matcher that exceeds its limits, or its time, has its `error` set: its row is of no use.
        """
        assert self._tokenizer is not None and self._executor is not None
        if len(self._words) < len(matchers):
            num_words = -(-self._tokenizer.vocab_size // 32)
            self._words = np.empty((2 * len(matchers), num_words), np.int32)
            self._free_words = self._all_but_eos(num_words)
        words = self._words[: len(matchers)]
        address, row_bytes = words.ctypes.data, words.strides[0]
        begun: list[int] = []
        for index, matcher in enumerate(matchers):
            if matcher.free_text is not None or matcher.error is not None:
                words[index] = self._free_words
            else:
                begun.append(index)
        start = time.perf_counter()
        if len(begun) < FEW or self._looks_for_slow_ones:
            for index in begun:
                began = time.perf_counter()
                one = matchers[index]._matcher
                one.unsafe_compute_mask_ptr(address + index * row_bytes, row_bytes)
                matchers[index].note_time(time.perf_counter() - began)
        else:
            entries = [(matchers[index]._matcher, index) for index in begun]
            self._executor.unsafe_compute_mask_ptr(entries, address, row_bytes, len(matchers))
        self._looks_for_slow_ones = time.perf_counter() - start > SLOW_S
        for index in begun:
            matchers[index].note_error()
        return words[:, : -(-self._vocab_size // 32)]

    def _all_but_eos(self, num_words: int) -> npt.NDArray[np.int32]:
        """What may come before a grammar has begun: an output cannot end there."""
        bits = np.zeros(32 * num_words, np.uint8)
        bits[: self._vocab_size] = 1
        bits[list(self._eos_token_ids)] = 0
        return np.packbits(bits, bitorder="little").view(np.int32)


MakeCompiler = Callable[[WorkerInfo], GrammarCompiler]


def cache_key(wanted: StructuredOutputsParams) -> bytes:
    """Equal for what compiles to the same."""
    return msgspec.msgpack.encode(wanted)
