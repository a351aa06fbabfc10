"""The torch backend against attention written out in fp64, one token at a time."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nanovllm.worker.attention import select
from nanovllm.worker.attention.base import AttentionSpec, Rotary
from nanovllm.worker.attention.torch_ref import MAX_GROUP_PADDING, TorchAttention, group_by_length
from nanovllm.worker.forward_batch import ForwardBatch
from nanovllm.worker.kernels.torch.layer_kernels import TorchKernels
from tests.worker.attention.attending import sinks_for
from tests.worker.attention.decoding import CPU, make_batch

Rows = list[tuple[int, int]]  # each row's new tokens, and how many came before

BATCHES: dict[str, Rows] = {
    "prefill": [(37, 0)],
    "prefill of one token": [(1, 0)],
    "several prefills": [(5, 0), (64, 0), (1, 0), (17, 0)],
    "chunk": [(13, 29)],
    "chunk after a cached prefix": [(9, 32), (16, 16)],
    "decode": [(1, 40)],
    "decode of many": [(1, 3), (1, 40), (1, 15), (1, 16), (1, 17), (1, 99)],
    "mixed": [(1, 33), (7, 21), (1, 5), (30, 0), (1, 64)],
    "far apart": [(1, 1400), (1, 2), (1, 700), (1, 9), (1, 1350)],
}
SPEC = AttentionSpec(
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    scale=0.3,
    block_size=8,
    sliding_window=None,
    dtype=torch.float32,
    device=CPU,
)
SPECS = {
    "grouped": SPEC,
    "multi-query": replace(SPEC, num_kv_heads=1),
    "one head each": replace(SPEC, num_kv_heads=6),
    "window": replace(SPEC, sliding_window=12),
    "window of one": replace(SPEC, sliding_window=1),
    "odd sizes": replace(SPEC, head_dim=10, block_size=5),
    "bfloat16": replace(SPEC, dtype=torch.bfloat16),
    "float16": replace(SPEC, dtype=torch.float16),
    "fp8 cache": replace(SPEC, kv_dtype=torch.float8_e4m3fn),
    "bfloat16 window, fp8 cache": replace(
        SPEC, dtype=torch.bfloat16, sliding_window=12, kv_dtype=torch.float8_e4m3fn
    ),
    "bfloat16 window": replace(SPEC, dtype=torch.bfloat16, sliding_window=12),
    "soft cap": replace(SPEC, softcap=1.5),
    "sinks": replace(SPEC, sinks=True),
    "bfloat16 window, soft cap and sinks": replace(
        SPEC, dtype=torch.bfloat16, sliding_window=12, softcap=1.5, sinks=True
    ),
    "window, sinks, fp8 cache": replace(
        SPEC, sliding_window=12, sinks=True, kv_dtype=torch.float8_e4m3fn
    ),
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def exact_attention(
    spec: AttentionSpec, query: Tensor, layer_cache: Tensor, batch: ForwardBatch
) -> Tensor:
    """softmax(q kᵀ) v of each token, in fp64, from the definition."""
    result = torch.zeros(query.shape, dtype=torch.float64)
    sinks = sinks_for(spec)
    group_size = spec.num_heads // spec.num_kv_heads
    for row in range(batch.num_rows):
        start, end = batch.query_start_loc[row : row + 2].tolist()
        for token in range(start, end):
            position = int(batch.seq_lens[row]) - (end - token)
            first = max(0, position + 1 - (spec.sliding_window or position + 1))
            seen = range(first, position + 1)
            block_ids = [int(batch.block_tables[row, p // spec.block_size]) for p in seen]
            offsets = [p % spec.block_size for p in seen]
            keys, values = layer_cache[:, block_ids, offsets].double()  # [seen, kv_heads, head_dim]
            for head in range(spec.num_heads):
                scores = keys[:, head // group_size] @ query[token, head].double() * spec.scale
                if spec.softcap is not None:
                    scores = (scores / spec.softcap).tanh() * spec.softcap
                weights = scores
                if sinks is not None:
                    weights = torch.cat((scores, sinks[head : head + 1].double()))
                weights = weights.softmax(0)[: len(scores)]
                result[token, head] = weights @ values[:, head // group_size]
    return result


def random_case(spec: AttentionSpec, rows: Rows) -> tuple[ForwardBatch, Tensor, Tensor]:
    """A batch, queries and a cache whose unused blocks are poisoned; block 0 is zeros."""
    torch.manual_seed(0)
    counts = [-(-(new + before) // spec.block_size) for new, before in rows]
    block_ids = iter((torch.randperm(sum(counts)) + 1).tolist())
    tables = [[next(block_ids) for _ in range(count)] for count in counts]
    batch = make_batch(
        [([0] * new, before) for new, before in rows], tables, block_size=spec.block_size
    )
    shape = TorchAttention.kv_shape(spec, num_layers=1, num_blocks=sum(counts) + 2)
    cache = torch.randn(shape)[:, 0]
    cache[:, 0], cache[:, -1] = 0, torch.nan
    cache = cache.to(spec.cache_dtype)
    query = torch.randn(batch.num_tokens, spec.num_heads, spec.head_dim).to(spec.dtype)
    return batch, query, cache


class Unrotated(Rotary):
    """The cache is full and the queries are rotated already."""

    def apply(self, qkv: Tensor, batch: ForwardBatch, layer_cache: Tensor) -> Tensor:
        return qkv


@torch.inference_mode()
def attend(spec: AttentionSpec, query: Tensor, cache: Tensor, batch: ForwardBatch) -> Tensor:
    backend = TorchAttention(spec)
    backend.prepare(batch)
    rotary = Unrotated(TorchKernels(), torch.empty(0), None)
    sinks = sinks_for(spec)
    first = backend.forward(query, rotary, cache, batch, sinks)
    second = backend.forward(query, rotary, cache, batch, sinks)  # of the next layer
    assert torch.equal(first, second)
    return first


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_equals_the_definition(spec: AttentionSpec, rows: Rows) -> None:
    batch, query, cache = random_case(spec, rows)
    output = attend(spec, query, cache, batch)
    assert output.shape == query.shape and output.dtype == query.dtype
    expected = exact_attention(spec, query, cache, batch)
    tolerance = TOLERANCE[spec.dtype]
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


def pad_with_rows(batch: ForwardBatch) -> ForwardBatch:
    """Two rows of one padding token each, in block 0; one claims a length, one does not."""
    end = batch.num_tokens
    return replace(
        batch,
        input_ids=torch.cat((batch.input_ids, torch.zeros(2, dtype=torch.int64))),
        positions=torch.cat((batch.positions, torch.zeros(2, dtype=torch.int64))),
        slot_mapping=torch.cat((batch.slot_mapping, torch.zeros(2, dtype=torch.int64))),
        query_start_loc=torch.cat((batch.query_start_loc, torch.tensor([end + 1, end + 2]).int())),
        seq_lens=torch.cat((batch.seq_lens, torch.tensor([1, 0], dtype=torch.int32))),
        block_tables=torch.nn.functional.pad(batch.block_tables, (0, 0, 0, 2)),
        num_tokens=end + 2,
        num_rows=batch.num_rows + 2,
    )


def pad_with_tokens(batch: ForwardBatch) -> ForwardBatch:
    """Two rows without a token, and two tokens without a row."""
    padded = pad_with_rows(batch)
    starts = padded.query_start_loc.clamp(max=batch.num_tokens)
    return replace(padded, query_start_loc=starts)


@pytest.mark.parametrize("pad", [pad_with_rows, pad_with_tokens])
@pytest.mark.parametrize("name", ["mixed", "decode", "decode of many", "prefill"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_harmless(
    pad: Callable[[ForwardBatch], ForwardBatch], dtype: torch.dtype, name: str
) -> None:
    spec = replace(SPEC, dtype=dtype)
    batch, query, cache = random_case(spec, BATCHES[name])
    alone = attend(spec, query, cache, batch)
    padding = torch.randn(2, spec.num_heads, spec.head_dim).to(dtype)
    output = attend(spec, torch.cat((query, padding)), cache, pad(batch))
    assert output.isfinite().all()
    torch.testing.assert_close(output[:-2], alone)


@pytest.mark.parametrize("rows", [BATCHES["decode of many"], BATCHES["mixed"]])
def test_rows_do_not_depend_on_each_other(rows: Rows) -> None:
    batch, query, cache = random_case(SPEC, rows)
    together = attend(SPEC, query, cache, batch)
    for row in range(batch.num_rows):
        start, end = batch.query_start_loc[row : row + 2].tolist()
        new, before = rows[row]
        table: list[int] = batch.block_tables[row].tolist()
        alone = make_batch([([0] * new, before)], [table], block_size=SPEC.block_size)
        output = attend(SPEC, query[start:end], cache, alone)
        torch.testing.assert_close(output, together[start:end], rtol=1e-6, atol=1e-7)


def test_grouping_bounds_padding_and_keeps_every_row() -> None:
    lengths = torch.randint(1, 4000, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = list(range(0, 200, 2))
    groups = group_by_length(rows, lengths)
    assert sorted(row for group in groups for row in group) == rows
    for group in groups:
        longest = max(lengths[row] for row in group)
        assert sum(longest - lengths[row] for row in group) <= MAX_GROUP_PADDING
    assert group_by_length([3, 1, 2], [9, 9, 9, 9]) == [[1, 2, 3]]
    assert group_by_length([], []) == []


class Picky(TorchAttention):
    @staticmethod
    def unsupported(spec: AttentionSpec) -> str | None:
        return "it likes head_dim 1 only"


def test_selection_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(select.BACKENDS, "triton", f"{__name__}:Picky")
    monkeypatch.setitem(select.PREFERENCES, "cpu", ("triton", "torch"))
    backend, why = select.select_backend("auto", SPEC)
    assert type(backend) is TorchAttention
    assert why == "attention by torch (first that fits; not triton: it likes head_dim 1 only)"
    _, why = select.select_backend("torch", SPEC)
    assert why == "attention by torch (as attention_backend asks)"
    with pytest.raises(ValueError, match=r"attention_backend 'triton' .*not triton: it likes head"):
        select.select_backend("triton", SPEC)
    with pytest.raises(ValueError, match=r"unknown attention_backend 'torhc': .* 'torch'"):
        select.select_backend("torhc", SPEC)  # type: ignore[arg-type]
