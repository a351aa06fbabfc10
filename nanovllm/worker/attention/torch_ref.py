"""Paged attention in plain torch: the backend of CPUs, and the oracle for all others.

`prepare` turns a batch into index tensors once per step; `forward` uses them in every layer. Rows
with one new token, of like lengths, go together; rows with more go one by one.
"""

import warnings
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nanovllm.worker.attention.base import AttentionSpec
from nanovllm.worker.forward_batch import ForwardBatch

# Padding a group may hold, in tokens; more than this costs more than the calls of another group.
MAX_GROUP_PADDING = 512


class Part(Protocol):
    """Some of a batch's tokens, and how they attend.

    keys and values: [num_slots, num_kv_heads, head_dim], the layer's whole cache.
    """

    tokens: Tensor | slice  # which of the batch's tokens

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """query: that of `tokens`, [n, num_heads, head_dim]. Returns a tensor of its shape."""


class Chunk:
    """Several new tokens of one row."""

    def __init__(
        self, spec: AttentionSpec, block_table: Tensor, *, tokens: slice, seq_len: int
    ) -> None:
        self.tokens = tokens
        self._scale = spec.scale
        device = block_table.device
        start = seq_len - (tokens.stop - tokens.start)
        window = spec.sliding_window or seq_len
        first = max(0, start - window + 1)
        seen = torch.arange(first, seq_len, device=device)
        self._slots = _slots(block_table[None], seen[None], spec.block_size)[0]  # [length]
        self._mask: Tensor | None = None  # [num_tokens, length]; None: plain causal
        if start > 0 or window < seq_len:
            distance = torch.arange(start, seq_len, device=device)[:, None] - seen
            self._mask = (distance >= 0) & (distance < window)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            keys[self._slots].transpose(0, 1)[None],
            values[self._slots].transpose(0, 1)[None],
            attn_mask=self._mask,
            is_causal=self._mask is None,
            scale=self._scale,
            enable_gqa=True,
        )
        return attended[0].transpose(0, 1)


class GatheredRows:
    """One new token of each of several rows; keys and values are copied side by side first."""

    def __init__(self, spec: AttentionSpec, *, tokens: Tensor, slots: Tensor, mask: Tensor) -> None:
        """tokens: [rows]; slots: [rows, length]; mask: [rows, length], False is padding."""
        self.tokens = tokens
        self._slots = slots
        self._mask = mask[:, None, None, :]
        self._spec = spec

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        spec, num_rows = self._spec, len(query)
        # The queries that share a key head stand where a longer prompt's would.
        attended = F.scaled_dot_product_attention(
            query.reshape(num_rows, spec.num_kv_heads, -1, spec.head_dim),
            keys[self._slots].transpose(1, 2),
            values[self._slots].transpose(1, 2),
            attn_mask=self._mask,
            scale=spec.scale,
        )
        return attended.reshape(query.shape)


class StreamedRows:
    """One new token of each of several rows; keys and values are read once, where they lie.

    Both products of attention exist in torch with a gather built in: Q · Kᵀ where an index says
    so is a sampled matrix product, and weighted sums of rows of V are an embedding bag.
    """

    def __init__(self, spec: AttentionSpec, *, tokens: Tensor, slots: Tensor, mask: Tensor) -> None:
        """tokens: [rows]; slots: [rows, length]; mask: [rows, length], False is padding."""
        self.tokens = tokens
        self._scale = spec.scale
        length = slots.shape[1]
        kv_heads = torch.arange(spec.num_heads) // (spec.num_heads // spec.num_kv_heads)
        # Rows of the cache seen as [num_slots * num_kv_heads, head_dim]: [rows * num_heads, length]
        index = (slots[:, None, :] * spec.num_kv_heads + kv_heads[:, None]).flatten(0, 1)
        self._index = index.flatten()
        self._starts = torch.arange(0, len(self._index) + 1, length)
        self._num_seen = int(slots.max() + 1) * spec.num_kv_heads
        self._scores = torch.sparse_csr_tensor(
            self._starts,
            self._index,
            torch.zeros(len(self._index)),
            size=(len(index), self._num_seen),
            check_invariants=False,
        )
        bias = torch.zeros_like(mask, dtype=spec.dtype).masked_fill_(~mask, -torch.inf)
        self._bias = bias.repeat_interleave(spec.num_heads, 0)  # [rows * num_heads, length]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        torch.sparse.sampled_addmm(
            self._scores,
            query.flatten(0, 1),
            keys[: self._num_seen].t(),
            beta=0.0,
            alpha=self._scale,
            out=self._scores,
        )
        scores = self._scores.values().view_as(self._bias)
        weights = (scores + self._bias).softmax(-1).flatten()
        starts = self._starts[:-1]
        attended = torch.embedding_bag(values, self._index, starts, False, 0, False, weights)[0]
        return attended.view(query.shape)


class TorchAttention:
    """Implements `attention.base.AttentionBackend`; supports everything."""

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        self._parts: list[Part] = []
        self._rows_class: type[GatheredRows | StreamedRows] = GatheredRows
        # torch multiplies where an index says so in fp32 and fp64 only.
        if spec.device.type == "cpu" and spec.dtype == torch.float32:
            self._rows_class = StreamedRows
            with warnings.catch_warnings():
                # torch says once per process that its sparse tensors are in beta; let it say it now
                warnings.simplefilter("ignore")
                torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1))

    @staticmethod
    def unsupported(spec: AttentionSpec) -> str | None:
        return None

    @staticmethod
    def kv_shape(spec: AttentionSpec, *, num_layers: int, num_blocks: int) -> tuple[int, ...]:
        return 2, num_layers, num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim

    def prepare(self, batch: ForwardBatch) -> None:
        """Waits for the device: the reference wants lengths on the host."""
        starts = batch.query_start_loc.tolist()
        seq_lens = batch.seq_lens.clamp(min=1).tolist()  # a padding row may have none
        self._parts = []
        singles: list[int] = []
        for row, (start, end) in enumerate(pairwise(starts)):
            if end - start == 1:
                singles.append(row)
            elif end > start:
                chunk = Chunk(
                    self._spec,
                    batch.block_tables[row],
                    tokens=slice(start, end),
                    seq_len=seq_lens[row],
                )
                self._parts.append(chunk)
        window = self._spec.sliding_window
        lengths = [min(n, window) if window else n for n in seq_lens]
        for rows in group_by_length(singles, lengths):
            self._parts.append(self._single_token_rows(batch, rows, max(lengths[r] for r in rows)))

    def forward(self, query: Tensor, layer_cache: Tensor, batch: ForwardBatch) -> Tensor:
        keys, values = layer_cache.flatten(1, 2).unbind(0)  # each [num_slots, kv_heads, head_dim]
        output = torch.zeros_like(query)  # padding tokens belong to no part
        for part in self._parts:
            output[part.tokens] = part.attend(query[part.tokens], keys, values)
        return output

    def _single_token_rows(self, batch: ForwardBatch, rows: list[int], length: int) -> Part:
        device = batch.seq_lens.device
        row_index = torch.tensor(rows, device=device)
        seq_lens = batch.seq_lens[row_index].clamp(min=1)[:, None]  # [rows, 1]
        positions = torch.arange(length, device=device) + (seq_lens - length).clamp(min=0)
        mask = positions < seq_lens
        positions = positions.minimum(seq_lens - 1)
        slots = _slots(batch.block_tables[row_index], positions, self._spec.block_size)
        tokens = batch.query_start_loc[row_index].long()
        return self._rows_class(self._spec, tokens=tokens, slots=slots, mask=mask)


def _slots(block_tables: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """block_tables: [rows, max_num_blocks]; positions and result: [rows, length] int64."""
    blocks = block_tables.long().gather(1, (positions // block_size).long())
    return blocks * block_size + positions % block_size


def group_by_length(rows: list[int], lengths: list[int]) -> list[list[int]]:
    """Group rows so that padding a group to its longest adds few tokens; in order within each."""
    groups: list[list[int]] = []
    room = longest = 0
    for row in sorted(rows, key=lambda row: -lengths[row]):
        padding = longest - lengths[row]
        if not groups or padding > room:
            groups.append([])
            longest, room, padding = lengths[row], MAX_GROUP_PADDING, 0
        groups[-1].append(row)
        room -= padding
    return [sorted(group) for group in groups]
