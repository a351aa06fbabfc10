"""Triton attention against dense attention in float64, in Triton's interpreter unless on CUDA."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from nanovllm.worker.attention.base import AttentionSpec
from nanovllm.worker.attention.triton import backend as backend_module
from nanovllm.worker.attention.triton.attention_tuning import Small, Tuning, tuning_for
from nanovllm.worker.attention.triton.backend import TritonAttention
from nanovllm.worker.forward_batch import SharedPrefix
from nanovllm.worker.kernels.torch.layer_kernels import TorchKernels
from nanovllm.worker.kernels.triton.launch import arrival_counters, num_multiprocessors
from nanovllm.worker.kernels.triton.layer_kernels import TritonKernels
from tests.worker.attention.attending import (
    FUSED_TUNING,
    SMALL_TUNING,
    SPEC,
    TMA_TUNING,
    TUNING,
    TUNINGS,
    attend,
    batch_of,
    check,
    dense,
    inputs_for,
    rotary_for,
    with_slots,
)
from tests.worker.kernels.triton_device import DEVICE
from tests.worker.warmup.compiling import run_compiling


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
@pytest.mark.parametrize(
    ("query_lens", "seq_lens"),
    [
        pytest.param([1, 1, 1, 1], [1, 31, 33, 150], id="decode"),
        pytest.param([37, 16], [37, 16], id="prefill"),
        pytest.param([9, 17], [42, 80], id="chunk"),
        pytest.param([1, 20, 1, 2, 1], [70, 20, 5, 34, 129], id="mixed"),
    ],
)
def test_equals_dense_attention(query_lens: list[int], seq_lens: list[int], tuning: Tuning) -> None:
    check(SPEC, query_lens, seq_lens, tuning)


SOME = {"gather": TUNING, "small": SMALL_TUNING}


@pytest.mark.parametrize(
    "tuning", [TUNING, TMA_TUNING, SMALL_TUNING], ids=["gather", "tma", "small"]
)
def test_padding_behind_the_rows_may_hold_anything(tuning: Tuning) -> None:
    """As where a graph's tokens belong to no row: nobody has written what they attend to."""
    torch.manual_seed(0)
    batch = batch_of([20, 9], [50, 9], SPEC.block_size)
    qkv, cache = inputs_for(SPEC, batch)
    expected = dense(SPEC, qkv, cache, batch)
    nowhere = torch.full((5,), -1, device=DEVICE)
    padded = replace(
        batch,
        num_tokens=batch.num_tokens + 5,
        positions=torch.cat((batch.positions, nowhere + 1)),
        slot_mapping=torch.cat((batch.slot_mapping, nowhere)),
    )
    nothing = torch.full((5, qkv.shape[1]), torch.nan, device=DEVICE)
    backend = TritonAttention(SPEC, tuning)
    backend.prepare(padded)
    rotary = rotary_for(SPEC, TritonKernels())
    out = backend.forward(torch.cat((qkv, nothing)), rotary, cache, padded)[: batch.num_tokens]
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_chosen_tuning() -> None:
    for spec in (SPEC, replace(SPEC, block_size=64), replace(SPEC, head_dim=80)):
        tuning = tuning_for(spec)
        check(spec, [1, 30, 1], [140, 61, 10], tuning)
        check(spec, [1, 30, 1], [140, 61, 10], replace(tuning, small=None))


def test_what_is_chosen_for_small_steps_fits_in_registers() -> None:
    found = run_compiling("compile_for_gpu.py", "small")
    assert {name: one["spilled"] for name, one in found.items()} == dict.fromkeys(found, 0)


def test_chosen_tuning_of_the_widest_heads() -> None:
    spec = replace(SPEC, head_dim=512, num_heads=2, num_kv_heads=1)
    check(spec, [1, 9], [40, 21], tuning_for(spec))


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("seq_lens", [[140], [140, 30, 1, 64, 90]], ids=["one row", "several"])
def test_heads_of_256_decode_in_one_kernel(seq_lens: list[int], window: int | None) -> None:
    """Several rows by tiles of 64 keys, as on Hopper."""
    spec = replace(SPEC, head_dim=256, num_heads=4, dtype=torch.float16, sliding_window=window)
    tuning = tuning_for(spec)
    few = replace(tuning.few[0], max_rows=4)
    several = replace(few, tiling=replace(few.tiling, keys=64), max_rows=None)
    check(spec, [1] * len(seq_lens), seq_lens, replace(tuning, few=(few, several)))


def test_more_rows_than_programs() -> None:
    """Nor does one program plan them all."""
    check(replace(SPEC, num_heads=1, num_kv_heads=1), [1] * 35, [20] * 34 + [70])


@pytest.mark.parametrize("tuning", SOME.values(), ids=SOME)
@pytest.mark.parametrize("head_dim", [80, 96, 128])
def test_any_head_dim(head_dim: int, tuning: Tuning) -> None:
    check(replace(SPEC, head_dim=head_dim), [1, 5], [40, 21], tuning)


@pytest.mark.parametrize("tuning", SOME.values(), ids=SOME)
@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (7, 1)])
def test_any_group(heads: tuple[int, int], tuning: Tuning) -> None:
    spec = replace(SPEC, num_heads=heads[0], num_kv_heads=heads[1])
    check(spec, [1, 9], [40, 21], tuning)


@pytest.mark.parametrize("tuning", SOME.values(), ids=SOME)
@pytest.mark.parametrize("block_size", [1, 8, 48])
def test_any_block_size(block_size: int, tuning: Tuning) -> None:
    check(replace(SPEC, block_size=block_size), [1, 9], [70, 50], tuning)


@pytest.mark.parametrize("window", [1, 24, 100])
def test_sliding_window(window: int) -> None:
    for tuning in (TUNING, TMA_TUNING, SMALL_TUNING):
        check(replace(SPEC, sliding_window=window), [1, 30, 1], [90, 61, 10], tuning)


@pytest.mark.parametrize("tuning", [TUNING, TMA_TUNING], ids=["gather", "tma"])
@pytest.mark.parametrize("max_pieces", [2, 8])
@pytest.mark.parametrize(
    ("query_lens", "seq_lens"),
    [
        pytest.param([20], [300], id="alone"),
        pytest.param([9, 1, 2], [150, 40, 33], id="beside a decode"),
        pytest.param([12, 17], [12, 129], id="beside a whole prompt"),
    ],
)
def test_the_context_of_few_queries_is_cut(
    query_lens: list[int], seq_lens: list[int], max_pieces: int, tuning: Tuning
) -> None:
    """Into pieces of one tile at the least."""
    tuning = replace(tuning, piece_programs_per_sm=40, min_piece=16, max_pieces=max_pieces)
    backend = TritonAttention(SPEC, tuning)
    num_tiles = sum(query_lens) // backend._tile_tokens + len(query_lens)
    assert backend._most_pieces(num_tiles) == max_pieces
    check(SPEC, query_lens, seq_lens, tuning)
    windows = replace(SPEC, sliding_window=40, kv_dtype=torch.float8_e4m3fn)
    check(windows, query_lens, seq_lens, tuning)
    assert not arrival_counters(DEVICE).any()


@pytest.mark.parametrize("cut_per_sm", [4, 60])
@pytest.mark.parametrize("window", [None, 40])
def test_tiles_of_a_small_step_are_cut(
    window: int | None, cut_per_sm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan itself: all visible keys of each tile of 8 queries, once, and no more splits than
    there may be; then the step, where splits end amid the step's own tokens, too. 3
    multiprocessors for 2 KV heads, also on a GPU."""
    monkeypatch.setattr(backend_module, "num_multiprocessors", lambda device: 3)
    query_lens, seq_lens = [1, 20, 1, 9, 16, 2], [70, 20, 5, 134, 150, 33]
    small = Small(TUNING.decode, own=16, cut_per_sm=cut_per_sm, least=16, tiles_per_sm=30)
    tuning, spec = replace(TUNING, small=small), replace(SPEC, sliding_window=window)
    torch.manual_seed(0)
    batch = batch_of(query_lens, seq_lens, spec.block_size)
    backend = TritonAttention(spec, tuning)
    backend.prepare(batch)
    assert backend._small_work is not None
    work, num_work = backend._small_work
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for which, record in enumerate(work[: int(num_work)].tolist()):
        row, split, num_splits, begin, end, token, position, num_queries, context = record
        assert context == seq_lens[row] - query_lens[row]
        assert token - sum(query_lens[:row]) == position - context
        assert num_queries == min(8, seq_lens[row] - position)
        tile = found.setdefault((row, position), [])
        assert split == len(tile)
        tile.append((begin, end))
        last = split + 1 >= num_splits
        assert (end == position + num_queries) is last
        assert work[which + 1 - last, :1].item() == row
    assert len(found) == sum(-(-n // 8) for n in query_lens)
    for (_, position), ranges in found.items():
        first = 0 if window is None else max(0, position + 1 - window) // 16 * 16
        assert [begin for begin, _ in ranges] == [first, *(end for _, end in ranges[:-1])]
    most = max(cut_per_sm * 3 // 2, len(found))
    assert len(found) <= int(num_work) <= most <= len(work)
    assert (int(num_work) > len(found)) is (cut_per_sm > 4)
    check(spec, query_lens, seq_lens, tuning)
    assert not arrival_counters(DEVICE).any()


def test_rows_that_read_what_others_of_the_step_write() -> None:
    """The first row begins with two blocks of the second one, which is on its way itself."""
    torch.manual_seed(0)
    batch = batch_of([9, 40], [41, 40], SPEC.block_size)
    batch.block_tables[0, :2] = batch.block_tables[1, :2]
    batch = replace(with_slots(batch, SPEC.block_size), reads_new=True)
    qkv, cache = inputs_for(SPEC, batch)
    expected = dense(SPEC, qkv, cache, batch)
    out = attend(SPEC, qkv, cache, batch, SMALL_TUNING)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "tuning", [TUNING, FUSED_TUNING, SMALL_TUNING], ids=["gather", "fused", "small"]
)
@pytest.mark.parametrize(
    "changes",
    [{"softcap": 2.0}, {"sinks": True}, {"softcap": 2.0, "sinks": True, "sliding_window": 24}],
    ids=["cap", "sinks", "both in a window"],
)
def test_soft_caps_and_sinks(changes: dict[str, Any], tuning: Tuning) -> None:
    """In every kernel: a decode alone and in parts, mixed steps, contexts cut in pieces."""
    spec = replace(SPEC, scale=0.4, num_heads=6, **changes)
    check(spec, [1, 1], [1, 150], tuning)
    if tuning is not FUSED_TUNING:
        check(spec, [1, 9], [70, 40], tuning)
    if tuning is TUNING:
        check(spec, [5], [130], replace(tuning, piece_programs_per_sm=40, min_piece=16))


@pytest.mark.parametrize("tuning", SOME.values(), ids=SOME)
def test_half_precision(tuning: Tuning) -> None:
    check(replace(SPEC, dtype=torch.float16), [1, 18], [40, 30], tuning)


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
@pytest.mark.parametrize("query_lens", [[1, 20, 1, 1], [1, 1, 1, 1]], ids=["mixed", "decode"])
def test_fp8_cache(tuning: Tuning, query_lens: list[int]) -> None:
    check(replace(SPEC, kv_dtype=torch.float8_e4m3fn), query_lens, [70, 44, 5, 129], tuning)


@pytest.mark.parametrize("tuning", SOME.values(), ids=SOME)
def test_fp8_cache_of_odd_heads_and_in_half_precision(tuning: Tuning) -> None:
    spec = replace(SPEC, kv_dtype=torch.float8_e4m3fn)
    check(replace(spec, head_dim=80), [1, 9], [40, 21], tuning)
    check(replace(spec, dtype=torch.float16), [1, 9], [40, 21], tuning)


def test_an_fp8_cache_is_copied_in_whole_16_bytes() -> None:
    spec = replace(SPEC, head_dim=8, num_kv_heads=4, block_size=64)
    assert tuning_for(spec).prefill.tma
    assert not tuning_for(replace(spec, kv_dtype=torch.float8_e4m3fn)).prefill.tma
    wider = replace(spec, head_dim=64, kv_dtype=torch.float8_e4m3fn)
    assert tuning_for(wider).prefill.tma


# As many programs as 3 multiprocessors have, for 2 KV heads: one range, 4, 13 and 30.
@pytest.mark.parametrize("programs_per_sm", [1, 3, 9, 20])
@pytest.mark.parametrize("block_size", [5, 16, 64])
def test_rows_in_ranges(block_size: int, programs_per_sm: int) -> None:
    """Rows in one range and in several, ranges in one row and in several, ends at tiles' ends."""
    seq_lens = [1, 15, 16, 17, 150, 32, 1, 48, 290, 2, 64, 33]
    tuning = TMA_TUNING if block_size == 64 else TUNING
    tuning = replace(tuning, programs_per_sm=programs_per_sm, min_range=16)
    check(replace(SPEC, block_size=block_size), [1] * len(seq_lens), seq_lens, tuning)


@pytest.mark.parametrize("programs_per_sm", [1, 9])
def test_ranges_of_other_batches(programs_per_sm: int) -> None:
    """Beside chunks, in a window, from an FP8 cache."""
    tuning = replace(TUNING, programs_per_sm=programs_per_sm, min_range=16)
    query_lens, seq_lens = [1, 20, 1, 2, 1, 1], [70, 20, 5, 34, 129, 64]
    check(SPEC, query_lens, seq_lens, tuning)
    windows = replace(SPEC, sliding_window=40, kv_dtype=torch.float8_e4m3fn)
    check(windows, query_lens, seq_lens, tuning)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("programs_per_sm", [1, 4, 20])
def test_ranges_hold_every_tile_once(programs_per_sm: int, window: int | None) -> None:
    """The plan itself: equal ranges over the tiles of the rows that decode, in their order."""
    torch.manual_seed(4)
    spec = replace(SPEC, num_kv_heads=1, sliding_window=window)
    lens, tile = torch.randint(1, 400, (70,)).tolist(), TUNING.decode.keys
    query_lens = [1 if row % 7 else min(length, 3) for row, length in enumerate(lens)]
    backend = TritonAttention(spec, replace(TUNING, programs_per_sm=programs_per_sm))
    backend.prepare(batch_of(query_lens, lens, SPEC.block_size))
    scratch = backend._scratch_for(len(lens))
    firsts = [max(0, n - window) // tile * tile if window else 0 for n in lens]
    counts = [-(-(n - f) // tile) for n, f in zip(lens, firsts, strict=True)]
    decoding = [row for row, count in enumerate(query_lens) if count == 1]
    tiles = [(row, firsts[row] + i * tile) for row in decoding for i in range(counts[row])]
    share, num_tiles, num_lines = scratch.totals.tolist()
    longest = -(-max(counts[row] for row in decoding) // (TUNING.max_splits - 1))
    programs = num_multiprocessors(DEVICE) * programs_per_sm
    assert share == max(-(-len(tiles) // programs), TUNING.min_range // tile, longest)
    assert (num_tiles, num_lines) == (len(tiles), len(decoding))
    row_tiles = {row: tiles.index((row, firsts[row])) for row in decoding}
    for line, row in zip(scratch.lines.tolist(), decoding, strict=False):
        in_ranges = {place // share for place in range(len(tiles)) if tiles[place][0] == row}
        token = sum(query_lens[:row])
        assert line[:5] == [row, token, firsts[row], lens[row], len(in_ranges)]
        assert len(in_ranges) <= TUNING.max_splits
    for which, begin in enumerate(range(0, len(tiles), share)):
        index, part, start, _ = scratch.ranges[which].tolist()
        assert (decoding[index], start) == tiles[begin]
        assert part == which - row_tiles[decoding[index]] // share


def test_decoding_depends_on_the_batch_by_rounding_alone() -> None:
    """A row is cut up otherwise alone, in company, and beside a chunk."""
    torch.manual_seed(1)
    batch = batch_of([1, 1, 6, 1], [100, 7, 20, 60], SPEC.block_size)
    qkv, cache = inputs_for(SPEC, batch)
    together = attend(SPEC, qkv, cache, batch)
    alone = replace(
        batch,
        positions=batch.positions[8:],
        slot_mapping=batch.slot_mapping[8:],
        query_start_loc=torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
        seq_lens=batch.seq_lens[3:],
        block_tables=batch.block_tables[3:],
        num_tokens=1,
        num_rows=1,
        num_decode_rows=1,
        max_query_len=1,
    )
    pair = replace(
        alone,
        positions=batch.positions[[0, 8]],
        slot_mapping=batch.slot_mapping[[0, 8]],
        query_start_loc=torch.arange(3, dtype=torch.int32, device=DEVICE),
        seq_lens=batch.seq_lens[[0, 3]],
        block_tables=batch.block_tables[[0, 3]],
        num_tokens=2,
        num_rows=2,
        num_decode_rows=2,
    )
    decoded = attend(SPEC, qkv[8:], cache, alone)
    in_a_pair = attend(SPEC, qkv[[0, 8]], cache, pair)[1:]
    torch.testing.assert_close(in_a_pair, decoded, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together[8:], decoded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("normed", [True, False])
def test_queries_are_rotated_where_they_lie(head_dim: int, normed: bool) -> None:
    """Beside a chunk, too, the kernels of decoding rows find theirs as they do elsewhere."""
    spec = replace(SPEC, head_dim=head_dim)
    batch = batch_of([1, 30, 1, 7], [140, 61, 10, 7], spec.block_size)
    qkv, cache = inputs_for(spec, batch)
    expected = qkv.clone()
    rotary_for(spec, TorchKernels(), normed=normed).apply(expected, batch, cache.clone())
    backend = TritonAttention(spec, TUNING)
    backend.prepare(batch)
    backend.forward(qkv, rotary_for(spec, TritonKernels(), normed=normed), cache, batch)
    torch.testing.assert_close(qkv, expected)


@pytest.mark.parametrize("tuning", [TUNING, TMA_TUNING], ids=["gather", "tma"])
@pytest.mark.parametrize(
    ("num_shared", "prefix_splits", "programs_per_sm"), [(256, 16, 9), (320, 1, 9), (256, 16, 1)]
)
def test_shared_prefix(
    tuning: Tuning, num_shared: int, prefix_splits: int, programs_per_sm: int
) -> None:
    """Rows 0, 2 and 5 share; beside them a chunk, padding, and a row that keeps to itself."""
    check_shared_prefix(SPEC, tuning, num_shared, prefix_splits, programs_per_sm)


def test_shared_prefix_with_soft_caps_and_sinks() -> None:
    check_shared_prefix(replace(SPEC, softcap=2.0, sinks=True), TUNING, 256, 16, 9)


def check_shared_prefix(
    spec: AttentionSpec, tuning: Tuning, num_shared: int, prefix_splits: int, programs_per_sm: int
) -> None:
    torch.manual_seed(3)
    batch = batch_of([1, 1, 1, 7, 1, 1], [330, 300, 345, 340, 1, 321], SPEC.block_size)
    batch.block_tables[:, : num_shared // SPEC.block_size] = batch.block_tables[
        0, : num_shared // SPEC.block_size
    ].clone()
    batch.block_tables[4] = 0  # padding
    num_keys = torch.tensor([num_shared, 0, num_shared, 0, 0, num_shared], dtype=torch.int32)
    leader = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    batch = with_slots(batch, SPEC.block_size)
    batch.prefix = SharedPrefix(num_keys.to(DEVICE), leader)
    qkv, cache = inputs_for(spec, batch)
    before = cache.clone()
    tuning = replace(tuning, prefix_splits=prefix_splits, programs_per_sm=programs_per_sm)
    out = attend(spec, qkv, cache, batch, tuning)
    assert (out.double() - dense(spec, qkv, before, batch)).norm(dim=(1, 2)).max() < 1e-5


def test_padding_rows_do_no_harm() -> None:
    """Padding rows own one token and read block 0."""
    torch.manual_seed(2)
    batch = batch_of([1, 1, 1], [50, 1, 1], SPEC.block_size)
    batch.block_tables[1:] = 0
    batch = with_slots(batch, SPEC.block_size)
    qkv, cache = inputs_for(SPEC, batch)
    qkv[2] = qkv[1]  # both write their key to the same place, in any order
    before = cache.clone()
    out = attend(SPEC, qkv, cache, batch)
    real = replace(batch, seq_lens=batch.seq_lens[:1])
    error = (out[:1] - dense(SPEC, qkv, before, real)[:1]).norm()
    assert error < 1e-5


def test_says_why_it_cannot() -> None:
    assert "head_dim 520" in str(TritonAttention.unsupported(replace(SPEC, head_dim=520)))
    assert "int8" in str(TritonAttention.unsupported(replace(SPEC, dtype=torch.int8)))
    assert "cache in torch.int8" in str(
        TritonAttention.unsupported(replace(SPEC, kv_dtype=torch.int8))
    )
