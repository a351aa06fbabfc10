"""Structured output by llguidance: from what a request asks to which tokens may come next.

`Compilations` calls `GrammarCompiler` in threads; each `Sequence` owns a `Matcher`, which
`Scheduler.update` advances; `EngineCore` calls `fill_masks` for the sequences a step samples for.
llguidance (Earley parsing over lexer derivatives) is imported with the first such request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from nanovllm.core.free_text import FreeText
from nanovllm.core.grammar_sandbox import GrammarSandbox
from nanovllm.core.grammar_source import first_line, make_matcher, make_tokenizer
from nanovllm.protocol.plan import WorkerInfo
from nanovllm.sampling_params import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

TokenizerSource = Callable[[], str]  # the model's tokenizer, as the text of a tokenizer.json
MAX_COPIES = 64
FEW = 4  # matchers whose masks are not worth waking other threads for


@dataclass(slots=True)
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

    __slots__ = ("_matcher", "error", "family", "free_text")

    def __init__(
        self, matcher: LLMatcher, family: Family, free_text: FreeText | None = None
    ) -> None:
        self._matcher = matcher
        self.family = family
        self.free_text = free_text
        self.error: str | None = None  # why it cannot go on; None unless something went wrong

    def accept(self, token_id: int) -> bool:
        """Go on by one token. False if the output ends with it, by grammar or by `error`."""
        if self.free_text is not None:
            begun = self.free_text.take(token_id)
            if begun is None:
                return True
            self.free_text = None
            return all(map(self.accept, begun))
        if self._matcher.consume_token(token_id) and not self._matcher.is_stopped():
            return True
        self._note_error()
        return False

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

    def _note_error(self) -> None:
        if self._matcher.is_error():
            self.error = first_line(self._matcher.get_error())
            self.family.failed = True


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

    def compile(self, wanted: StructuredOutputsParams) -> Matcher:
        """A matcher at the beginning of an output, after a trial in the sandbox, if there is one.

        Raises `ValueError` naming the field, if nothing can match it or it is beyond the limits.
        """
        self.load()
        assert self._tokenizer is not None
        if self._sandbox is not None:
            self._sandbox.try_out(wanted)
        after = None if wanted.after is None else FreeText(wanted.after.encode(), self._tokenizer)
        return Matcher(make_matcher(self._tokenizer, wanted), Family(), after)

    def fill_masks(self, matchers: Sequence[Matcher]) -> list[bytes]:
        """For each, the ids that may come next: a bit per id, in little-endian 32-bit words.

        A matcher that exceeds its limits has its `error` set; its mask is of no use.
        """
        assert self._tokenizer is not None and self._executor is not None
        num_words = -(-self._tokenizer.vocab_size // 32)
        words = np.empty((len(matchers), num_words), np.int32)
        address, row_bytes = words.ctypes.data, 4 * num_words
        begun = [(one._matcher, i) for i, one in enumerate(matchers) if one.free_text is None]
        if len(begun) < len(matchers):
            words[[one.free_text is not None for one in matchers]] = self._all_but_eos(num_words)
        if len(begun) < FEW:
            for one, index in begun:
                one.unsafe_compute_mask_ptr(address + index * row_bytes, row_bytes)
        else:
            self._executor.unsafe_compute_mask_ptr(begun, address, row_bytes, len(matchers))
        for matcher in matchers:
            matcher._note_error()
        known = -(-self._vocab_size // 32)
        return [row.tobytes() for row in words[:, :known]]

    def _all_but_eos(self, num_words: int) -> NDArray[np.int32]:
        """What may come before a grammar has begun: an output cannot end there."""
        bits = np.zeros(32 * num_words, np.uint8)
        bits[: self._vocab_size] = 1
        bits[list(self._eos_token_ids)] = 0
        return np.packbits(bits, bitorder="little").view(np.int32)


MakeCompiler = Callable[[WorkerInfo], GrammarCompiler]


def cache_key(wanted: StructuredOutputsParams) -> bytes:
    """Equal for what compiles to the same."""
    return msgspec.msgpack.encode(wanted)
