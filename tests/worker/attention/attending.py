"""Attention backends beside dense attention in float64, on batches made by hand."""

from dataclasses import replace

import torch
from torch import Tensor

from nanovllm.worker.attention.base import AttentionSpec, Rotary
from nanovllm.worker.attention.triton.attention_tuning import Fitting, Small, Tiling, Tuning
from nanovllm.worker.attention.triton.backend import TritonAttention
from nanovllm.worker.forward_batch import ForwardBatch
from nanovllm.worker.kernels.base import Kernels
from nanovllm.worker.kernels.torch.layer_kernels import TorchKernels
from nanovllm.worker.kernels.triton.layer_kernels import TritonKernels
from nanovllm.worker.models.blocks import HeadNorms
from tests.worker.kernels.triton_device import DEVICE

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
    min_range=32,
    max_splits=4,
)
FUSED_TUNING = replace(TUNING, few=(Fitting(TUNING.decode, 14),))
TMA_TUNING = replace(
    TUNING,
    decode=replace(TUNING.decode, tma=True),
    prefill=replace(TUNING.prefill, tma=True),
    copies_own=True,
)
FUSED_TMA_TUNING = replace(FUSED_TUNING, few=(Fitting(TMA_TUNING.decode, 14),))
SMALL_TUNING = replace(
    TUNING, small=Small(TUNING.decode, own=16, cut_per_sm=20, least=32, tiles_per_sm=30)
)
TUNINGS = {
    "gather": TUNING,
    "tma": TMA_TUNING,
    "fused": FUSED_TUNING,
    "fused tma": FUSED_TMA_TUNING,
    "small": SMALL_TUNING,
}


def batch_of(query_lens: list[int], seq_lens: list[int], block_size: int) -> ForwardBatch:
    """Rows on randomly scattered blocks; only what attention reads is filled in."""
    num_rows, num_tokens = len(seq_lens), sum(query_lens)
    width = -(-max(seq_lens) // block_size)
    blocks = torch.randperm(num_rows * width).int() + 1
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    positions = [torch.arange(s - q, s) for q, s in zip(query_lens, seq_lens, strict=True)]
    batch = ForwardBatch(
        input_ids=torch.empty(0, dtype=torch.int64, device=DEVICE),
        positions=torch.cat(positions).to(DEVICE),
        slot_mapping=torch.empty(0, dtype=torch.int64, device=DEVICE),
        query_start_loc=starts.to(DEVICE),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE),
        block_tables=blocks.view(num_rows, width).to(DEVICE),
        num_tokens=num_tokens,
        num_rows=num_rows,
        num_decode_rows=query_lens.count(1),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )
    return with_slots(batch, block_size)


def with_slots(batch: ForwardBatch, block_size: int) -> ForwardBatch:
    """The batch with the slots that its block tables mean."""
    counts = batch.query_start_loc.diff().long()
    rows = torch.arange(batch.num_rows, device=DEVICE).repeat_interleave(counts)
    blocks = batch.block_tables[rows, batch.positions // block_size].long()
    return replace(batch, slot_mapping=blocks * block_size + batch.positions % block_size)


def inputs_for(spec: AttentionSpec, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
    """qkv, and a layer's cache that does not hold this step's keys and values yet."""
    num_blocks = int(batch.block_tables.max()) + 1
    shape = TritonAttention.kv_shape(spec, num_layers=2, num_blocks=num_blocks)
    cache = torch.randn(shape, dtype=spec.dtype, device=spec.device).to(spec.cache_dtype)[:, 1]
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    return torch.randn(batch.num_tokens, width, dtype=spec.dtype, device=spec.device), cache


def rotary_for(spec: AttentionSpec, kernels: Kernels, *, normed: bool = True) -> Rotary:
    """Angles and norms as good as any, always the same."""
    generator = torch.Generator().manual_seed(5)
    weights = torch.rand(2, spec.head_dim, generator=generator).to(DEVICE, spec.dtype) + 0.5
    norm = HeadNorms(weights[0], weights[1], 1e-6) if normed else None
    angles = torch.rand(4096, spec.head_dim // 2, generator=generator).to(DEVICE) * 6
    return Rotary(kernels, torch.cat((angles.cos(), angles.sin()), dim=1), norm)


def sinks_for(spec: AttentionSpec) -> Tensor | None:
    """Some that matter beside some keys and all, always the same."""
    if not spec.sinks:
        return None
    generator = torch.Generator().manual_seed(6)
    return torch.randn(spec.num_heads, generator=generator).to(spec.device) * 3


def dense(spec: AttentionSpec, qkv: Tensor, cache: Tensor, batch: ForwardBatch) -> Tensor:
    """The definition of attention, row by row in float64, after plain torch's rotation."""
    cache = cache.clone()
    query = rotary_for(spec, TorchKernels()).apply(qkv.clone(), batch, cache)
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
        if spec.softcap is not None:
            scores = (scores / spec.softcap).tanh() * spec.softcap
        weights = scores.masked_fill(~visible, float("-inf"))
        if (sinks := sinks_for(spec)) is not None:
            nothing = sinks.double()[:, None, None].expand(-1, len(q), 1)
            weights = torch.cat((weights, nothing), dim=-1)
        weights = weights.softmax(-1)[..., :num_keys]
        out[starts[row] : starts[row + 1]] = torch.einsum("hqk,khd->qhd", weights, values)
    return out


def attend(
    spec: AttentionSpec, qkv: Tensor, cache: Tensor, batch: ForwardBatch, tuning: Tuning = TUNING
) -> Tensor:
    backend = TritonAttention(spec, tuning)
    backend.prepare(batch)
    rotary = rotary_for(spec, TritonKernels())
    sinks = sinks_for(spec)
    first = backend.forward(qkv.clone(), rotary, cache, batch, sinks)
    # Scratch is left as found, and what the cache gained changes nothing.
    assert torch.equal(first, backend.forward(qkv.clone(), rotary, cache, batch, sinks))
    return first


def check(
    spec: AttentionSpec, query_lens: list[int], seq_lens: list[int], tuning: Tuning = TUNING
) -> None:
    torch.manual_seed(0)
    batch = batch_of(query_lens, seq_lens, spec.block_size)
    qkv, cache = inputs_for(spec, batch)
    before = cache.clone()
    out = attend(spec, qkv, cache, batch, tuning)
    expected = dense(spec, qkv, before, batch)
    error = (out.double() - expected).norm() / expected.norm()
    assert error < (1e-5 if spec.dtype == torch.float32 else 4e-3)
    rotary_for(spec, TorchKernels()).apply(qkv, batch, before)
    torch.testing.assert_close(
        cache.float(), before.float()
    )  # keys and values are where later steps read them
