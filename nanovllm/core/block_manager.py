"""Owns the KV blocks: who holds them, which are free, and which hold a known prefix.

`Scheduler` is its only caller. Block 0 is reserved for padding. Invariants: a block is free exactly
when its reference count is 0; only blocks whose tokens are known and computed have a key; a key
outlives its block's release and is dropped when the block is handed out again (lazy eviction).
"""

import secrets
import sys
from array import array

import xxhash

from nanovllm.core.sequence import Sequence

SALT_TAG = b"cache_salt:"


class FreeList:
    """Doubly linked list of block ids over two arrays; all operations O(1). Entry 0 is the head."""

    def __init__(self, num_blocks: int) -> None:
        self._next: list[int] = [*range(1, num_blocks), 0]
        self._previous: list[int] = [num_blocks - 1, *range(num_blocks - 1)]
        self._count = num_blocks - 1

    def __len__(self) -> int:
        return self._count

    def pop_first(self) -> int:
        block_id = self._next[0]
        assert block_id != 0, "no free block"
        self.remove(block_id)
        return block_id

    def remove(self, block_id: int) -> None:
        before, after = self._previous[block_id], self._next[block_id]
        self._next[before] = after
        self._previous[after] = before
        self._count -= 1

    def append(self, block_id: int) -> None:
        self._insert(block_id, self._previous[0], 0)

    def prepend(self, block_id: int) -> None:
        self._insert(block_id, 0, self._next[0])

    def _insert(self, block_id: int, before: int, after: int) -> None:
        self._next[before] = self._previous[after] = block_id
        self._previous[block_id], self._next[block_id] = before, after
        self._count += 1

    def __iter__(self) -> "FreeListIterator":
        return FreeListIterator(self._next)


class FreeListIterator:
    """Block ids, the one to be reused first at first."""

    def __init__(self, following: list[int]) -> None:
        self._following = following
        self._at = 0

    def __iter__(self) -> "FreeListIterator":
        return self

    def __next__(self) -> int:
        self._at = self._following[self._at]
        if self._at == 0:
            raise StopIteration
        return self._at


class BlockManager:
    """Paged allocation (Kwon et al. 2023) with a verified, chained prefix cache.

    A block's key is xxh3-128 over (parent key, token ids as int32, tagged salt), seeded at random
    per process. The block keeps that message and a hit compares it: a collision costs a miss,
    never wrong KV.
    """

    def __init__(
        self, *, num_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        assert num_blocks >= 2 and block_size >= 1
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_queries = 0  # prompt tokens looked up, and found, since start
        self.num_hits = 0
        self.hash_seed = secrets.randbits(64)
        self.free_list = FreeList(num_blocks)
        self.reference_counts = [0] * num_blocks
        self.keys: list[bytes | None] = [None] * num_blocks
        self.messages: list[bytes] = [b""] * num_blocks
        self.block_of_key: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self.free_list)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # ---- allocation

    def can_hold(self, sequence: Sequence, shared: list[int], *, reserve: int = 0) -> bool:
        """Whether all known tokens fit on top of `shared` blocks, leaving `reserve` blocks free."""
        num_new = self.num_blocks_for(len(sequence.token_ids)) - len(shared)
        num_revived = sum(self.reference_counts[block_id] == 0 for block_id in shared)
        return num_new + num_revived + reserve <= len(self.free_list)

    def hold(self, sequence: Sequence, shared: list[int]) -> None:
        """Give `sequence` blocks for all its known tokens, the first ones being `shared`."""
        assert not sequence.block_ids
        for block_id in shared:
            if self.reference_counts[block_id] == 0:
                self.free_list.remove(block_id)
            self.reference_counts[block_id] += 1
        sequence.block_ids = list(shared)
        num_new = self.num_blocks_for(len(sequence.token_ids)) - len(shared)
        sequence.block_ids += [self._take() for _ in range(num_new)]
        sequence.capacity = len(sequence.block_ids) * self.block_size
        if self.enable_prefix_caching:
            sequence.next_registration = (len(shared) + 1) * self.block_size

    def grow(self, sequence: Sequence) -> int:
        """Add one block; the caller has made sure that one is free. Returns its id."""
        block_id = self._take()
        sequence.block_ids.append(block_id)
        sequence.capacity += self.block_size
        return block_id

    def release(self, sequence: Sequence) -> None:
        """Let go of all blocks, tail first, so that leading blocks stay cached the longest."""
        for block_id in reversed(sequence.block_ids):
            self.reference_counts[block_id] -= 1
            if self.reference_counts[block_id] == 0:
                if self.keys[block_id] is None:
                    self.free_list.prepend(block_id)
                else:
                    self.free_list.append(block_id)
        sequence.block_ids = []
        sequence.capacity = 0
        sequence.next_registration = sys.maxsize

    def _take(self) -> int:
        block_id = self.free_list.pop_first()
        self._forget(block_id)
        self.reference_counts[block_id] = 1
        return block_id

    # ---- prefix cache

    def cached_prefix(self, sequence: Sequence) -> list[int]:
        """The longest leading run of cached full blocks, short of the last known token.

        The last token is always run: without it there would be no logits to sample from.
        """
        if not self.enable_prefix_caching:
            return []
        limit = (len(sequence.token_ids) - 1) // self.block_size
        found: list[int] = []
        for index in range(limit):
            key = self._key(sequence, index)
            block_id = self.block_of_key.get(key)
            if block_id is None or self.messages[block_id] != self._message(sequence, index):
                break
            found.append(block_id)
        return found

    def register(self, sequence: Sequence) -> None:
        """Enter the blocks that have become full, known and computed into the prefix map."""
        num_ready = min(sequence.num_computed, len(sequence.token_ids)) // self.block_size
        for index in range(sequence.next_registration // self.block_size - 1, num_ready):
            block_id = sequence.block_ids[index]
            key = self._key(sequence, index)
            # An equal block may be there already: both stay, so block tables are append-only.
            if key not in self.block_of_key and self.keys[block_id] is None:
                self.block_of_key[key] = block_id
                self.keys[block_id] = key
                self.messages[block_id] = self._message(sequence, index)
        sequence.next_registration = (num_ready + 1) * self.block_size

    def reset_prefix_cache(self) -> bool:
        """Forget every key. True if no block was in use, so that nothing will re-enter."""
        for block_id in range(1, self.num_blocks):
            self._forget(block_id)
        return len(self.free_list) == self.num_blocks - 1

    def _key(self, sequence: Sequence, index: int) -> bytes:
        keys = sequence.block_keys
        while len(keys) <= index:
            message = self._message(sequence, len(keys))
            keys.append(xxhash.xxh3_128_digest(message, seed=self.hash_seed))
        return keys[index]

    def _message(self, sequence: Sequence, index: int) -> bytes:
        """What is hashed and compared; the chain carries the first block's salt to the rest."""
        start = index * self.block_size
        tokens = array("i", sequence.token_ids[start : start + self.block_size]).tobytes()
        if index:
            return sequence.block_keys[index - 1] + tokens
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
        is_first = len(message) != len(key) + num_bytes or message.startswith(SALT_TAG, num_bytes)
        parent = b"" if is_first else message[: len(key)]
        start = len(parent)
        return key, parent, array("i", message[start : start + num_bytes]).tolist()

    # ---- for tests

    def check_invariants(self, holders: list[Sequence]) -> None:
        """Assert that reference counts, free list and prefix map agree with `holders`."""
        counts = [0] * self.num_blocks
        for sequence in holders:
            assert len(sequence.block_ids) * self.block_size == sequence.capacity
            for block_id in sequence.block_ids:
                counts[block_id] += 1
        assert counts == self.reference_counts, "reference counts differ from what sequences hold"
        free = list(self.free_list)
        assert len(free) == len(set(free)) == len(self.free_list)
        assert set(free) == {b for b in range(1, self.num_blocks) if counts[b] == 0}
        assert {k: b for b, k in enumerate(self.keys) if k is not None} == self.block_of_key
