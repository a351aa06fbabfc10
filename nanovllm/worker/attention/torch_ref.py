"""Paged attention in plain torch: the backend of CPUs, and the oracle for all others.

A batch becomes index tensors once per step and group of layers (whose keys lie in other blocks);
all layers of the group use them. Rows with one new token, of like lengths, go together; rows with
more go one by one.
"""

import warnings
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nanovllm.worker.attention.base import AttentionSpec, Rotary
from nanovllm.worker.forward_batch import ForwardBatch

# Padding a group may hold, in tokens; more than this costs more than the calls of another group.
MAX_GROUP_PADDING = 512


class Part(Protocol):
    """Some of a batch's tokens, and how they attend."""

    @property
    def tokens(self) -> Tensor | slice:
        """Which of the batch's tokens."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None) -> Tensor:
        """query: that of `tokens`, [n, num_heads, head_dim]. Returns a tensor of its shape.

        keys and values: [num_slots, num_kv_heads, head_dim], the layer's whole cache; sinks:
        [num_heads].
        """


def softmax_of(
    scores: Tensor, mask: Tensor, *, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """The weights of keys from scaled products, [..., keys].

    mask: False hides a key. softcap: scores stay within it, by tanh (Gemma 2). sinks: broadcast to
    scores with one key; the share of a key whose value is nothing (gpt-oss).
    """
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is None:
        return scores.softmax(-1)
    with_sinks = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), dim=-1)
    return with_sinks.softmax(-1)[..., :-1]


def attend_plainly(
    spec: AttentionSpec,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with soft caps or sinks, for which torch has no kernel; in fp32.

    query: [rows, tokens, num_heads, head_dim]; keys and values: [rows, length, num_kv_heads,
    head_dim]; mask: [rows, tokens, length]. Returns a tensor of query's shape.
    """
    shape = *query.shape[:2], spec.num_kv_heads, -1, spec.head_dim
    grouped = query.reshape(shape).float()
    scores = torch.einsum("rtkgd,rlkd->rkgtl", grouped, keys.float()) * spec.scale
    if sinks is not None:
        sinks = sinks.view(spec.num_kv_heads, -1, 1, 1)
    weights = softmax_of(scores, mask[:, None, None], softcap=spec.softcap, sinks=sinks)
    attended = torch.einsum("rkgtl,rlkd->rtkgd", weights, values.float())
    return attended.flatten(2, 3).to(query.dtype)


class Chunk:
    """Several new tokens of one row."""

    def __init__(
        self, spec: AttentionSpec, block_table: Tensor, *, tokens: slice, seq_len: int
    ) -> None:
        self.tokens = tokens
        self._spec = spec
        start = seq_len - (tokens.stop - tokens.start)
        window = spec.sliding_window or seq_len
        seen = torch.arange(max(0, start - window + 1), seq_len, device=block_table.device)
        self._slots = _slots(block_table[None], seen[None], spec.block_size)[0]  # [length]
        self._mask: Tensor | None = None  # [num_tokens, length]; None: plain causal
        self._is_plain = spec.softcap is None and not spec.sinks
        if start > 0 or window < seq_len or not self._is_plain:
            distance = torch.arange(start, seq_len, device=seen.device)[:, None] - seen
            self._mask = (distance >= 0) & (distance < window)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None) -> Tensor:
        keys = _read(keys, self._slots, query.dtype)[None]
        values = _read(values, self._slots, query.dtype)[None]
        if not self._is_plain:
            assert self._mask is not None
            mask = self._mask[None]
            return attend_plainly(self._spec, query[None], keys, values, mask, sinks)[0]
        attended = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=self._mask,
            is_causal=self._mask is None,
            scale=self._spec.scale,
            enable_gqa=True,
        )
        return attended[0].transpose(0, 1)


class GatheredRows:
    """One new token of each of several rows: keys and values are copied side by side first."""

    def __init__(self, spec: AttentionSpec, *, tokens: Tensor, slots: Tensor, mask: Tensor) -> None:
        """tokens: [rows]; slots: [rows, length]; mask: [rows, length], False is padding."""
        self.tokens = tokens
        self._spec = spec
        self._slots = slots.flatten()
        self._mask = mask[:, None, None, :]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None) -> Tensor:
        num_rows, (num_kv_heads, head_dim) = len(query), keys.shape[1:]
        shape = num_rows, -1, num_kv_heads, head_dim
        keys = _read(keys, self._slots, query.dtype).view(shape)
        values = _read(values, self._slots, query.dtype).view(shape)
        if self._spec.softcap is not None or self._spec.sinks:
            mask = self._mask[:, 0]
            return attend_plainly(self._spec, query[:, None], keys, values, mask, sinks)[:, 0]
        attended = F.scaled_dot_product_attention(
            # The queries that share a head of keys stand where those of a longer prompt would.
            query.reshape(num_rows, num_kv_heads, -1, head_dim),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=self._mask,
            scale=self._spec.scale,
        )
        return attended.reshape(query.shape)


class StreamedRows:
    """As `GatheredRows`, in fp32 on a CPU: keys and values are read once, from where they lie.

    Decoding costs what reading them costs, so a copy would double it. Both products of attention
    exist in torch with the gathering built in: q · k at the entries of a sparse matrix is a sampled
    matrix product, and weighted sums of rows of v are an embedding bag.
    """

    def __init__(self, spec: AttentionSpec, *, tokens: Tensor, slots: Tensor, mask: Tensor) -> None:
        """tokens: [rows]; slots: [rows, length]; mask: [rows, length], False is padding."""
        self.tokens = tokens
        self._spec = spec
        self._num_seen = int(slots.max() + 1) * spec.num_kv_heads
        # Rows of the cache seen as [num_slots * num_kv_heads, head_dim], for each row and head.
        heads = torch.arange(spec.num_heads) // (spec.num_heads // spec.num_kv_heads)
        index = slots[:, None, :] * spec.num_kv_heads + heads[:, None]  # [rows, num_heads, length]
        self._index = index.flatten()
        self._starts = torch.arange(0, len(self._index) + 1, index.shape[2])
        self._products = torch.sparse_csr_tensor(
            self._starts,
            self._index,
            torch.zeros(len(self._index)),
            size=(len(self._starts) - 1, self._num_seen),
            check_invariants=False,
        )
        self._mask = mask[:, None]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None) -> Tensor:
        torch.sparse.sampled_addmm(
            self._products,
            query.flatten(0, 1),
            keys.flatten(0, 1)[: self._num_seen].t(),
            beta=0.0,
            alpha=self._spec.scale,
            out=self._products,
        )
        num_rows, _, length = self._mask.shape
        scores = self._products.values().view(num_rows, -1, length)
        if sinks is not None:
            sinks = sinks[:, None]
        softcap = self._spec.softcap
        weights = softmax_of(scores, self._mask, softcap=softcap, sinks=sinks).flatten()
        values, starts = values.flatten(0, 1), self._starts[:-1]
        attended = torch.embedding_bag(values, self._index, starts, False, 0, False, weights)[0]
        return attended.view(query.shape)


class TorchAttention:
    """Implements `attention.base.AttentionBackend`, in any precision and on any device."""

    shares_prefix = False
    is_capturable = False
    most_at_once = 0

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        # By group: its parts, and whether they are one part of all tokens.
        self._parts: dict[int, tuple[list[Part], bool]] = {}
        self._rows_class: type[GatheredRows | StreamedRows] = GatheredRows
        if spec.device.type == "cpu" and spec.dtype == spec.cache_dtype == torch.float32:
            self._rows_class = StreamedRows
            with warnings.catch_warnings():
                # torch says once per process that sparse tensors are in beta: let it be here.
                warnings.simplefilter("ignore")
                torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1))

    @staticmethod
    def unsupported(spec: AttentionSpec) -> str | None:
        return None

    @staticmethod
    def kv_shape(spec: AttentionSpec, *, num_layers: int, num_blocks: int) -> tuple[int, ...]:
        return 2, num_layers, num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim

    def prepare(self, batch: ForwardBatch) -> None:
        """Nothing yet: which groups its layers are of is seen when they come."""
        self._parts = {}

    def _parts_of(self, batch: ForwardBatch) -> tuple[list[Part], bool]:
        """Waits for the device: this backend wants lengths on the host."""
        starts = batch.query_start_loc.tolist()
        seq_lens = batch.seq_lens.clamp(min=1).tolist()  # a padding row may have none
        singles: list[int] = []
        parts: list[Part] = []
        for row, (start, end) in enumerate(pairwise(starts)):
            if end - start == 1:
                singles.append(row)
            elif end > start:
                table, tokens = batch.block_tables[row], slice(start, end)
                parts.append(Chunk(self._spec, table, tokens=tokens, seq_len=seq_lens[row]))
        window = self._spec.sliding_window
        lengths = [min(seq_len, window or seq_len) for seq_len in seq_lens]
        for rows in group_by_length(singles, lengths):
            parts.append(self._single_token_rows(batch, rows, max(lengths[r] for r in rows)))
        return parts, len(parts) == 1 and starts[-1] == batch.num_tokens

    def forward(
        self,
        qkv: Tensor,
        rotary: Rotary,
        layer_cache: Tensor,
        batch: ForwardBatch,
        sinks: Tensor | None = None,
    ) -> Tensor:
        query = rotary.apply(qkv, batch, layer_cache)
        keys, values = layer_cache.flatten(1, 2).unbind(0)  # each [num_slots, kv_heads, head_dim]
        if batch.group not in self._parts:
            self._parts[batch.group] = self._parts_of(batch)
        parts, is_one = self._parts[batch.group]
        if is_one:
            return parts[0].attend(query, keys, values, sinks)
        output = torch.zeros_like(query)  # tokens of padding may belong to no part
        for part in parts:
            output[part.tokens] = part.attend(query[part.tokens], keys, values, sinks)
        return output

    def _single_token_rows(self, batch: ForwardBatch, rows: list[int], longest: int) -> Part:
        """rows: with one new token each; longest: the most tokens any of them sees."""
        spec, device = self._spec, batch.seq_lens.device
        row_index = torch.tensor(rows, device=device)
        ends = batch.seq_lens[row_index].clamp(min=1)[:, None]  # [rows, 1]
        firsts = (ends - (spec.sliding_window or longest)).clamp(min=0)
        positions = firsts + torch.arange(longest, device=device)
        mask = positions < ends
        # Padding repeats a slot of the row's own: any other might hold NaN, which 0 does not mask.
        slots = _slots(batch.block_tables[row_index], positions.minimum(ends - 1), spec.block_size)
        tokens = batch.query_start_loc[row_index].long()
        return self._rows_class(spec, tokens=tokens, slots=slots, mask=mask)


def _slots(block_tables: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """block_tables: [rows, max_num_blocks]; positions and result: [rows, length] int64."""
    positions = positions.long()
    block_ids = block_tables.long().gather(1, positions // block_size)
    return block_ids * block_size + positions % block_size


def _read(cache: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """cache: [num_slots, num_kv_heads, head_dim]. Returns [len(slots), …] in `dtype`."""
    if cache.dtype == dtype:
        return cache.index_select(0, slots)
    # As bytes: torch indexes no FP8.
    return cache.view(torch.uint8).index_select(0, slots).view(cache.dtype).to(dtype)


def group_by_length(rows: list[int], lengths: list[int]) -> list[list[int]]:
    """Group rows so that padding each to its group's longest adds few tokens; rows in order."""
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
