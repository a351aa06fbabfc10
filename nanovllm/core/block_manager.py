"""Owns the KV blocks: which sequence holds which, which are free, which hold a known prefix.

`Scheduler` is its only caller. Block 0 is reserved for padding. Invariants: a block is free exactly
when its reference count is 0; only blocks whose tokens are known and computed have a key; a key
outlives its block's release and is dropped when the block is handed out again (lazy eviction).
"""

import secrets
import sys
from array import array
from collections.abc import Iterator

import xxhash

from nanovllm.checkpoint.kv_layout import most_blocks
from nanovllm.core.sequence import Sequence

SALT_TAG = b"cache_salt:"
KEY_BYTES = 16
NO_BLOCK = 0  # in a block table: behind a window, or not needed yet


class FreeList:
    """Doubly linked list of block ids over two arrays; all operations O(1). Entry 0 is the head.

    Blocks from `first_spare` on stay at its end until they are popped once (0: there are none).
    """

    def __init__(self, num_blocks: int, first_spare: int = 0) -> None:
        self._next: list[int] = [*range(1, num_blocks), 0]
        self._previous: list[int] = [num_blocks - 1, *range(num_blocks - 1)]
        self._count = num_blocks - 1
        self._spare = first_spare  # the first of those that are left; 0, the head, if none is

    def __len__(self) -> int:
        return self._count

    def pop_first(self) -> int:
        block_id = self._next[0]
        assert block_id != 0, "no free block"
        after = self._next[0] = self._next[block_id]
        self._previous[after] = 0
        self._count -= 1
        if block_id == self._spare:
            self._spare = after
        return block_id

    def remove(self, block_id: int) -> None:
        before, after = self._previous[block_id], self._next[block_id]
        self._next[before] = after
        self._previous[after] = before
        self._count -= 1
        if block_id == self._spare:
            self._spare = after

    def append(self, block_id: int) -> None:
        self._insert(block_id, self._previous[self._spare], self._spare)

    def prepend(self, block_id: int) -> None:
        self._insert(block_id, 0, self._next[0])

    def _insert(self, block_id: int, before: int, after: int) -> None:
        self._next[before] = self._previous[after] = block_id
        self._previous[block_id], self._next[block_id] = before, after
        self._count += 1

    def __iter__(self) -> Iterator[int]:
        """Block ids, the one to be reused first at first."""
        block_id = self._next[0]
        while block_id:
            yield block_id
            block_id = self._next[block_id]


class BlockManager:
    """Paged allocation (Kwon et al. 2023) with a verified, chained prefix cache.

    windows: one for each group of layers (`checkpoint.kv_layout`), None where all keys are kept. A
    block table has an entry for each group where a model with one group has one: entry
    `column * len(windows) + group`. step_tokens: the most that a step computes of a sequence.

    A block's key is xxh3-128 over (parent key, token ids as int32, tagged salt), seeded at random
    per process, and its group. The block keeps that message and a hit compares it: a collision
    costs a miss, never wrong KV (behind windows, where parents are gone, 128 bits must do).
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        windows: tuple[int | None, ...] = (None,),
        step_tokens: int = 0,
        num_first_blocks: int | None = None,
    ) -> None:
        """num_first_blocks: how many are used, by running sequences and for prefixes, before
        another one is touched, which then only happens for running sequences; None: all."""
        assert num_blocks >= 2 and block_size >= 1
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.windows = windows
        self.num_groups = len(windows)
        self._step_tokens = step_tokens
        self._sliding = [(group, size) for group, size in enumerate(windows) if size is not None]
        self._keeping = [group for group, size in enumerate(windows) if size is None]
        self.num_queries = 0  # prompt tokens looked up, and found, since start
        self.num_hits = 0
        self.hash_seed = secrets.randbits(64)
        first_spare = num_blocks if num_first_blocks is None else 1 + num_first_blocks
        self.free_list = FreeList(num_blocks, first_spare if first_spare < num_blocks else 0)
        self.reference_counts = [0] * num_blocks
        self.keys: list[bytes | None] = [None] * num_blocks
        self.messages: list[bytes] = [b""] * num_blocks
        self.block_of_key: dict[bytes, int] = {}

    @property
    def slides(self) -> bool:
        """Whether sequences let go of blocks while they run."""
        return bool(self._sliding)

    @property
    def num_free_blocks(self) -> int:
        return len(self.free_list)

    def num_columns_for(self, num_tokens: int) -> int:
        """Of a block table: entries of each group."""
        return -(-num_tokens // self.block_size)

    def num_tokens_in(self, table: list[int]) -> int:
        """That fit into all columns of a block table."""
        return len(table) // self.num_groups * self.block_size

    # ---- allocation

    def can_hold(self, sequence: Sequence, shared: list[int], *, reserve: int = 0) -> bool:
        """Whether all known tokens fit on top of `shared` entries, with `reserve` blocks left."""
        num_tokens = len(sequence.token_ids)
        num_needed = self.num_columns_for(num_tokens) * self.num_groups
        if self._sliding:
            num_needed = most_blocks(
                self.windows, num_tokens, block_size=self.block_size, step_tokens=self._step_tokens
            )
        num_held = sum(block_id and self.reference_counts[block_id] > 0 for block_id in shared)
        return num_needed - num_held + reserve <= len(self.free_list)

    def hold(self, sequence: Sequence, shared: list[int], *, num_tokens: int) -> None:
        """Give `sequence` blocks for all its known tokens, the first ones being `shared`; where
        there is a window, for those of its first step: up to `num_tokens`."""
        assert not sequence.block_ids
        for block_id in shared:
            if block_id == NO_BLOCK:
                continue
            if self.reference_counts[block_id] == 0:
                self.free_list.remove(block_id)
            self.reference_counts[block_id] += 1
        known, now = self.num_columns_for(len(sequence.token_ids)), self.num_columns_for(num_tokens)
        first = len(shared) // self.num_groups
        sequence.block_ids = shared + [
            self._take() if window is None or column < now else NO_BLOCK
            for column in range(first, known)
            for window in self.windows
        ]
        sequence.capacity = (now if self._sliding else known) * self.block_size
        if self.enable_prefix_caching:
            sequence.next_registration = (first + 1) * self.block_size

    def slide(self, sequence: Sequence) -> None:
        """Let go of the blocks that its next tokens do not see."""
        table, size = sequence.block_ids, self.num_groups
        for group, window in self._sliding:
            first = max(0, sequence.num_computed - window + 1) // self.block_size
            index = (first - 1) * size + group
            while index >= 0 and table[index] != NO_BLOCK:
                self._drop(table[index])
                table[index] = NO_BLOCK
                index -= size

    def lacking(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Entries of its block table, from its capacity on, that it lacks for so many tokens."""
        table, size = sequence.block_ids, self.num_groups
        start = self.num_columns_for(sequence.capacity) * size
        end = self.num_columns_for(num_tokens) * size
        num_entries = len(table)
        return [
            index for index in range(start, end) if index >= num_entries or table[index] == NO_BLOCK
        ]

    def grow(self, sequence: Sequence, lacking: list[int], num_tokens: int) -> None:
        """Give it a block for each entry that it is `lacking` for so many tokens; the caller has
        made sure that they are free."""
        table = sequence.block_ids
        for index in lacking:
            if index == len(table):
                table.append(self._take())
            else:
                table[index] = self._take()
        sequence.capacity = self.num_columns_for(num_tokens) * self.block_size

    def release(self, sequence: Sequence) -> None:
        """Let go of all blocks, tail first, so that leading blocks stay cached the longest."""
        for block_id in reversed(sequence.block_ids):
            if block_id != NO_BLOCK:
                self._drop(block_id)
        sequence.block_ids = []
        sequence.capacity = 0
        sequence.next_registration = sys.maxsize

    def _drop(self, block_id: int) -> None:
        self.reference_counts[block_id] -= 1
        if self.reference_counts[block_id] == 0:
            if self.keys[block_id] is None:
                self.free_list.prepend(block_id)
            else:
                self.free_list.append(block_id)

    def _take(self) -> int:
        block_id = self.free_list.pop_first()
        if self.keys[block_id] is not None:
            self._forget(block_id)
        self.reference_counts[block_id] = 1
        return block_id

    # ---- prefix cache

    def cached_prefix(self, sequence: Sequence) -> list[int]:
        """Entries of a block table for the longest prefix that is cached, in full blocks, short of
        the last known token. Of layers with a window, what lies in it at the prefix's end.

        The last token is always run: without it there would be no logits to sample from.
        """
        if not self.enable_prefix_caching:
            return []
        limit = (len(sequence.token_ids) - 1) // self.block_size
        table: list[int] = []
        for column in range(limit):
            entries = [NO_BLOCK] * self.num_groups
            for group in self._keeping:
                entries[group] = self._cached(sequence, column, group)
            if any(entries[group] == NO_BLOCK for group in self._keeping):
                break
            table += entries
        return self._with_windows(sequence, table) if self._sliding else table

    def _with_windows(self, sequence: Sequence, table: list[int]) -> list[int]:
        """As much of a table as has cached blocks for all windows at its end, and those in it."""
        end, size = len(table) // self.num_groups, self.num_groups
        found: dict[tuple[int, int], int] = {}

        def is_cached(column: int, group: int) -> bool:
            if (column, group) not in found:
                found[column, group] = self._cached(sequence, column, group)
            return found[column, group] != NO_BLOCK

        while end:
            places = self._places_seen(end)
            missing = next((column for column, group in places if not is_cached(column, group)), -1)
            if missing < 0:
                break
            end = missing
        table = table[: end * size]
        for column, group in self._places_seen(end):
            table[column * size + group] = found[column, group]
        return table

    def _places_seen(self, end: int) -> Iterator[tuple[int, int]]:
        """The columns before column `end` that tokens behind it see through a window, and the
        group of the window."""
        for group, window in self._sliding:
            first = max(0, end * self.block_size - window + 1) // self.block_size
            yield from ((column, group) for column in range(end - 1, first - 1, -1))

    def prefix_of_leader(self, leader: Sequence, num_tokens: int) -> list[int]:
        """Entries of a running sequence's table for its first tokens, in full blocks, at most
        `num_tokens`; nothing if it has let go of some that are needed."""
        size = self.num_groups
        end = num_tokens // self.block_size
        table = leader.block_ids[: end * size]
        seen = {column * size + group for column, group in self._places_seen(end)}
        if any(table[index] == NO_BLOCK for index in seen):
            return []
        for group, _ in self._sliding:
            for index in range(group, end * size, size):
                if index not in seen:
                    table[index] = NO_BLOCK
        return table

    def register(self, sequence: Sequence) -> None:
        """Enter the blocks that have become full, known and computed into the prefix map."""
        num_ready = min(sequence.num_computed, len(sequence.token_ids)) // self.block_size
        first = sequence.next_registration // self.block_size - 1
        for column in range(first, num_ready):
            message = self._message(sequence, column)
            for group in range(self.num_groups):
                block_id = sequence.block_ids[column * self.num_groups + group]
                key = self._key(sequence, column, group, message)
                # An equal block may be there already: both stay, as tables say where KV lies.
                is_new = key not in self.block_of_key and self.keys[block_id] is None
                if is_new and block_id != NO_BLOCK:
                    self.block_of_key[key] = block_id
                    self.keys[block_id] = key
                    self.messages[block_id] = message
        sequence.next_registration = (num_ready + 1) * self.block_size

    def reset_prefix_cache(self) -> bool:
        """Forget every key. True if no block was in use, so that nothing will re-enter."""
        for block_id in range(1, self.num_blocks):
            self._forget(block_id)
        return len(self.free_list) == self.num_blocks - 1

    def _cached(self, sequence: Sequence, column: int, group: int) -> int:
        """The block of a group that holds these tokens behind the same prefix, or `NO_BLOCK`."""
        message = self._message(sequence, column)
        block_id = self.block_of_key.get(self._key(sequence, column, group, message), NO_BLOCK)
        return NO_BLOCK if block_id and self.messages[block_id] != message else block_id

    def _key(self, sequence: Sequence, column: int, group: int, message: bytes) -> bytes:
        """message: the column's."""
        keys = sequence.block_keys
        if len(keys) == column:
            keys.append(xxhash.xxh3_128_digest(message, seed=self.hash_seed))
        return keys[column] + bytes([group]) if group else keys[column]

    def _message(self, sequence: Sequence, column: int) -> bytes:
        """What is hashed and compared; the chain carries the first block's salt to the rest."""
        start, keys = column * self.block_size, sequence.block_keys
        tokens = array("i", sequence.token_ids[start : start + self.block_size]).tobytes()
        if column:
            while len(keys) < column:  # of blocks that are a leader's
                self._key(sequence, len(keys), 0, self._message(sequence, len(keys)))
            return keys[column - 1] + tokens
        if sequence.cache_salt is None:
            return tokens
        return tokens + SALT_TAG + sequence.cache_salt.encode()

    def _forget(self, block_id: int) -> None:
        key = self.keys[block_id]
        if key is not None:
            del self.block_of_key[key]
            self.keys[block_id] = None
            self.messages[block_id] = b""

    # ---- for viewers

    def ref_counts(self, num_dense: int, stride: int) -> list[int]:
        """Of the first `num_dense` blocks and every `stride`-th after them; block 0 left out."""
        counts = self.reference_counts
        return counts[1 : num_dense + 1] + counts[num_dense + 1 :: stride]

    def keyed(self, num_dense: int, stride: int) -> bytes:
        """Of the same blocks: 1 for those which hold a known prefix, else 0."""
        keys = self.keys
        return bytes(map(bool, keys[1 : num_dense + 1] + keys[num_dense + 1 :: stride]))

    def prefix_of(self, block_id: int) -> tuple[bytes, bytes, list[int]] | None:
        """Key, key of the block before it (empty for a first one) and token ids, if known."""
        key, message = self.keys[block_id], self.messages[block_id]
        if key is None:
            return None
        num_bytes = self.block_size * array("i").itemsize
        # See `_message`: a first block begins with its tokens, any other with its parent's key.
        is_first = len(message) != KEY_BYTES + num_bytes or message.startswith(SALT_TAG, num_bytes)
        parent = b"" if is_first else message[:KEY_BYTES]
        start = len(parent)
        return key[:KEY_BYTES], parent, array("i", message[start : start + num_bytes]).tolist()

    # ---- for tests

    def check_invariants(self, holders: list[Sequence]) -> None:
        """Assert that reference counts, free list and prefix map agree with `holders`."""
        counts = [0] * self.num_blocks
        for sequence in holders:
            table, size = sequence.block_ids, self.num_groups
            assert len(table) % size == 0 and sequence.capacity <= self.num_tokens_in(table)
            assert self._sliding or sequence.capacity == self.num_tokens_in(table)
            for column in range(sequence.capacity // self.block_size):
                for group, window in enumerate(self.windows):
                    seen = 0 if window is None else sequence.num_computed - window + 1
                    is_seen = (column + 1) * self.block_size > seen
                    assert table[column * size + group] or not is_seen, "a block is missing"
            for block_id in filter(None, table):
                counts[block_id] += 1
        assert counts == self.reference_counts, "reference counts differ from what sequences hold"
        free = list(self.free_list)
        assert len(free) == len(set(free)) == len(self.free_list)
        assert set(free) == {b for b in range(1, self.num_blocks) if counts[b] == 0}
        assert {k: b for b, k in enumerate(self.keys) if k is not None} == self.block_of_key
