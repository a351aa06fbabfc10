"""What the device remembers of each running sequence, and the host's mirror of its parameters.

Rows 0 … num_rows - 1 belong to sequences, row `num_rows` to padding. A row is one record of 32-bit
words (sampling columns, block table, tokens), so that everything a plan brings is one scatter.
Tokens are written at admission and by the sampler: the host never needs an id still on its way.
"""

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanovllm.protocol.plan import NewRow, StepPlan
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.sampling.bitmask import MaskTable
from nanovllm.worker.sampling.columns import (
    AS_WORDS,
    COLUMNS,
    COUNTS,
    EDITED,
    FIELDS,
    INT32_MAX,
    NEUTRAL,
    NUM_WORDS,
    PACKING,
    PENALIZED,
    PENALTIES,
    RECORD,
    TOLD,
    TORCH_DTYPES,
    Int32Array,
    word_offset,
)
from nanovllm.worker.sampling.logits_processors import RowEdits, prepare_edits

LOG = logging.getLogger(__name__)
_NEUTRAL_WORDS = NEUTRAL.view(np.int32)
_WORDS = {column.name: word_offset(column.name) for column in COLUMNS}
_PENALTIES = [(column.name, column.neutral) for column in COLUMNS if column.name in PENALTIES]
NOTHING = SamplingParams()  # of what rows may ask for
NO_WRITES = np.empty((2, 0), np.int32)


class RequestRows:
    """`ModelRunner` writes plans in, in order; batches and the sampler read by row.

    token_ids: [num_rows + 1, max_model_len] int32; block_tables: [num_rows + 1, max_num_blocks]
    int32, one for each group of layers that has its own (`checkpoint.kv_layout`); seeds: [num_rows
    + 1] int64; columns: name → [num_rows + 1], of `COLUMNS` and `COUNTS`. All are views of one
    tensor. `host` mirrors the record's fixed part, and alone knows `num_counted`;
    `host_block_tables` mirrors the block tables, side by side. `edits` are those of rows that have
    some; `masks` is what grammars allow them.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        max_model_len: int,
        block_size: int,
        vocab_size: int,
        eos_token_ids: list[int],
        device: torch.device,
        blocks: Sequence[int] = (1,),
    ) -> None:
        """blocks: of each group of layers, how many hold `block_size` tokens."""
        num_columns = -(-max_model_len // block_size)
        self.block_sizes = [block_size // count for count in blocks]
        self.block_size = block_size
        starts = np.cumsum([0, *blocks], dtype=np.int32) * num_columns
        self._tokens_at = NUM_WORDS + int(starts[-1])
        self._places = _places_in_row(starts, num_columns)
        self._entry_places: list[int] = self._places[NUM_WORDS:].tolist()
        width = self._tokens_at + max_model_len
        self._token_places = np.arange(self._tokens_at, width, dtype=np.int32)
        self._width = width + width % 2  # seeds are 64 bits wide and must be aligned
        if (num_rows + 1) * self._width >= 2**31:
            raise ValueError(
                f"max_num_seqs ({num_rows}) times max_model_len ({max_model_len}) is over 2^31: "
                "lower one of them"
            )
        state = torch.zeros(num_rows + 1, self._width, dtype=torch.int32, device=device)
        # A penalty of 0 is a division by 0.
        state[-1, :NUM_WORDS] = torch.from_numpy(_NEUTRAL_WORDS)
        self._words = state.view(-1)
        self.block_tables = [
            state[:, NUM_WORDS + start : NUM_WORDS + end]
            for start, end in pairwise(starts.tolist())
        ]
        self.token_ids = state[:, self._tokens_at : width]
        self.seeds = state[:, :2].view(torch.int64)[:, 0]
        self.columns: dict[str, Tensor] = {
            column.name: state[:, word_offset(column.name)].view(TORCH_DTYPES[column.kind])
            for column in COLUMNS
        }
        self.columns |= {name: state[:, word_offset(name)] for name in COUNTS}
        self.num_rows = num_rows
        self._mirror = np.zeros((num_rows + 1, self._tokens_at), np.int32)
        self._host_words = self._mirror[:, :NUM_WORDS]
        self._host_words[:] = _NEUTRAL_WORDS
        self.host: npt.NDArray[Any] = self._host_words.view(RECORD)[:, 0]
        self.host_block_tables = self._mirror[:, NUM_WORDS:]
        # By row: bits of `columns`. `edits` has those of rows that have `EDITED`.
        self.asks: npt.NDArray[np.uint8] = np.zeros(num_rows + 1, np.uint8)
        self.num_admitted = 0  # so far; while it is the same, no row asks for anything else
        self.prompting: set[int] = set()  # rows that want their prompts' log-probabilities
        self.edits: dict[int, RowEdits] = {}
        self.failures: dict[int, str] = {}  # rows that cannot be sampled from, and why
        self.vocab_size = vocab_size
        self.masks = MaskTable(vocab_size=vocab_size, max_num_seqs=num_rows, device=device)
        self._eos_token_ids = eos_token_ids

    def record(self, plan: StepPlan) -> Int32Array:
        """Take what the plan brings into the mirror, and return what `write` needs.

        Returns [2, num_words]: places in the state and their new values.
        """
        if not (plan.new_rows or plan.block_appends or plan.known_tokens):
            return NO_WRITES
        parts = [self._record_new(new) for new in plan.new_rows]
        # Single words are gathered in lists: a step has few, for which arrays would take longer.
        places: list[int] = []
        values: list[int] = []
        for append in plan.block_appends:
            row, place = append.row, self._entry_places[append.index]
            self._mirror[row, place] = append.block_id
            places.append(row * self._width + place)
            values.append(append.block_id)
        for known in plan.known_tokens:
            start = known.row * self._width + self._tokens_at + known.position
            places += range(start, start + len(known.token_ids))
            values += known.token_ids
        if places:
            parts.append(np.array((places, values), np.int32))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _record_new(self, new: NewRow) -> Int32Array:
        """Take a row into the mirror; returns its part of what `record` does."""
        row, behind = new.row, NUM_WORDS + len(new.block_ids)
        words = [*self._prepare(new), *new.block_ids, *new.token_ids]
        writes = np.empty((2, len(words)), np.int32)
        places, values = writes
        places[:behind], places[behind:] = (
            self._places[:behind],
            self._token_places[: len(new.token_ids)],
        )
        values[:] = words
        self._mirror[row, places[:behind]] = values[:behind]
        places += row * self._width
        asked = NOTHING if row in self.failures else new.params
        penalizes = any(getattr(asked, name) != at_rest for name, at_rest in _PENALTIES)
        edits, tells = row in self.edits, asked.logprobs is not None
        self.asks[row] = PENALIZED * penalizes | EDITED * edits | TOLD * tells
        self.num_admitted += 1
        self.prompting.discard(row)
        if asked.prompt_logprobs is not None:
            self.prompting.add(row)
        return writes

    def _prepare(self, new: NewRow) -> tuple[int, ...]:
        """The words of a row's record, and its edits, which are kept. If they cannot be made, the
        record is neutral, there are no edits, and that is noted."""
        self.failures.pop(new.row, None)
        self.edits.pop(new.row, None)
        try:
            words = encode(new)
            if new.bad_words_token_ids or new.params.edits_logits:
                self._keep_edits(new)
            return words
        except Exception as error:
            self.note_failure(new.row, error)
            return tuple(_NEUTRAL_WORDS.tolist())

    def _keep_edits(self, new: NewRow) -> None:
        edits = prepare_edits(new, vocab_size=self.vocab_size, eos_token_ids=self._eos_token_ids)
        if edits is not None:
            self.edits[new.row] = edits

    def note_failure(self, row: int, error: Exception) -> None:
        """No token can be chosen for this row, and nobody else need suffer for it."""
        LOG.error("sampling failed for one request", exc_info=error)
        self.failures[row] = f"{type(error).__name__}: {error}"

    def failures_among(self, rows: Int32Array) -> dict[int, str]:
        """As `StepResult.failures`, of a step that has sampled for these."""
        return {
            j: self.failures[row] for j, row in enumerate(rows.tolist()) if row in self.failures
        }

    def write(self, writes: Tensor) -> None:
        """Bring the device up to what `record` returned (writes: [2, num_words] int32)."""
        if writes.shape[1]:
            self._words[writes[0].long()] = writes[1]

    def active_columns(self, rows: Int32Array) -> set[str]:
        """Names of the columns that are not neutral in all of `rows`."""
        active = (self._host_words[rows] != _NEUTRAL_WORDS).any(0)
        return {name for name, word in _WORDS.items() if active[word]}


def encode(new: NewRow) -> tuple[int, ...]:
    """The words of the record of one row."""
    params, is_greedy = new.params, new.params.greedy
    values: list[float] = [new.seed, new.num_prompt_tokens, 0]
    for name, is_integer, neutral, draws in FIELDS:
        value = getattr(params, name)
        if value is None or (draws and is_greedy):
            value = neutral
        values.append(min(value, INT32_MAX) if is_integer else value)
    return AS_WORDS.unpack(PACKING.pack(*values))


def _places_in_row(starts: Int32Array, num_columns: int) -> Int32Array:
    """Where the record's words lie in a row, and behind them entries of a plan's block table: there
    the groups take turns, here each has a table of its own. starts: of these, and the end."""
    tables = (np.arange(start, end, dtype=np.int32) for start, end in pairwise(starts))
    entries = np.hstack([table.reshape(num_columns, -1) for table in tables]).reshape(-1)
    return np.append(np.arange(NUM_WORDS, dtype=np.int32), NUM_WORDS + entries)
