"""What one forward pass reads, and how it comes about from the few integers a plan sends.

`ModelRunner` stages a plan (one copy to the device), then the device expands rows to tokens.
`ForwardBatch` is passed explicitly to the model, every layer and the attention backend. All its
tensors are on the device; host integers bound what kernels loop over.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanovllm.protocol.plan import StepPlan
from nanovllm.worker.attention.shared_prefix import SharingRows
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling.columns import Int32Array

# Writes to row state that travel in the same copy as the plan: the least of these numbers that is
# enough, as what a CUDA graph writes has a fixed size.
ROOMS = (0, 32, 128, 512, 2048, 16384)
NOT_CACHED = -1  # the slot of a token whose key and value are not kept
NUM_SECTIONS = 5  # of a staged plan, each with a word per entry


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Leading keys that some of a step's decoding rows have in common (`shared_prefix`)."""

    num_keys: Tensor  # [num_rows] int32: the same for all rows that share, 0 for the others
    leader: Tensor  # [1] int32: one that shares


class Ends(NamedTuple):
    """Of the entries that are sampled from, padding included: where their tokens end."""

    rows: Tensor  # [num_samples] int32
    positions: Tensor  # [num_samples] int32: of the token that is sampled
    tokens: Tensor  # [num_samples] int64: the one before it


@dataclass(slots=True)
class ForwardBatch:
    """One step. Tokens of a row are consecutive; `max_query_len == 1` is a pure decode step.

    Slot `s` of the KV cache is offset `s % block_size` of block `s // block_size`. Padding tokens
    and rows point at block 0, which no sequence owns, or at no slot (`NOT_CACHED`). The counts of a
    padded batch are upper bounds. Slots and block tables are those of one group of layers; of the
    group 0, `others` are the batches of the rest. received: what the stage before has made of the
    tokens, if there is one; it may be written over. ends: of a view with prompts. reads_new: rows
    share blocks that others of this step write, so a layer writes all of them before it reads any.
    """

    input_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    slot_mapping: Tensor  # [num_tokens] int64
    query_start_loc: Tensor  # [num_rows + 1] int32: row i owns tokens [i] … [i + 1]
    seq_lens: Tensor  # [num_rows] int32: context of each row, this step's tokens included
    block_tables: Tensor  # [num_rows, max_num_blocks] int32
    num_tokens: int
    num_rows: int
    num_decode_rows: int  # rows with one token
    max_query_len: int
    max_seq_len: int
    prefix: SharedPrefix | None = None
    group: int = 0
    others: tuple["ForwardBatch", ...] = ()
    received: Tensor | None = None  # [num_tokens, hidden_size]
    ends: Ends | None = None
    reads_new: bool = False

    def of_group(self, group: int) -> "ForwardBatch":
        """The same step as layers of that group see it, whose keys lie in other blocks."""
        return self if group == 0 else self.others[group - 1]


@dataclass(frozen=True, slots=True, eq=False)
class PlanEntries:
    """What a plan says of its entries, but for where they are in their rows: on the host.

    It stays the same from step to step while the same rows decode; its arrays are never written to.
    """

    rows: Int32Array  # [num_rows]
    counts: Int32Array  # [num_rows]: tokens of each
    query_start_loc: Int32Array  # [num_rows + 1]
    sampling: Int32Array  # [num_samples]: entries whose last token is sampled from
    sampled_rows: Int32Array  # [num_samples]: theirs
    num_tokens: int
    sample_all: bool  # every entry does

    @classmethod
    def of(cls, rows: list[int], counts: list[int], sampling: list[int]) -> "PlanEntries":
        """As a `StepPlan` has them."""
        all_rows, starts = np.array(rows, np.int32), [0, *accumulate(counts)]
        sample_all = len(sampling) == len(rows)
        sampled = np.array(sampling, np.int32)
        return cls(
            rows=all_rows,
            counts=np.array(counts, np.int32),
            query_start_loc=np.array(starts, np.int32),
            sampling=sampled,
            sampled_rows=all_rows if sample_all else all_rows[sampled],
            num_tokens=starts[-1],
            sample_all=sample_all,
        )


@dataclass(slots=True)
class StagedPlan:
    """A plan's integers: tensors on the device, arrays on the host.

    The tensors lie in one persistent buffer that the next plan overwrites, in stream order: a CUDA
    graph finds them at the same address on every replay.
    """

    sections: Tensor  # [NUM_SECTIONS, …] int32; a slice takes the host 4 µs: only what is asked for
    num_rows: int
    num_samples: int
    writes: Tensor  # [2, some of `ROOMS`] int32, for `RequestRows.write`
    entries: PlanEntries
    host_seq_lens: Int32Array  # [num_rows], this step's tokens included
    prefix: SharedPrefix | None = None
    starts: Tensor | None = None  # in place of those staged

    @property
    def sampled_positions(self) -> Int32Array:
        """[num_samples]: of the tokens that are sampled, on the host."""
        lens, entries = self.host_seq_lens, self.entries
        return lens if entries.sample_all else lens[entries.sampling]

    @property
    def rows(self) -> Tensor:
        """[num_rows] int32."""
        return self.sections[0, : self.num_rows]

    @property
    def num_computed(self) -> Tensor:
        """[num_rows] int32."""
        return self.sections[1, : self.num_rows]

    @property
    def query_start_loc(self) -> Tensor:
        """[num_rows + 1] int32."""
        return self.sections[2, : self.num_rows + 1] if self.starts is None else self.starts

    @property
    def sampling(self) -> Tensor:
        """[num_samples] int32: entries whose last token is sampled from."""
        return self.sections[3, : self.num_samples]


class PlanStaging:
    """Carries plans to the device through a ring of (on CUDA: pinned) buffers.

    num_buffers: one more than the steps in flight, so that the host never waits for one.
    """

    def __init__(self, *, max_num_rows: int, num_buffers: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._device = device
        self._section = max_num_rows + 2
        self._padding_row = max_num_rows
        self._padding = np.array([[max_num_rows], *[[0]] * (NUM_SECTIONS - 1)], np.int32)
        self._num_head = head = NUM_SECTIONS * self._section
        shape, num_words = (NUM_SECTIONS, self._section), head + 2 * ROOMS[-1]
        ring = [
            torch.zeros(num_words, dtype=torch.int32, pin_memory=cuda) for _ in range(num_buffers)
        ]
        self._copied = [torch.Event(device) for _ in ring] if cuda else []
        resident = torch.zeros_like(ring[0], device=device)
        on_device = ring if device.type == "cpu" else [resident] * num_buffers
        self._words: list[Int32Array] = [buffer.numpy() for buffer in ring]
        self._sections = [words[:head].view(shape) for words in on_device]
        # By room and buffer: what is copied, where to, and the writes in it. A slice takes long.
        self._parcels = [
            [
                (
                    words[: head + 2 * room],
                    there[: head + 2 * room],
                    there[head : head + 2 * room].view(2, -1),
                )
                for words, there in zip(ring, on_device, strict=True)
            ]
            for room in ROOMS
        ]
        self._counting = torch.arange(self._section, dtype=torch.int32, device=device)
        self._turn = 0
        # The sections of the last plan, from which those of the next one are made.
        self._host_sections = np.zeros(shape, np.int32)
        self._of: tuple[list[int], list[int], list[int]] | None = None  # the plan they are of
        self._entries = PlanEntries.of([], [], [])
        self._sharing: SharingRows | None = None

    def stage(
        self, plan: StepPlan, writes: Int32Array, *, sharing: SharingRows | None = None
    ) -> StagedPlan:
        """Start the one copy that brings a plan and what `RequestRows.record` made of it.

        Behind the plan's entries lie entries of the padding row, for the views to include.
        """
        self._turn = turn = (self._turn + 1) % len(self._words)
        if self._copied:
            self._copied[turn].synchronize()
        num_rows, num_samples = len(plan.rows), len(plan.sampling)
        if self._of != (plan.rows, plan.num_scheduled, plan.sampling):
            self._lay_out(plan)
        num_computed = self._host_sections[1, :num_rows]
        num_computed[:] = plan.num_computed
        if sharing is not None and sharing is not self._sharing:
            shared_keys = self._host_sections[4]
            shared_keys[:num_rows] = np.where(sharing.members, sharing.num_keys, 0)
            shared_keys[num_rows:] = 0
            shared_keys[-1] = sharing.leader
        self._sharing = sharing
        self._words[turn][: self._num_head] = self._host_sections.reshape(-1)
        on_device, entries = self._sections[turn], self._entries
        return StagedPlan(
            sections=on_device,
            num_rows=num_rows,
            num_samples=num_samples,
            writes=self._send(turn, writes),
            entries=entries,
            host_seq_lens=num_computed + entries.counts,
            prefix=None if sharing is None else _prefix_in(on_device[4], num_rows),
        )

    def _lay_out(self, plan: StepPlan) -> None:
        """The sections for a plan of other entries than the last one's."""
        self._of = self._sharing = None
        num_rows, num_samples = len(plan.rows), len(plan.sampling)
        self._entries = entries = PlanEntries.of(plan.rows, plan.num_scheduled, plan.sampling)
        self._host_sections[:] = self._padding
        rows, _, starts, sampling, _ = self._host_sections
        rows[:num_rows] = entries.rows
        starts[: num_rows + 1], starts[num_rows + 1 :] = entries.query_start_loc, entries.num_tokens
        sampling[:num_samples], sampling[num_samples:] = entries.sampling, num_rows
        self._of = plan.rows, plan.num_scheduled, plan.sampling

    def view(
        self,
        num_tokens: int,
        num_rows: int,
        *,
        max_seq_len: int,
        shares_prefix: bool,
    ) -> StagedPlan:
        """The first `num_rows` entries, and one of padding, of whatever is staged.

        As many tokens as rows make it a pure decode step; else entries have any numbers of tokens,
        and those beyond the entries' are padding (`expand_view`). Its tensors are the persistent
        buffer itself and constants; its arrays are upper bounds, as of one row with all tokens.
        """
        sections = self._sections[self._turn]
        counts, samples = [num_tokens] + [0] * (num_rows - 1), list(range(num_rows))
        if num_tokens == num_rows:
            counts = [1] * num_rows
        return StagedPlan(
            sections=sections,
            num_rows=num_rows + 1,
            num_samples=num_rows,
            writes=self._parcels[0][self._turn][2],
            entries=PlanEntries.of([self._padding_row] * num_rows, counts, samples),
            host_seq_lens=np.full(num_rows, max_seq_len, np.int32),
            prefix=_prefix_in(sections[4], num_rows) if shares_prefix else None,
            starts=self._counting[: num_rows + 1] if num_tokens == num_rows else None,
        )

    def _send(self, turn: int, writes: Int32Array) -> Tensor:
        """Bring a buffer's sections to the device, and behind them `writes`, which is returned: on
        a GPU the first one again and again where there is room for more."""
        num_writes = writes.shape[1]
        is_apart = num_writes > ROOMS[-1]
        words, there, room = self._parcels[0 if is_apart else bisect_left(ROOMS, num_writes)][turn]
        if num_writes and not is_apart:
            end = len(words)
            host = self._words[turn][self._num_head : end].reshape(2, -1)
            host[:, :num_writes], host[:, num_writes:] = writes, writes[:, :1]
        if self._device.type != "cpu":
            there.copy_(words, non_blocking=True)
        if self._copied:
            self._copied[turn].record()
        if is_apart:
            return self._send_apart(writes)
        # A CPU runs no graph, and would take its time for more.
        return room if self._copied or not num_writes else room[:, :num_writes]

    def _send_apart(self, writes: Int32Array) -> Tensor:
        """Many long prompts at once get a copy of their own (rare, so allocated on the spot)."""
        tensor = torch.from_numpy(writes)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)


class SampleStaging:
    """What the second halves of steps exchange with the device: words there, and answers back.

    On the device both always lie in the same place, where CUDA graphs find them, and which the next
    step writes over in stream order. On the host each step under way has memory of its own, from
    `take` until it gives that back. A stream of its own would spare the device some microseconds
    of copying, and cost the host, of which there is less to spare, a hundred.
    """

    def __init__(
        self, *, num_words: int, num_rows: int, num_more: int, device: torch.device
    ) -> None:
        """num_words: there, an even number. Answers are a token for each row, and more words."""
        self.is_cuda = device.type == "cuda"
        self.num_id_words = 2 * num_rows
        self.words = torch.zeros(num_words, dtype=torch.int32, device=device)
        self.answers = torch.zeros(self.num_id_words + num_more, dtype=torch.int32, device=device)
        self.id_words = self.answers[: self.num_id_words]
        self.token_ids = self.id_words.view(torch.int64)  # [num_rows]
        self.more = self.answers[self.num_id_words :]
        self.free: list[SampleSlot] = []

    def take(self) -> "SampleSlot":
        """One that nobody has; a step that fails need not give back its own."""
        return self.free.pop() if self.free else SampleSlot(self)


class SampleSlot:
    """A step's share of `SampleStaging` on the host (on CUDA in pinned memory).

    words: [num_words] int32, for the device. addresses: the same memory as int64. token_ids:
    [num_rows] int64. What is fetched is there after `done`, which the runner records.
    """

    def __init__(self, staging: SampleStaging) -> None:
        is_cuda = staging.is_cuda
        self._staging = staging
        self._words, self._answers = (
            torch.zeros(one.shape, dtype=torch.int32, pin_memory=is_cuda)
            for one in (staging.words, staging.answers)
        )
        self.words: Int32Array = self._words.numpy()
        self.addresses: npt.NDArray[np.int64] = self.words.view(np.int64)
        self._ids = self._answers[: staging.num_id_words]
        self.token_ids: npt.NDArray[np.int64] = self._ids.numpy().view(np.int64)
        self.done = torch.Event(staging.words.device) if is_cuda else None
        # To and from where so many words are copied: a slice takes the host as long as a launch.
        self._sent: dict[int, tuple[Tensor, Tensor]] = {}
        self._fetched: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def send(self, num_words: int) -> None:
        """Bring as many words to the device, in stream order."""
        if (pair := self._sent.get(num_words)) is None:
            pair = self._staging.words[:num_words], self._words[:num_words]
            self._sent[num_words] = pair
        pair[0].copy_(pair[1], non_blocking=True)

    def fetch(self) -> None:
        """Bring all tokens here."""
        self._ids.copy_(self._staging.id_words, non_blocking=True)

    def fetch_lines(self, num_lines: int, width: int) -> Tensor:
        """Bring them and so many lines of words, which are returned, [num_lines, width]."""
        key = num_lines, width
        if (fetched := self._fetched.get(key)) is None:
            start = self._staging.num_id_words
            end = start + num_lines * width
            lines = self._answers[start:end].view(num_lines, width)
            fetched = self._answers[:end], self._staging.answers[:end], lines
            self._fetched[key] = fetched
        to, source, lines = fetched
        to.copy_(source, non_blocking=True)
        return lines

    def give_back(self) -> None:
        """After `done`, when nobody reads it any more."""
        self._staging.free.append(self)


def _prefix_in(section: Tensor, num_rows: int) -> SharedPrefix:
    return SharedPrefix(section[:num_rows], section[-1:])


def slots_of(block_tables: Tensor, rows: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """The slot of each position of a row, [n] int64. rows: lines of block_tables, [n]."""
    block_ids = block_tables[rows, positions // block_size].long()
    return block_ids * block_size + positions % block_size


def build_batch(staged: StagedPlan, rows: RequestRows) -> ForwardBatch:
    """Expand a staged plan's rows to tokens, on the device.

    The plan's own counts are host integers here; `expand_view` is for shapes that are bounds.
    """
    lens, counts = staged.host_seq_lens, staged.entries.counts
    num_rows, num_tokens, max_seq_len = len(lens), staged.entries.num_tokens, int(lens.max())
    row_ids = staged.rows.long()
    query_lens = staged.query_start_loc.diff()  # [num_rows]
    if num_tokens == num_rows:
        token_rows, positions = row_ids, staged.num_computed.long()
    else:
        entries = torch.arange(num_rows, device=row_ids.device)
        entries = entries.repeat_interleave(query_lens, output_size=num_tokens)
        token_rows = row_ids[entries]
        first_positions = staged.num_computed - staged.query_start_loc[:-1]
        positions = torch.arange(num_tokens, device=row_ids.device) + first_positions[entries]
    slots, tables = [], []
    for table, size in zip(rows.block_tables, rows.block_sizes, strict=True):
        slots.append(slots_of(table, token_rows, positions, size))
        tables.append(table[:, : -(-max_seq_len // size)][row_ids])
    batch = ForwardBatch(
        input_ids=rows.token_ids[token_rows, positions].long(),
        positions=positions,
        slot_mapping=slots[0],
        query_start_loc=staged.query_start_loc,
        seq_lens=staged.num_computed + query_lens,
        block_tables=tables[0],
        num_tokens=num_tokens,
        num_rows=num_rows,
        num_decode_rows=int((counts == 1).sum()),
        max_query_len=int(counts.max()),
        max_seq_len=max_seq_len,
        prefix=staged.prefix,
    )
    return batch if len(tables) == 1 else _of_all_groups(batch, slots, tables)


def _of_all_groups(batch: ForwardBatch, slots: list[Tensor], tables: list[Tensor]) -> ForwardBatch:
    """batch: of the first group; slots and tables: of each."""
    batch.others = tuple(
        replace(batch, slot_mapping=slots[group], block_tables=tables[group], group=group)
        for group in range(1, len(tables))
    )
    return batch


def batch_of_view(staged: StagedPlan, rows: RequestRows) -> ForwardBatch:
    """The batch that a view of `PlanStaging` stands for: counts, bounds, and memory to fill in."""
    num_rows, num_tokens = len(staged.host_seq_lens), staged.entries.num_tokens
    max_seq_len, decodes = int(staged.host_seq_lens[0]), num_tokens == num_rows
    device = staged.rows.device
    input_ids, positions, *slots = torch.empty(
        2 + len(rows.block_tables), num_tokens, dtype=torch.int64, device=device
    )
    tables = [
        torch.empty(num_rows, -(-max_seq_len // size), dtype=torch.int32, device=device)
        for size in rows.block_sizes
    ]
    batch = ForwardBatch(
        input_ids=input_ids,
        positions=positions,
        slot_mapping=slots[0],
        query_start_loc=staged.query_start_loc[: num_rows + 1],
        seq_lens=torch.empty(num_rows, dtype=torch.int32, device=device),
        block_tables=tables[0],
        num_tokens=num_tokens,
        num_rows=num_rows,
        num_decode_rows=num_rows,
        max_query_len=1 if decodes else num_tokens,
        max_seq_len=max_seq_len,
        prefix=staged.prefix,
    )
    if not decodes:
        tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
        words = torch.empty(2, num_rows, dtype=torch.int32, device=device)
        batch.ends = Ends(words[0], words[1], tokens)
    return _of_all_groups(batch, slots, tables)


def expand_view(staged: StagedPlan, rows: RequestRows) -> ForwardBatch:
    """`build_batch` for a view of `PlanStaging`: shapes are bounds, so it can be captured.

    Padding tokens are the padding row's first. In a decode step each has an entry of its own; else
    they belong to no row of the batch and are not cached.
    """
    batch = batch_of_view(staged, rows)
    num_rows, starts = batch.num_rows, staged.query_start_loc
    row_ids = staged.rows.long()
    tokens = torch.arange(batch.num_tokens, device=row_ids.device, dtype=torch.int32)
    # Beyond all entries: num_rows, which is the padding row's.
    entries = torch.searchsorted(starts[1 : num_rows + 1], tokens, right=True)
    real = entries < num_rows
    entries = entries.clamp_(max=len(row_ids) - 1)
    offsets = tokens - starts[entries] + staged.num_computed[entries]
    batch.positions.copy_(torch.where(real, offsets, 0))
    token_rows = row_ids[entries]
    batch.input_ids.copy_(rows.token_ids[token_rows, batch.positions])
    batches, sizes = (batch, *batch.others), rows.block_sizes
    for one, table, size in zip(batches, rows.block_tables, sizes, strict=True):
        slots = slots_of(table, token_rows, batch.positions, size)
        one.slot_mapping.copy_(torch.where(real, slots, NOT_CACHED))
        one.block_tables.copy_(table[:, : one.block_tables.shape[1]][row_ids[:num_rows]])
    batch.seq_lens.copy_(staged.num_computed[:num_rows] + starts[: num_rows + 1].diff())
    if batch.ends is not None:
        sampled = staged.sampling.long()
        batch.ends.rows.copy_(staged.rows[sampled])
        ends = starts[sampled + 1]
        batch.ends.positions.copy_(staged.num_computed[sampled] + ends - starts[sampled])
        batch.ends.tokens.copy_(ends - 1)
    return batch
