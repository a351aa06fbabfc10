"""Blocks: allocation, sharing, order of reuse, and the verified prefix cache."""

import pytest

from nanovllm.core.block_manager import BlockManager, FreeList
from nanovllm.core.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

BLOCK_SIZE = 4


def make_sequence(token_ids: list[int], *, salt: str | None = None) -> Sequence:
    sequence = Sequence(0, 0, token_ids, SamplingParams())
    sequence.cache_salt = salt
    return sequence


def make_blocks(num_blocks: int = 10, *, caching: bool = True) -> BlockManager:
    return BlockManager(num_blocks=num_blocks, block_size=BLOCK_SIZE, enable_prefix_caching=caching)


def run(blocks: BlockManager, sequence: Sequence) -> None:
    """Hold, compute all known tokens, register."""
    shared = blocks.cached_prefix(sequence)
    blocks.hold(sequence, shared, num_tokens=len(sequence.token_ids))
    sequence.num_computed = len(sequence.token_ids)
    blocks.register(sequence)


def test_free_list_keeps_its_order() -> None:
    free = FreeList(6)
    assert list(free) == [1, 2, 3, 4, 5]
    free.remove(3)
    assert [free.pop_first(), free.pop_first()] == [1, 2]
    free.append(1)
    free.prepend(3)
    assert list(free) == [3, 4, 5, 1] and len(free) == 4


def test_spare_blocks_stay_last_until_they_are_needed() -> None:
    free = FreeList(7, 4)
    assert [free.pop_first(), free.pop_first()] == [1, 2]
    free.append(2)
    free.append(1)
    assert list(free) == [3, 2, 1, 4, 5, 6]
    assert [free.pop_first() for _ in range(4)] == [3, 2, 1, 4]
    free.append(4)  # it is like the others now
    free.append(1)
    assert list(free) == [4, 1, 5, 6]
    assert [free.pop_first() for _ in range(4)] == [4, 1, 5, 6]
    free.append(6)
    free.append(5)
    assert list(free) == [6, 5]


def test_prefixes_of_ended_sequences_take_no_spare_blocks() -> None:
    blocks = BlockManager(num_blocks=20, block_size=BLOCK_SIZE, num_first_blocks=4)
    for first in range(0, 80, 8):  # one after the other, each of 2 blocks
        sequence = make_sequence(list(range(first, first + 8)))
        run(blocks, sequence)
        assert max(sequence.block_ids) <= 4
        blocks.release(sequence)
    both = [make_sequence(list(range(first, first + 12))) for first in (100, 200)]
    for sequence in both:  # running at once, they need more
        run(blocks, sequence)
    held = [block_id for one in both for block_id in one.block_ids]
    assert sorted(held) == [1, 2, 3, 4, 5, 6]
    assert blocks.num_free_blocks == 13
    for sequence in both:
        blocks.release(sequence)
    blocks.check_invariants([])


def test_block_0_is_never_handed_out() -> None:
    blocks = make_blocks(4)
    sequence = make_sequence(list(range(12)))
    assert blocks.can_hold(sequence, [])
    blocks.hold(sequence, [], num_tokens=len(sequence.token_ids))
    assert sorted(sequence.block_ids) == [1, 2, 3]
    assert blocks.num_free_blocks == 0
    assert not blocks.can_hold(make_sequence([1]), [])


def test_full_blocks_are_found_again_short_of_the_last_token() -> None:
    blocks = make_blocks()
    first = make_sequence(list(range(10)))
    run(blocks, first)
    assert blocks.cached_prefix(make_sequence(list(range(10)))) == first.block_ids[:2]
    assert blocks.cached_prefix(make_sequence(list(range(9)))) == first.block_ids[:2]
    assert blocks.cached_prefix(make_sequence(list(range(8)))) == first.block_ids[:1]
    assert blocks.cached_prefix(make_sequence([9, *range(1, 10)])) == []
    assert blocks.cached_prefix(make_sequence([0, 1, 2, 3, 9, 9, 9, 9, 9])) == first.block_ids[:1]


def test_cached_blocks_survive_their_holder_and_are_shared() -> None:
    blocks = make_blocks()
    first = make_sequence(list(range(10)))
    run(blocks, first)
    held = list(first.block_ids)
    blocks.release(first)
    second, third = make_sequence(list(range(10))), make_sequence(list(range(10)))
    run(blocks, second)
    run(blocks, third)
    assert second.block_ids[:2] == third.block_ids[:2] == held[:2]
    assert second.block_ids[2] != third.block_ids[2]
    blocks.check_invariants([second, third])


def test_reuse_order_is_hashless_first_then_oldest_release_tail_first() -> None:
    blocks = make_blocks(8)
    old, new = make_sequence(list(range(8))), make_sequence(list(range(50, 59)))
    run(blocks, old)
    run(blocks, new)
    old_ids, new_ids = list(old.block_ids), list(new.block_ids)
    blocks.release(old)
    blocks.release(new)
    untouched = [b for b in range(1, 8) if b not in old_ids + new_ids]
    order = [blocks.free_list.pop_first() for _ in range(7)]
    assert order == [new_ids[2], *untouched, old_ids[1], old_ids[0], new_ids[1], new_ids[0]]


def test_eviction_drops_the_key_only_when_the_block_is_handed_out() -> None:
    blocks = make_blocks(4)
    first = make_sequence(list(range(8)))
    run(blocks, first)
    blocks.release(first)
    assert len(blocks.cached_prefix(make_sequence(list(range(9))))) == 2
    other = make_sequence(list(range(90, 98)))
    run(blocks, other)  # takes the free block and the tail of the cached ones
    assert len(blocks.cached_prefix(make_sequence(list(range(9))))) == 1
    blocks.check_invariants([other])


def test_salts_share_nothing_and_equal_salts_share() -> None:
    blocks = make_blocks()
    run(blocks, make_sequence(list(range(9)), salt="a"))
    assert len(blocks.cached_prefix(make_sequence(list(range(9)), salt="a"))) == 2
    assert blocks.cached_prefix(make_sequence(list(range(9)), salt="b")) == []
    assert blocks.cached_prefix(make_sequence(list(range(9)))) == []


def test_a_key_collision_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "nanovllm.core.block_manager.xxhash.xxh3_128_digest", lambda message, seed: b"same" * 4
    )
    blocks = make_blocks()
    first = make_sequence(list(range(5)))
    run(blocks, first)
    assert blocks.cached_prefix(make_sequence(list(range(5)))) == first.block_ids[:1]
    assert blocks.cached_prefix(make_sequence([7, *range(1, 5)])) == []


def test_equal_blocks_computed_twice_keep_one_key() -> None:
    blocks = make_blocks()
    first, second = make_sequence(list(range(5))), make_sequence(list(range(5)))
    for sequence in (first, second):
        blocks.hold(sequence, [], num_tokens=len(sequence.token_ids))
        sequence.num_computed = 5
    blocks.register(first)
    blocks.register(second)
    blocks.check_invariants([first, second])
    assert blocks.cached_prefix(make_sequence(list(range(5)))) == first.block_ids[:1]


def test_reset_forgets_everything_and_tells_whether_anything_was_in_use() -> None:
    blocks = make_blocks()
    sequence = make_sequence(list(range(9)))
    run(blocks, sequence)
    assert not blocks.reset_prefix_cache()
    assert blocks.cached_prefix(make_sequence(list(range(9)))) == []
    blocks.release(sequence)
    assert blocks.reset_prefix_cache()
    blocks.check_invariants([])


def test_without_caching_nothing_is_registered() -> None:
    blocks = make_blocks(caching=False)
    sequence = make_sequence(list(range(9)))
    blocks.hold(sequence, [], num_tokens=len(sequence.token_ids))
    sequence.num_computed = 9
    assert sequence.next_registration > 9
    assert blocks.cached_prefix(make_sequence(list(range(9)))) == []


def test_what_is_registered_is_not_looked_at_again() -> None:
    blocks = make_blocks()
    sequence = make_sequence(list(range(10)))
    run(blocks, sequence)
    assert sequence.next_registration == 12, "when the third block will be full"
    blocks.release(sequence)
    assert sequence.capacity == 0 and not sequence.block_ids


def test_cached_blocks_that_nobody_holds_are_counted_as_free_ones_that_are_needed() -> None:
    blocks = make_blocks(4)
    first, other = make_sequence(list(range(8))), make_sequence([90])
    run(blocks, first)
    again = make_sequence(list(range(9)))  # two cached blocks, and one for its last token
    assert blocks.can_hold(again, blocks.cached_prefix(again)), "the first one's are held anyhow"
    blocks.release(first)
    assert blocks.can_hold(again, blocks.cached_prefix(again))
    assert not blocks.can_hold(again, blocks.cached_prefix(again), reserve=1)
    run(blocks, other)
    assert not blocks.can_hold(again, blocks.cached_prefix(again))


def test_a_window_lets_go_of_blocks_and_its_prefix_is_what_the_window_sees() -> None:
    """Two groups: one sees 6 tokens, so 2 or 3 blocks of 4; the other sees all."""
    blocks = BlockManager(num_blocks=40, block_size=BLOCK_SIZE, windows=(6, None), step_tokens=4)
    sequence = make_sequence(list(range(20)))
    blocks.hold(sequence, [], num_tokens=8)
    assert sequence.block_ids == [1, 2, 3, 4, 0, 5, 0, 6, 0, 7] and sequence.capacity == 8
    assert blocks.num_tokens_in(sequence.block_ids) == 20
    tables = []
    for num_tokens in (8, 12, 16, 20):
        blocks.grow(sequence, blocks.lacking(sequence, num_tokens), num_tokens)
        sequence.num_computed = num_tokens
        blocks.register(sequence)
        blocks.slide(sequence)
        tables.append(sequence.block_ids[::2])
        assert sequence.capacity == num_tokens
        blocks.check_invariants([sequence])
    assert tables == [[1, 3, 0, 0, 0], [0, 3, 8, 0, 0], [0, 0, 8, 9, 0], [0, 0, 0, 9, 10]]
    assert sequence.block_ids[1::2] == [2, 4, 5, 6, 7]
    found = {n: blocks.cached_prefix(make_sequence(list(range(n)))) for n in (18, 21)}
    assert found == {18: [0, 2, 0, 4, 8, 5, 9, 6], 21: [0, 2, 0, 4, 0, 5, 9, 6, 10, 7]}
    follower = make_sequence([*range(20), 99])
    blocks.hold(follower, found[21], num_tokens=21)
    follower.num_computed = 20
    assert follower.block_ids[:10] == found[21] and follower.capacity == 24
    assert blocks.prefix_of_leader(follower, 20) == found[21]
    assert blocks.prefix_of_leader(follower, 15) == [], "its first blocks are gone"
    blocks.check_invariants([sequence, follower])
    blocks.release(sequence)
    blocks.release(follower)
    assert blocks.num_free_blocks == 39


@pytest.mark.parametrize("salt", [None, "a"])
def test_a_viewer_is_told_what_a_block_holds_and_what_is_before_it(salt: str | None) -> None:
    blocks = make_blocks()
    sequence = make_sequence(list(range(10)), salt=salt)
    run(blocks, sequence)
    told = [blocks.prefix_of(block_id) for block_id in sequence.block_ids]
    first, second = sequence.block_keys[:2]
    assert told == [(first, b"", [0, 1, 2, 3]), (second, first, [4, 5, 6, 7]), None]
