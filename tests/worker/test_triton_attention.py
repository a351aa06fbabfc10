"""Triton attention against dense attention in float64, in Triton's interpreter unless on CUDA."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nanovllm.worker.attention.base import AttentionSpec
from nanovllm.worker.attention.triton_attention import Tiling, TritonAttention, Tuning, tuning_for
from nanovllm.worker.forward_batch import ForwardBatch
from tests.worker.triton_device import DEVICE

SPEC = AttentionSpec(
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    scale=0.1,
    block_size=16,
    sliding_window=None,
    dtype=torch.float32,
    device=DEVICE,
)
# Small tiles, so that short rows have several splits and tiles.
TUNING = Tuning(
    decode=Tiling(keys=16, stages=2, warps=1, tma=False),
    prefill=Tiling(keys=16, stages=2, warps=4, tma=False),
    queries=16,
    min_split=32,
    max_splits=4,
)
TMA_TUNING = replace(
    TUNING, decode=replace(TUNING.decode, tma=True), prefill=replace(TUNING.prefill, tma=True)
)


def batch_of(query_lens: list[int], seq_lens: list[int], block_size: int) -> ForwardBatch:
    """Rows on randomly scattered blocks; only what attention reads is filled in."""
    num_rows, num_tokens = len(seq_lens), sum(query_lens)
    width = -(-max(seq_lens) // block_size)
    blocks = torch.randperm(num_rows * width).int() + 1
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    return ForwardBatch(
        input_ids=nothing,
        positions=nothing,
        slot_mapping=nothing,
        query_start_loc=starts.to(DEVICE),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE),
        block_tables=blocks.view(num_rows, width).to(DEVICE),
        num_tokens=num_tokens,
        num_rows=num_rows,
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )


def inputs_for(spec: AttentionSpec, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
    """Queries inside a wider tensor, as they lie in qkv, and a layer's cache."""
    num_blocks = int(batch.block_tables.max()) + 1
    shape = TritonAttention.kv_shape(spec, num_layers=2, num_blocks=num_blocks)
    cache = torch.randn(shape, dtype=spec.dtype, device=spec.device).to(spec.cache_dtype)[:, 1]
    wide = torch.randn(
        batch.num_tokens, spec.num_heads + 3, spec.head_dim, dtype=spec.dtype, device=spec.device
    )
    return wide[:, : spec.num_heads], cache


def dense(spec: AttentionSpec, query: Tensor, cache: Tensor, batch: ForwardBatch) -> Tensor:
    """The definition of attention, row by row in float64."""
    out = torch.zeros(query.shape, dtype=torch.float64, device=spec.device)
    starts = batch.query_start_loc.tolist()
    for row, num_keys in enumerate(batch.seq_lens.tolist()):
        table = batch.block_tables[row].long()
        keys, values = (half[table].flatten(0, 1)[:num_keys].double() for half in cache)
        keys, values = (
            t.repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=1) for t in (keys, values)
        )
        q = query[starts[row] : starts[row + 1]].double()
        positions = torch.arange(num_keys - len(q), num_keys, device=spec.device)[:, None]
        places = torch.arange(num_keys, device=spec.device)
        visible = places <= positions
        if spec.sliding_window is not None:
            visible &= places > positions - spec.sliding_window
        scores = torch.einsum("qhd,khd->hqk", q, keys) * spec.scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        out[starts[row] : starts[row + 1]] = torch.einsum("hqk,khd->qhd", weights, values)
    return out


def attend(
    spec: AttentionSpec, query: Tensor, cache: Tensor, batch: ForwardBatch, tuning: Tuning = TUNING
) -> Tensor:
    backend = TritonAttention(spec, tuning)
    backend.prepare(batch)
    first = backend.forward(query, cache, batch)
    assert torch.equal(first, backend.forward(query, cache, batch))  # scratch is left as found
    return first


def check(
    spec: AttentionSpec, query_lens: list[int], seq_lens: list[int], tuning: Tuning = TUNING
) -> None:
    torch.manual_seed(0)
    batch = batch_of(query_lens, seq_lens, spec.block_size)
    query, cache = inputs_for(spec, batch)
    out = attend(spec, query, cache, batch, tuning)
    expected = dense(spec, query, cache, batch)
    error = (out.double() - expected).norm() / expected.norm()
    assert error < (1e-5 if spec.dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("tuning", [TUNING, TMA_TUNING], ids=["gather", "tma"])
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


def test_chosen_tuning() -> None:
    for spec in (SPEC, replace(SPEC, block_size=64), replace(SPEC, head_dim=80)):
        check(spec, [1, 30, 1], [140, 61, 10], tuning_for(spec))


def test_more_rows_than_one_program_plans() -> None:
    check(replace(SPEC, num_heads=1, num_kv_heads=1), [1] * 35, [20] * 34 + [70])


@pytest.mark.parametrize("head_dim", [80, 96, 128])
def test_any_head_dim(head_dim: int) -> None:
    check(replace(SPEC, head_dim=head_dim), [1, 5], [40, 21])


@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (7, 1)])
def test_any_group(heads: tuple[int, int]) -> None:
    check(replace(SPEC, num_heads=heads[0], num_kv_heads=heads[1]), [1, 9], [40, 21])


@pytest.mark.parametrize("block_size", [1, 8, 48])
def test_any_block_size(block_size: int) -> None:
    check(replace(SPEC, block_size=block_size), [1, 9], [70, 50])


@pytest.mark.parametrize("window", [1, 24, 100])
def test_sliding_window(window: int) -> None:
    for tuning in (TUNING, TMA_TUNING):
        check(replace(SPEC, sliding_window=window), [1, 30, 1], [90, 61, 10], tuning)


def test_half_precision() -> None:
    check(replace(SPEC, dtype=torch.float16), [1, 18], [40, 30])


@pytest.mark.parametrize("tuning", [TUNING, TMA_TUNING], ids=["gather", "tma"])
def test_fp8_cache(tuning: Tuning) -> None:
    spec = replace(SPEC, kv_dtype=torch.float8_e4m3fn)
    check(spec, [1, 20, 1, 1], [70, 44, 5, 129], tuning)


def test_fp8_cache_of_odd_heads_and_in_half_precision() -> None:
    spec = replace(SPEC, kv_dtype=torch.float8_e4m3fn)
    check(replace(spec, head_dim=80), [1, 9], [40, 21])
    check(replace(spec, dtype=torch.float16), [1, 9], [40, 21])


def test_an_fp8_cache_is_copied_in_whole_16_bytes() -> None:
    spec = replace(SPEC, head_dim=8, num_kv_heads=4)
    assert tuning_for(spec).decode.tma
    assert not tuning_for(replace(spec, kv_dtype=torch.float8_e4m3fn)).decode.tma
    assert tuning_for(replace(SPEC, kv_dtype=torch.float8_e4m3fn)).decode.tma


def test_decoding_does_not_depend_on_the_batch() -> None:
    """A row's bits are the same alone, in company, and beside a chunk."""
    torch.manual_seed(1)
    batch = batch_of([1, 1, 6, 1], [100, 7, 20, 60], SPEC.block_size)
    query, cache = inputs_for(SPEC, batch)
    together = attend(SPEC, query, cache, batch)
    alone = replace(
        batch,
        query_start_loc=torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
        seq_lens=batch.seq_lens[3:],
        block_tables=batch.block_tables[3:],
        num_tokens=1,
        num_rows=1,
        max_query_len=1,
    )
    assert torch.equal(together[8:], attend(SPEC, query[8:], cache, alone))


def attend_sharing(tuning: Tuning, *, num_shared_blocks: int) -> Tensor:
    """Error per row of a batch whose rows start with the same blocks, but for padding and chunk."""
    torch.manual_seed(3)
    batch = batch_of([1, 1, 1, 7, 1, 1], [330, 300, 345, 340, 1, 321], SPEC.block_size)
    batch.block_tables[:, :num_shared_blocks] = batch.block_tables[0, :num_shared_blocks].clone()
    batch.block_tables[4] = 0  # padding
    query, cache = inputs_for(SPEC, batch)
    backend = TritonAttention(SPEC, tuning)
    backend.shares_prefix = True
    backend.prepare(batch)
    out = backend.forward(query, cache, batch)
    scratch = backend._scratch_for(batch.num_rows)
    expected_keys = num_shared_blocks * SPEC.block_size // 64 * 64
    assert int(scratch.shared[0]) == (expected_keys if expected_keys >= 256 else 0)
    return (out.double() - dense(SPEC, query, cache, batch)).norm(dim=(1, 2))


@pytest.mark.parametrize("num_shared_blocks", [18, 17, 3])
def test_shared_prefix(num_shared_blocks: int) -> None:
    for tuning in (TUNING, TMA_TUNING):
        assert attend_sharing(tuning, num_shared_blocks=num_shared_blocks).max() < 1e-5


def test_padding_rows_do_no_harm() -> None:
    """Padding rows own one token and read block 0."""
    torch.manual_seed(2)
    batch = batch_of([1, 1, 1], [50, 1, 1], SPEC.block_size)
    batch.block_tables[1:] = 0
    query, cache = inputs_for(SPEC, batch)
    out = attend(SPEC, query, cache, batch)
    real = replace(batch, seq_lens=batch.seq_lens[:1])
    error = (out[:1] - dense(SPEC, query, cache, real)[:1]).norm()
    assert error < 1e-5


def test_says_why_it_cannot() -> None:
    assert "head_dim 512" in str(TritonAttention.unsupported(replace(SPEC, head_dim=512)))
    assert "int8" in str(TritonAttention.unsupported(replace(SPEC, dtype=torch.int8)))
    assert "cache in torch.int8" in str(
        TritonAttention.unsupported(replace(SPEC, kv_dtype=torch.int8))
    )
