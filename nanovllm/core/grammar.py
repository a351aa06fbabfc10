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
    """Where one output is in its grammar. Once ended, by whatever reason, it stays so."""

    __slots__ = ("_matcher", "error", "family")

    def __init__(self, matcher: LLMatcher, family: Family) -> None:
        self._matcher = matcher
        self.family = family
        self.error: str | None = None  # why it cannot go on; None unless something went wrong

    def accept(self, token_id: int) -> bool:
        """Go on by one token. False if the output ends with it, by grammar or by `error`."""
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
        return Matcher(self._matcher.deep_copy(), self.family)

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
        return Matcher(make_matcher(self._tokenizer, wanted), Family())

    def fill_masks(self, matchers: Sequence[Matcher]) -> list[bytes]:
        """For each, the ids that may come next: a bit per id, in little-endian 32-bit words.

        A matcher that exceeds its limits has its `error` set; its mask is of no use.
        """
        assert self._tokenizer is not None and self._executor is not None
        num_words = -(-self._tokenizer.vocab_size // 32)
        words = np.empty((len(matchers), num_words), np.int32)
        address, row_bytes = words.ctypes.data, 4 * num_words
        inner = [matcher._matcher for matcher in matchers]
        if len(inner) < FEW:
            for index, one in enumerate(inner):
                one.unsafe_compute_mask_ptr(address + index * row_bytes, row_bytes)
        else:
            entries = [(one, index) for index, one in enumerate(inner)]
            self._executor.unsafe_compute_mask_ptr(entries, address, row_bytes, len(entries))
        for matcher in matchers:
            matcher._note_error()
        known = -(-self._vocab_size // 32)
        return [row.tobytes() for row in words[:, :known]]


MakeCompiler = Callable[[WorkerInfo], GrammarCompiler]


def cache_key(wanted: StructuredOutputsParams) -> bytes:
    """Equal for what compiles to the same."""
    return msgspec.msgpack.encode(wanted)
