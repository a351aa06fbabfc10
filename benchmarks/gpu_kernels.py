"""Checks and times every Triton kernel on the GPU at hand, several variants each.

    python benchmarks/gpu_kernels.py [--only decode,prefix,small,prefill,gated,layer,gemma,fp8,…]

Every case is first compared with a reference in float64 (relative error), then timed as a CUDA
graph over enough different buffers to defeat the L2 cache (median of replays). The floor is bytes
over 4.3 TB/s or operations over 790 TFLOP/s (FP8: twice that), as measured on an H200.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise, product
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.worker.attention.base import AttentionSpec, Rotary
from nanovllm.worker.attention.flash_attention import FlashAttention
from nanovllm.worker.attention.select import attention_specs, select_attention
from nanovllm.worker.attention.triton.attention_tuning import (
    Fitting,
    Long,
    Tiling,
    Tuning,
    tuning_for,
)
from nanovllm.worker.attention.triton.backend import TritonAttention
from nanovllm.worker.forward_batch import ForwardBatch, SharedPrefix, slots_of
from nanovllm.worker.kernels.base import Residual
from nanovllm.worker.kernels.torch.layer_kernels import gated as gated_by_torch
from nanovllm.worker.kernels.triton import fused_sampler, products
from nanovllm.worker.kernels.triton import skinny_linear as linear_kernels
from nanovllm.worker.kernels.triton.gated_linear import CHOSEN, GatedTile, gated_linear
from nanovllm.worker.kernels.triton.layer_kernels import TritonKernels
from nanovllm.worker.kernels.triton.linear_tuning import Tile, fp8_tile_for
from nanovllm.worker.kernels.triton.rows import act_and_mul, act_and_mul_fp8, quantize
from nanovllm.worker.kernels.triton.skinny_linear import skinny_add, skinny_linear
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.models.blocks import HeadNorms
from nanovllm.worker.models.decoder import Decoder
from nanovllm.worker.quant.fp8 import E4M3, NATIVE_FP8, quantize_rows

BANDWIDTH, RATE = 4.3e12, 790e12
CUDA = torch.device("cuda")
BF16 = torch.bfloat16
KERNELS = TritonKernels()
NUM_COMPILERS = 14


@dataclass(frozen=True)
class Case:
    """`build` returns what to time, how often it does the work, and a measure of its error."""

    group: str
    shape: str
    variant: str
    num_bytes: float  # of one time
    num_operations: float
    build: Callable[[], tuple[Callable[[], object], int, Callable[[], float] | None]]
    rate: float = RATE


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=CUDA, dtype=BF16).mul_(scale)


# ---------------------------------------------------------------- attention


def attention_spec(
    heads: tuple[int, int],
    block_size: int,
    kv_dtype: torch.dtype | None = None,
    head_dim: int = 128,
) -> AttentionSpec:
    return AttentionSpec(
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        scale=head_dim**-0.5,
        block_size=block_size,
        sliding_window=None,
        dtype=BF16,
        device=CUDA,
        kv_dtype=kv_dtype,
    )


@lru_cache(maxsize=1)
def attention_inputs(
    query_lens: tuple[int, ...],
    seq_lens: tuple[int, ...],
    heads: tuple[int, int],
    block_size: int,
    kv_dtype: torch.dtype | None = None,
    head_dim: int = 128,
) -> tuple[AttentionSpec, ForwardBatch, Tensor, Tensor]:
    """Rows on scattered blocks; as many layers as make the keys and values 200 MB. Norms of heads
    have been there: to repeat them changes nothing."""
    spec = attention_spec(heads, block_size, kv_dtype, head_dim)
    num_rows, width = len(seq_lens), -(-max(seq_lens) // block_size)
    blocks = torch.randperm(num_rows * width, device=CUDA, dtype=torch.int32) + 1
    starts = torch.tensor([0, *query_lens], device=CUDA).cumsum(0).int()
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=CUDA)
    rows = torch.arange(num_rows, device=CUDA).repeat_interleave(starts.diff())
    positions = torch.arange(sum(query_lens), device=CUDA) + (lens - starts[1:])[rows]
    slots = slots_of(blocks.view(num_rows, width), rows, positions, block_size)
    batch = ForwardBatch(
        input_ids=torch.empty(0, dtype=torch.int64, device=CUDA),
        positions=positions,
        slot_mapping=slots,
        query_start_loc=starts,
        seq_lens=lens,
        block_tables=blocks.view(num_rows, width),
        num_tokens=sum(query_lens),
        num_rows=num_rows,
        num_decode_rows=query_lens.count(1),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )
    block_bytes = block_size * heads[1] * 2 * head_dim * spec.cache_dtype.itemsize
    layer_bytes = (num_rows * width + 1) * block_bytes
    layers = min(max(2, math.ceil(2e8 / layer_bytes)), 28)
    shape = TritonAttention.kv_shape(spec, num_layers=layers, num_blocks=num_rows * width + 1)
    cache = torch.empty(shape, device=CUDA, dtype=BF16).normal_()
    cache = F.rms_norm(cache, (head_dim,)).to(spec.cache_dtype)
    qkv = F.rms_norm(randn(batch.num_tokens, heads[0] + 2 * heads[1], head_dim), (head_dim,))
    qkv = qkv.flatten(1)
    # New keys and values lie in qkv as they do in the last layer's cache.
    new = cache[:, -1].to(BF16).flatten(1, 2)[:, slots]  # torch may not index FP8
    qkv[:, heads[0] * head_dim :] = new.transpose(0, 1).flatten(1)
    return spec, batch, qkv, cache


def attention_error(
    out: Tensor, inputs: tuple[AttentionSpec, ForwardBatch, Tensor, Tensor]
) -> float:
    """Of the last layer's result, the worst of some rows, at most 64 queries each."""
    spec, batch, qkv, cache = inputs
    query = qkv.view(batch.num_tokens, -1, spec.head_dim)[:, : spec.num_heads]
    starts, lens = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    errors = []
    apart = batch.num_rows // 2 if batch.max_query_len > 1 else max(1, batch.num_rows // 32)
    for row in {*range(0, batch.num_rows, max(1, apart)), batch.num_rows - 1}:
        table = batch.block_tables[row].long()
        keys, values = (
            half[table].flatten(0, 1)[: lens[row]].double().repeat_interleave(
                spec.num_heads // spec.num_kv_heads, dim=1
            )
            for half in cache[:, -1].to(BF16)  # torch may not index FP8
        )  # fmt: skip
        begin, end = max(starts[row], starts[row + 1] - 64), starts[row + 1]
        positions = torch.arange(lens[row] - (end - begin), lens[row], device=CUDA)[:, None]
        scores = torch.einsum("qhd,khd->hqk", query[begin:end].double(), keys) * spec.scale
        hidden = torch.arange(lens[row], device=CUDA) > positions
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights, values)
        errors.append(relative_error(out[begin:end], expected))
    return max(errors)


class Rotated(Rotary):
    """Keys are rotated already, and the cache is full."""

    def apply(self, qkv: Tensor, batch: ForwardBatch, layer_cache: Tensor) -> Tensor:
        heads = qkv.view(batch.num_tokens, -1, layer_cache.shape[4])
        return heads[:, : -2 * layer_cache.shape[3]]


def build_attention(
    tuning: Tuning, *args, num_shared: int = 0, shares: bool = False, rotates: bool = False,
    backend_class=TritonAttention,
):  # fmt: skip
    """Decoding is timed with rotation and cache writes; all else, if it `rotates`, with norms, too.

    Norms of weight one: to repeat them changes nothing.
    """
    inputs = attention_inputs(*args)
    spec, batch, qkv, cache = inputs
    if num_shared:
        blocks = num_shared // spec.block_size
        batch.block_tables[:, :blocks] = batch.block_tables[0, :blocks].clone()
        if shares:
            num_keys = torch.full((batch.num_rows,), num_shared, dtype=torch.int32, device=CUDA)
            prefix = SharedPrefix(num_keys, torch.zeros(1, dtype=torch.int32, device=CUDA))
            batch = replace(batch, prefix=prefix)
    backend = backend_class(spec, tuning)
    cos_sin = torch.ones(65536, spec.head_dim, device=CUDA)
    cos_sin[:, spec.head_dim // 2 :] = 0
    decodes = batch.max_query_len == 1 and batch.prefix is None
    ones = torch.ones(spec.head_dim, device=CUDA, dtype=BF16)
    norm = HeadNorms(ones, ones, 1e-6) if rotates else None
    rotary = (Rotary if decodes or rotates else Rotated)(KERNELS, cos_sin, norm)  # angles of zero

    layers = list(cache.unbind(1)) * max(1, 8 // cache.shape[1])
    between = torch.empty(1, device=CUDA)

    def run() -> Tensor:
        backend.prepare(batch)
        between.zero_()
        for layer in layers:
            out = backend.forward(qkv, rotary, layer, batch)
        return out

    return run, len(layers), lambda: attention_error(run(), inputs)


def build_sdpa(backend: SDPBackend, rows: int, length: int, heads: tuple[int, int]):
    q, k, v = (randn(rows, h, length, 128) for h in (heads[0], heads[1], heads[1]))

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run, 1, None


def stream_tunings(chosen: Tuning) -> Iterator[tuple[str, Tuning]]:
    """Ways to decode many rows: (keys, stages, warps), and as many programs as fit or fewer."""
    for (keys, stages, warps), counts in STREAMS.items():
        for programs in counts:
            tiling = Tiling(keys, stages, warps, tma=False)
            tuning = replace(chosen, decode=tiling, programs_per_sm=programs, few=())
            yield f"n{keys} s{stages} w{warps} p{programs}", tuning
    tiling = Tiling(16, 4, 1, tma=True)
    yield "n16 s4 w1 p7 TMA", replace(chosen, decode=tiling, programs_per_sm=7, few=())


STREAMS = {
    (16, 2, 1): (12,),
    (16, 3, 1): (8, 10, 12),
    (16, 4, 1): (6, 8),
    (32, 2, 1): (8,),
    (32, 2, 2): (6, 7),
    (32, 3, 2): (4, 5, 6),
    (32, 4, 2): (3, 4),
    (32, 3, 4): (4,),
    (64, 2, 2): (4, 5),
    (64, 2, 4): (3,),
    (64, 3, 4): (2, 3),
}
MIXED = tuple(100 + (row * 617) % 1401 for row in range(256))  # lengths 100 … 1500


def decode_cases() -> Iterator[Case]:
    spec = attention_spec((16, 8), 16)
    chosen = tuning_for(spec)
    args = ((1,) * 256, (2112,) * 256, (16, 8), 16)
    for label, shares in (("each row alone", False), ("read once", True)):
        build = partial(build_attention, chosen, *args, num_shared=2048, shares=shares)
        yield Case("prefix", "256×2112, 2048 shared", label, (256 * 64 + 2048) * 4096, 0, build)
    for num_shared in (1024,):
        args = ((1,) * 64, (1088,) * 64, (16, 8), 16)
        build = partial(build_attention, chosen, *args, num_shared=num_shared, shares=True)
        num_bytes = (64 * (1088 - num_shared) + num_shared) * 4096
        yield Case("prefix", f"64×1088, {num_shared} shared", "read once", num_bytes, 0, build)
    few = [(1, 512, 16), (8, 1024, 16), (8, 4096, 16), (16, 384, 16), (16, 1024, 16)]
    few += [(64, 384, 16), (1, 512, 32), (64, 1024, 32), (2, 32768, 16)]
    few += [(8, 16064, 16), (32, 1050, 16), (32, 1050, 32)]
    many = [(64, 704, 16), (80, 640, 16), (128, 704, 16), (256, 704, 16), (256, 1024, 16)]
    shapes = [(f"{rows}×{length}", (length,) * rows, heads) for rows, length, heads in few + many]
    shapes.append((f"256×{min(MIXED)}…{max(MIXED)}", MIXED, 16))
    for name, lengths, heads in shapes:
        num_bytes, args = sum(lengths) * 8 * 512, ((1,) * len(lengths), lengths, (heads, 8), 16)
        group = "long" if (name, heads) in LONG_ROWS else "decode"
        variants = [("chosen", chosen)]
        if len(lengths) <= 80:
            for programs in (4, 5, 6):
                fused = replace(chosen, few=(Fitting(Tiling(32, 2, 2, tma=False), programs),))
                variants.append((f"fused, if all fit, p{programs}", fused))
        if group == "long" or (len(lengths), lengths[0], heads) not in few:
            variants += stream_tunings(chosen)
        for variant, tuning in variants:
            build = partial(build_attention, tuning, *args)
            yield Case(group, f"{name} h{heads}/8", variant, num_bytes, 0, build)


LONG_ROWS = {("8×16064", 16), ("32×1050", 16), ("32×1050", 32)}


def prefill_cases() -> Iterator[Case]:
    decode = Tiling(keys=64, stages=3, warps=4, tma=False)
    variants = [
        (16, Tiling(64, 3, 8, False, 128), False), (16, Tiling(64, 3, 8, False, 128), True),
        (16, Tiling(64, 2, 8, False, 128), True), (16, Tiling(64, 2, 4, False), True),
        (16, Tiling(32, 3, 4, False), True), (64, Tiling(64, 2, 8, True, 128), True),
        (64, Tiling(64, 2, 4, True), True),
    ]  # fmt: skip
    shapes = [((4088,) * 2, (4088,) * 2), ((512,) * 16, (512,) * 16), ((2048,), (10240,))]
    shapes += [
        ((8192,), (8192,)),
        ((8192,), (16384,)),
        ((2048,), (16000,)),
        ((8176,) * 2, (8176,) * 2),
    ]
    shapes += [((64,) * 64, (2112,) * 64), ((1,) * 64 + (7680,), (1024,) * 64 + (7680,))]
    for queries, keys in shapes:
        pairs = sum(q * k - q * (q - 1) / 2 for q, k in zip(queries, keys, strict=True))
        shape = f"{len(queries)}×{queries[-1]}/{keys[-1]} h16/8"
        shape += " mixed" * (1 in queries)
        group = "long" if keys[0] >= 8000 else "prefill"
        some = variants if group == "prefill" else variants[2:4] + variants[5:]
        for block_size, tiling, own in some:
            tuning = Tuning(decode, tiling, 128, own)
            build = partial(build_attention, tuning, queries, keys, (16, 8), block_size)
            name = f"b{block_size} n{tiling.keys} s{tiling.stages} w{tiling.warps}"
            name += f"{' tma' * tiling.tma}{' own' * own} {tiling.max_registers or ''}"
            yield Case(group, shape, name, 0, pairs * 8192, build)
        chosen = tuning_for(attention_spec((16, 8), 16))
        args = queries, keys, (16, 8), 16
        for long in (None, Long(min_tokens=0), Long(64, 4, min_tokens=0)):
            build = partial(build_attention, replace(chosen, long=long), *args, rotates=True)
            name = "Triton" if long is None else f"Gluon n{long.keys} s{long.stages}"
            yield Case(group, shape, f"b16 {name}, with RoPE", 0, pairs * 8192, build)
        args = chosen, *args
        build = partial(build_attention, *args, rotates=True, backend_class=FlashAttention)
        yield Case(group, shape, "b16 flash-attn, with RoPE", 0, pairs * 8192, build)
        if queries == keys:
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                build = partial(build_sdpa, backend, len(queries), queries[0], (16, 8))
                yield Case(group, shape, f"torch {backend.name}", 0, pairs * 8192, build)


def small_cases() -> Iterator[Case]:
    """Steps of few tokens, some of them a prompt's, beside what larger steps do."""
    steps = ((8, 300, 45), (8, 300, 120), (32, 300, 45))
    for (heads, head_dim), (rows, length, prompt) in product((((16, 8), 128), ((9, 3), 64)), steps):
        chosen = tuning_for(attention_spec(heads, 16, head_dim=head_dim))
        lens = (*(1,) * rows, prompt), (*(length,) * rows, prompt)
        shape = f"{rows}×{length} + {prompt} h{heads[0]}/{heads[1]}"
        num_bytes = sum(lens[1]) * 4 * heads[1] * head_dim
        for name, tuning in (("apart", replace(chosen, small=None)), ("together", chosen)):
            args = (*lens, heads, 16, None, head_dim)
            build = partial(build_attention, tuning, *args, rotates=True)
            yield Case("small", shape, name, num_bytes, 0, build)


# ---------------------------------------------------------------- linear layers

QWEN3_06B = {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)}
QWEN3_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
LM_HEAD = {"lm_head": (151936, 1024)}
# What each of two ranks has of QWEN3_8B.
HALF_8B = {"qkv": (3072, 4096), "o": (4096, 2048), "gate_up": (12288, 4096), "down": (4096, 6144)}
HALF_32B = {"qkv": (5120, 5120), "o": (5120, 4096), "gate_up": (25600, 5120), "down": (5120, 12800)}


@lru_cache(maxsize=1)
def weights_of(num_outputs: int, num_inputs: int) -> list[Tensor]:
    count = min(max(2, math.ceil(2.5e8 / (num_outputs * num_inputs * 2))), 28)
    return [randn(num_outputs, num_inputs, scale=num_inputs**-0.5) for _ in range(count)]


def build_linear(tile: Tile | None, num_tokens: int, name: str, size: tuple[int, int]):
    """With what surrounds the product in a layer: norm and gate, or the residual and what the
    next norm needs of it."""
    weights, x = weights_of(*size), randn(num_tokens, size[1])
    linears = [Linear(weight, None, {}, 0) for weight in weights]
    gated, factors = name == "gate_up", randn(size[1])
    norm = (factors, 1e-6) if name in ("qkv", "gate_up") else None
    residual = None if norm or name == "lm_head" else randn(num_tokens, size[0])
    values = x if norm is None else x * factors
    squares = x.float().square().unflatten(1, (-1, 64)).sum(2)
    next_norm = randn(size[0])

    def cublas(linear: Linear) -> Tensor:
        if residual is not None:
            return torch.addmm(residual, x, linear.weight.t())
        out = linear(x if norm is None else KERNELS.rms_norm(x, RMSNorm(*norm)))
        return act_and_mul(out, "silu") if gated else out

    def ours(linear: Linear) -> Tensor:
        if residual is not None:
            return skinny_add(x, linear, residual, next_norm=next_norm, tile=tile).hidden
        scale = norm and (squares, norm[1])
        gate = "silu" if gated else None
        return skinny_linear(values, linear, norm=scale, gate=gate, tile=tile)

    multiply = cublas if tile is None else ours

    def run() -> Tensor:
        for linear in linears:
            out = multiply(linear)
        return out

    def expected() -> Tensor:
        inputs = x.double()
        if norm is not None:
            inputs = F.rms_norm(inputs, (size[1],), factors.double(), 1e-6)
        out = inputs @ weights[-1].double().T
        if residual is not None:
            out += residual.double()
        return F.silu(out[:, : size[0] // 2]) * out[:, size[0] // 2 :] if gated else out

    return run, len(weights), lambda: relative_error(run(), expected())


def tiles_for(num_tokens: int, size: tuple[int, int], *, gated: bool = False) -> Iterator[Tile]:
    """Candidates around what `tile_for` chooses, of up to 16 tokens."""
    num_inputs = size[1]
    if num_tokens == 1:
        for block_n, block_k, warps in ((8, 1024, 8), (8, 1024, 4), (4, 2048, 8), (4, 4096, 8)):
            if block_k < 2 * num_inputs:
                yield Tile(block_n, block_k, -(-num_inputs // block_k), warps)
    else:
        for block_n, block_k, num_tiles, stages in (
            (32, 512, 1, 2), (64, 512, 1, 2), (32, 512, 2, 3), (64, 512, 2, 2), (32, 256, 4, 4),
            (32, 256, 2, 3), (32, 256, 1, 2), (32, 128, 8, 5), (32, 128, 4, 4), (64, 128, 8, 4),
            (64, 256, 1, 2), (64, 256, 2, 2), (64, 256, 4, 3), (16, 256, 4, 4), (16, 256, 2, 4),
        ):  # fmt: skip
            if num_inputs % (block_k * num_tiles) == 0:
                yield Tile(block_n, block_k, num_tiles, 4, stages)


def tiles_of_many(num_tokens: int, size: tuple[int, int], *, gated: bool) -> Iterator[Tile]:
    """What gives most multiprocessors something to do, and fits their shared memory."""
    num_outputs, num_inputs = size[0] // (1 + gated), size[1]
    least = max(16, triton.next_power_of_2(min(num_tokens, 64)))
    for block_m, block_n, block_k, splits in product(
        sorted({least, 64}), (32, 64), (128, 256, 512, 1024), (1, 2, 3, 4)
    ):
        num_tiles = num_inputs / (block_k * splits)
        programs = -(-num_tokens // block_m) * -(-num_outputs // block_n) * splits
        if num_tiles != int(num_tiles) or not 60 <= programs <= 264:
            continue
        room = 230_000 // ((block_m + block_n * (1 + gated)) * block_k * 2)
        # One for the first tile; the fewer may share a multiprocessor.
        depths = {2} if num_tiles == 1 else {min(room - 1, 5), min(room // 2 - 1, 5)}
        for stages in sorted(depths):
            if room >= 1 and (num_tiles == 1 or stages >= 2):
                yield Tile(block_n, block_k, int(num_tiles), 4, stages, block_m)


def describe(tile: Tile) -> str:
    label = f"n{tile.block_n} k{tile.block_k}×{tile.num_tiles} w{tile.warps}"
    return f"{label} s{tile.stages} m{tile.block_m or ''}"


def linear_cases() -> Iterator[Case]:
    wanted = [("linear", m, QWEN3_06B) for m in (8, 16)]
    wanted += [("large", m, QWEN3_8B | LM_HEAD) for m in (1, 8, 16)]
    for group, num_tokens, model in wanted:
        for name, size in model.items():
            shape = f"m{num_tokens} {name} {size[0]}×{size[1]}"
            for tile in (None, *tiles_for(num_tokens, size)):
                label = "cuBLAS" if tile is None else describe(tile)
                build = partial(build_linear, tile, num_tokens, name, size)
                yield Case(group, shape, label, size[0] * size[1] * 2, 0, build)


def share_cases() -> Iterator[Case]:
    """Of layers that two ranks share; what is chosen comes first."""
    layers = [*HALF_8B.items(), *HALF_32B.items()]
    for num_tokens, (name, size) in product((1, 8, 64), layers):
        gated = name == "gate_up"
        chosen = linear_kernels.tile_for(num_tokens, size[0] // (1 + gated), size[1], gated=gated)
        if num_tokens == 1:
            tiles: list[Tile | None] = [
                Tile(block_n, block_k, -(-size[1] // block_k), warps)
                for block_n, block_k, warps in product((2, 4, 8), (1024, 2048, 4096), (4, 8))
                if block_k <= size[1] and 4096 <= block_n * block_k <= 16384
            ]
        elif num_tokens == 8:
            tiles = [None, *tiles_for(num_tokens, size)]
        else:
            tiles = [None, *tiles_of_many(num_tokens, size, gated=gated)]
        for tile in (chosen, *tiles):
            label = "cuBLAS" if tile is None else describe(tile)
            build = partial(build_linear, tile, num_tokens, name, size)
            shape = f"m{num_tokens} {name} {size[0]}×{size[1]}"
            yield Case("shares", shape, label, size[0] * size[1] * 2, 0, build)


GATED_TILES = [
    CHOSEN,
    GatedTile(128, 128, 64, 4, 8), GatedTile(128, 128, 128, 2, 8),
    GatedTile(128, 128, 64, 3, 8, None), GatedTile(128, 128, 64, 4, 8, None),
    GatedTile(256, 64, 64, 3, 8), GatedTile(256, 64, 64, 4, 8), GatedTile(256, 64, 64, 3, 8, None),
    GatedTile(128, 64, 64, 3, 4, 2), GatedTile(128, 64, 64, 4, 4), GatedTile(128, 64, 64, 4, 8),
    GatedTile(128, 64, 64, 3, 4, None), GatedTile(64, 128, 64, 2, 4, 2),
]  # fmt: skip


def build_gated(tile: GatedTile | None, num_tokens: int, size: tuple[int, int]):
    """The gated product of many tokens, normed already."""
    linears = [Linear(weight, None, {}, 0) for weight in weights_of(*size)[:8]]
    xs = [randn(num_tokens, size[1]) for _ in range(4)]  # more than the L2 cache holds

    def run() -> Tensor:
        for index, linear in enumerate(linears):
            x = xs[index % len(xs)]
            out = gated_linear(x, linear, tile=tile) if tile else act_and_mul(linear(x), "silu")
        return out

    def error() -> float:
        x, weight = xs[(len(linears) - 1) % len(xs)].double(), linears[-1].weight.double()
        gate, up = (x @ weight.T).chunk(2, dim=1)
        return relative_error(run(), F.silu(gate) * up)

    return run, len(linears), error


def gated_cases() -> Iterator[Case]:
    for size, num_tokens in product(
        (QWEN3_06B["gate_up"], QWEN3_8B["gate_up"]), (512, 1024, 2048, 8192)
    ):
        shape, work = f"m{num_tokens} {size[0]}×{size[1]}", 2 * num_tokens * size[0] * size[1]
        for tile in (None, *GATED_TILES):
            label = "cuBLAS, act_and_mul"
            if tile is not None:
                label = f"{tile.block_m}×{tile.block_n}×{tile.block_k} s{tile.stages} w{tile.warps}"
                label += f" p{tile.programs_per_sm or '-'}"
            yield Case("gated", shape, label, 0, work, partial(build_gated, tile, num_tokens, size))


@lru_cache(maxsize=1)
def chain_of_layers(num_layers: int = 28) -> list[dict[str, Linear]]:
    return [
        {
            name: Linear(randn(n, k, scale=k**-0.5), None, {}, 0)
            for name, (n, k) in QWEN3_06B.items()
        }
        for _ in range(num_layers)
    ]


@dataclass(frozen=True)
class Choice:
    """How a chain multiplies: as the engine does, but for what is given here."""

    tiles: tuple[tuple[str, Tile], ...] = ()  # of layers by name, which are ours then
    max_weighed_tokens: int = linear_kernels.MAX_WEIGHED_TOKENS

    def take(self) -> None:
        """For all launches that follow."""
        tiles = {QWEN3_06B[name]: tile for name, tile in self.tiles}

        def tile_for(num_tokens: int, num_outputs: int, num_inputs: int, *, gated: bool) -> Tile:
            tile = tiles.get((num_outputs * (1 + gated), num_inputs))
            return tile or TILE_FOR(num_tokens, num_outputs, num_inputs, gated=gated)

        def beats_cublas(num_tokens: int, weight: Tensor, *, gated: bool = False) -> bool:
            is_ours = tuple(weight.shape) in tiles
            return is_ours or POLICIES["as chosen"](num_tokens, weight, gated=gated)

        linear_kernels.tile_for, products.beats_cublas = tile_for, beats_cublas
        linear_kernels.MAX_WEIGHED_TOKENS = self.max_weighed_tokens


TILE_FOR = linear_kernels.tile_for


def build_layer(num_tokens: int, choice: Choice | None):
    """Layers' products with all that lies between them but attention and RoPE. None: cuBLAS."""
    layers, factors, start = chain_of_layers(), randn(1024), randn(num_tokens, 1024)
    norm = RMSNorm(factors, 1e-6)
    num_heads = num_tokens * 2048  # of the queries' numbers, here those that come first

    def cublas(layers: list[dict[str, Linear]]) -> Tensor:
        residual = start.clone()
        for layer in layers:
            qkv = layer["qkv"](KERNELS.rms_norm(residual, norm))
            heads = qkv.view(-1)[:num_heads].view(num_tokens, 2048)
            residual = residual.addmm_(heads, layer["o"].weight.t())
            inner = layer["gate_up"](KERNELS.rms_norm(residual, norm))
            residual = residual.addmm_(act_and_mul(inner, "silu"), layer["down"].weight.t())
        return residual

    def chosen(layers: list[dict[str, Linear]]) -> Tensor:
        choice.take()
        residual = Residual(start.clone())
        for layer in layers:
            qkv = KERNELS.norm_linear(residual, norm, layer["qkv"])
            heads = qkv.view(-1)[:num_heads].view(num_tokens, 2048)
            residual = KERNELS.linear_add(heads, layer["o"], residual.hidden, next_norm=norm)
            mlp = layer["gate_up"], layer["down"]
            residual = KERNELS.mlp(residual, norm, *mlp, next_norm=norm)
        return residual.hidden

    def exact(layers: list[dict[str, Linear]]) -> Tensor:
        residual, wide = start.double(), factors.double()
        for layer in layers:
            weights = {name: linear.weight.double() for name, linear in layer.items()}
            qkv = F.rms_norm(residual, (1024,), wide, 1e-6) @ weights["qkv"].T
            heads = qkv.view(-1)[:num_heads].view(num_tokens, 2048)
            residual = residual + heads @ weights["o"].T
            gates = F.rms_norm(residual, (1024,), wide, 1e-6) @ weights["gate_up"].T
            residual = residual + (F.silu(gates[:, :3072]) * gates[:, 3072:]) @ weights["down"].T
        return residual

    run = cublas if choice is None else chosen
    return (
        lambda: run(layers),
        len(layers),
        lambda: relative_error(run(layers[:2]), exact(layers[:2])),
    )


def layer_cases() -> Iterator[Case]:
    """A layer as it runs, and, of medium numbers of tokens, with other tiles for one product."""
    num_bytes = sum(n * k * 2 for n, k in QWEN3_06B.values())
    ways = {"cuBLAS": None, "as the engine runs it": Choice()}
    ways |= {"norms apart": Choice(max_weighed_tokens=0)}
    ways |= {"norms ahead": Choice(max_weighed_tokens=128)}
    for num_tokens in (1, 4, 8, 16, 32, 64, 128, 256):
        for label, choice in ways.items():
            build = partial(build_layer, num_tokens, choice)
            yield Case("layer", f"m{num_tokens}", label, num_bytes, 0, build)
    for num_tokens, (name, size) in product((1, 8, 16, 32, 64, 128), QWEN3_06B.items()):
        tiles = tiles_for if num_tokens <= 16 else tiles_of_many
        yield Case(
            "medium", f"m{num_tokens} {name}", "as chosen", num_bytes, 0,
            partial(build_layer, num_tokens, Choice()),
        )  # fmt: skip
        for tile in tiles(num_tokens, size, gated=name == "gate_up"):
            build = partial(build_layer, num_tokens, Choice(((name, tile),)))
            yield Case("medium", f"m{num_tokens} {name}", describe(tile), num_bytes, 0, build)


# ---------------------------------------------------------------- the whole model


@lru_cache(maxsize=1)
def qwen3() -> Decoder:
    """Qwen3-0.6B with random weights."""
    path = Path(__file__).parent / "models" / "qwen3-0.6b" / "config.json"
    spec = spec_from_config(json.loads(path.read_text()))
    specs = attention_specs(spec, block_size=16, dtype=BF16, device=CUDA)
    attention, _ = select_attention("triton", specs)
    model = Decoder(spec, kernels=KERNELS, attention=attention, dtype=BF16, device=CUDA)
    for slot in model.slots():
        slot.target.normal_().mul_(slot.target.shape[-1] ** -0.5)
    return model


def build_model(tuning: Tuning | None, policy: str, rows: int, length: int):
    """A decode step up to the last norm, with attention tuned so and products chosen so."""
    model = qwen3()
    spec, batch, _, cache = attention_inputs((1,) * rows, (length,) * rows, (16, 8), 16)
    batch = replace(batch, input_ids=torch.arange(rows, device=CUDA))
    caches = [cache[:, index % cache.shape[1]] for index in range(len(model.layers))]
    backend = TritonAttention(spec, tuning)

    def run() -> Tensor:
        products.beats_cublas = POLICIES[policy]
        backend.prepare(batch)
        residual = Residual(F.embedding(batch.input_ids, model.embedding.weight))
        for layer, layer_cache in zip(model.layers, caches, strict=True):
            layer.attention.backend = backend
            norm = layer.attention.norms.pre  # as good as the next layer's
            residual = layer.forward(residual, batch=batch, layer_cache=layer_cache, next_norm=norm)
        return KERNELS.rms_norm(residual.hidden, model.final_norm)

    return run, 1, None


POLICIES: dict[str, Callable[..., bool]] = {
    "as chosen": products.beats_cublas,
    "cuBLAS": lambda num_tokens, weight, gated=False: num_tokens == 1,
    "all ours": lambda num_tokens, weight, gated=False: weight.numel() < 2**23,
    "ours but gated": lambda num_tokens, weight, gated=False: weight.numel() < 2**23 and not gated,
}


def model_cases() -> Iterator[Case]:
    chosen = tuning_for(attention_spec((16, 8), 16))
    for rows, length in ((1, 384), (8, 384), (32, 384), (64, 384), (128, 640), (256, 640)):
        num_bytes = 440e6 * 2 + rows * length * 4096 * 28
        for policy in POLICIES:
            if rows > 1 or policy == "as chosen":
                build = partial(build_model, None, policy, rows, length)
                yield Case("model", f"{rows}×{length}", policy, num_bytes, 0, build)
        for name, few in FEW_WAYS.items():
            if rows <= 64:
                build = partial(build_model, replace(chosen, few=few), "as chosen", rows, length)
                yield Case("model", f"{rows}×{length}", name, num_bytes, 0, build)


FEW_WAYS = {
    "n64 s2 w4 p2": (Fitting(Tiling(64, 2, 4, tma=False), 2),),
    "n32 s3 w2 p4": (Fitting(Tiling(32, 3, 2, tma=False), 4),),
    "apart": (),
}


# ---------------------------------------------------------------- Gemma 3 4B

GEMMA3_4B = {
    "qkv": (4096, 2560), "o": (2560, 2048), "gate_up": (20480, 2560), "down": (2560, 10240),
    "lm_head": (262144, 2560),
}  # fmt: skip
GELU = partial(F.gelu, approximate="tanh")


def build_gelu(way: str | Tile | GatedTile, num_tokens: int):
    """gelu(gate) * up of the product: by torch, by a kernel behind it, or within it."""
    size = GEMMA3_4B["gate_up"]
    linears = [Linear(weight, None, {}, 0) for weight in weights_of(*size)]
    x = randn(num_tokens, size[1])

    def one(linear: Linear) -> Tensor:
        if isinstance(way, Tile):
            return skinny_linear(x, linear, gate="gelu_tanh", tile=way)
        if isinstance(way, GatedTile):
            return gated_linear(x, linear, "gelu_tanh", tile=way)
        found = None
        if way == "as chosen":
            found = GATED_PRODUCT(Residual(x), None, linear, "gelu_tanh")
        if found is not None:
            return found
        product = KERNELS.norm_linear(Residual(x), None, linear)
        return (gated_by_torch if way == "torch" else act_and_mul)(product, "gelu_tanh")

    def error() -> float:
        gate, up = (x.double() @ linears[-1].weight.double().T).chunk(2, dim=1)
        return relative_error(one(linears[-1]), GELU(gate) * up)

    return (lambda: [one(linear) for linear in linears]), len(linears), error


GATED_PRODUCT = products.PlainProducts().gated


def build_norms(fused: bool, num_tokens: int):
    """residual + norm(product), and the next norm of that."""
    copies = max(2, min(28, int(2e8 // (num_tokens * 4 * 2560))))
    parts, streams = randn(2, copies, num_tokens, 2560)
    norms = [RMSNorm(torch.rand(2560, device=CUDA) + 0.5, 1e-6) for _ in range(2)]

    def one(product: Tensor, residual: Tensor) -> Tensor:
        if fused:
            found = KERNELS.add(product, residual, post_norm=norms[0], next_norm=norms[1]).normed
            assert found is not None
            return found
        return KERNELS.rms_norm(residual.add_(KERNELS.rms_norm(product, norms[0])), norms[1])

    def error() -> float:
        product, total = (t[0].double() for t in (parts, streams))
        weights = [norm.weight.double() for norm in norms]
        total = total + F.rms_norm(product, (2560,), weights[0], 1e-6)
        return relative_error(
            one(parts[0], streams[0].clone()), F.rms_norm(total, (2560,), weights[1], 1e-6)
        )

    return (lambda: [one(parts[i], streams[i]) for i in range(copies)]), copies, error


def gemma_decode_cases() -> Iterator[Case]:
    heads, spec = (8, 4), attention_spec((8, 4), 16, None, 256)
    chosen = tuning_for(spec)
    for rows, length in ((1, 384), (8, 384), (64, 384), (128, 704)):
        variants = {"apart, as it was": replace(chosen, few=(), programs_per_sm=6)}
        for keys, stages, warps, programs in ((32, 2, 4, 2), (16, 2, 4, 3), (64, 2, 4, 2)):
            few = (Fitting(Tiling(keys, stages, warps, tma=False), programs, programs),)
            if rows * heads[1] <= 132 * programs:
                label = f"fused n{keys} s{stages} w{warps} p{programs}"
                variants[label] = replace(chosen, few=few)
        streams = ((32, 3, 4, 2), (32, 2, 4, 3), (16, 3, 4, 3), (16, 4, 4, 3), (16, 4, 2, 4))
        for keys, stages, warps, programs in streams if rows >= 64 else ():
            decode = Tiling(keys, stages, warps, tma=False)
            label = f"apart n{keys} s{stages} w{warps} p{programs}"
            variants[label] = replace(chosen, few=(), decode=decode, programs_per_sm=programs)
        args = (1,) * rows, (length,) * rows, heads, 16, None, 256
        for label, tuning in variants.items():
            build = partial(build_attention, tuning, *args, rotates=True)
            num_bytes = rows * length * heads[1] * 1024
            yield Case("gemma", f"decode {rows}×{length} h8/4", label, num_bytes, 0, build)


def gemma_gate_cases() -> Iterator[Case]:
    size = GEMMA3_4B["gate_up"]
    for num_tokens in (1, 8, 32, 64, 8192):
        ways: dict[str, str | Tile | GatedTile] = {
            name: name for name in ("torch", "kernel", "as chosen")
        }
        if num_tokens in (32, 64):
            for tile in (Tile(64, 128, 20, 4, 3), Tile(32, 128, 20, 4, 4), Tile(64, 64, 40, 4, 4)):
                ways[describe(tile)] = tile
        if num_tokens > 64:
            for wide in (CHOSEN, GatedTile(128, 128, 64, 4, 8), GatedTile(256, 64, 64, 4, 8)):
                ways[f"{wide.block_m}×{wide.block_n} s{wide.stages}"] = wide
        work = 2 * num_tokens * size[0] * size[1] if num_tokens > 64 else 0
        for label, way in ways.items():
            build = partial(build_gelu, way, num_tokens)
            num_bytes = size[0] * size[1] * 2
            yield Case("gemma", f"gates of {num_tokens}", label, num_bytes, work, build)


def gemma_cases() -> Iterator[Case]:
    yield from gemma_decode_cases()
    yield from gemma_gate_cases()
    for num_tokens in (1, 64, 8192):
        for label, fused in (("apart", False), ("fused", True)):
            build = partial(build_norms, fused, num_tokens)
            yield Case("gemma", f"norms of {num_tokens}", label, num_tokens * 20480, 0, build)
    for name, size in GEMMA3_4B.items():
        choose = linear_kernels.tile_for(1, size[0] // (1 + (name == "gate_up")), size[1],
                                         gated=name == "gate_up")  # fmt: skip
        cuts = ((8, 1024, 8), (8, 1024, 4), (16, 512, 8), (16, 512, 4), (4, 2048, 4), (4, 4096, 8))
        others = [Tile(n, k, -(-size[1] // k), warps) for n, k, warps in cuts]
        for tile in dict.fromkeys((choose, *others)):
            build = partial(build_linear, tile, 1, name, size)
            label = describe(tile) + " chosen" * (tile == choose)
            yield Case("gemma", f"m1 {name}", label, size[0] * size[1] * 2, 0, build)


# ---------------------------------------------------------------- FP8


@lru_cache(maxsize=1)
def fp8_linears(num_outputs: int, num_inputs: int) -> list[Linear]:
    count = min(max(2, math.ceil(2.5e8 / (num_outputs * num_inputs))), 28)
    rows = [
        quantize_rows(randn(num_outputs, num_inputs, scale=num_inputs**-0.5)) for _ in range(count)
    ]
    return [Linear(row.values, None, {}, 0, NATIVE_FP8, row.scale[:, 0]) for row in rows]


def build_fp8(how: str | Tile, num_tokens: int, name: str, size: tuple[int, int]):
    """how: "alone" (tokens quantized before), "with tokens" (and by our kernel), or a tile."""
    linears, x = fp8_linears(*size), randn(num_tokens, size[1])
    gated = name == "gate_up" and isinstance(how, Tile)
    quantized = quantize_rows(x)

    def one(linear: Linear) -> Tensor:
        if isinstance(how, Tile):
            return skinny_linear(x, linear, gate="silu" if gated else None, tile=how)
        tokens = quantized if how == "alone" else quantize(x)
        return NATIVE_FP8.multiply(linear, tokens, BF16)

    def run() -> Tensor:
        for linear in linears:
            out = one(linear)
        return out

    def error() -> float:
        last = linears[-1]
        meant, rows = x.double(), quantized
        if isinstance(how, Tile):
            rows = quantize_rows(x.unflatten(1, (-1, min(how.block_k, x.shape[1]))))
        if num_tokens > 1 or not isinstance(how, Tile):
            meant = (rows.values.double() * rows.scale.double()).reshape(x.shape)
        expected = meant @ (last.weight.double() * last.scale.double()[:, None]).T
        if gated:
            gate, up = expected.chunk(2, dim=1)
            expected = F.silu(gate) * up
        return relative_error(run(), expected)

    return run, len(linears), error


def fp8_tiles_for(num_tokens: int, name: str, size: tuple[int, int]) -> Iterator[Tile]:
    """The engine's choice first, then candidates around it."""
    gated, num_inputs = name == "gate_up", size[1]
    yield fp8_tile_for(num_tokens, size[0] // (1 + gated), num_inputs, gated=gated)
    if num_tokens == 1:
        for block_n, block_k, warps in (
            (8, 1024, 8), (8, 1024, 4), (16, 1024, 8), (4, 2048, 8), (8, 2048, 4), (4, 4096, 4),
            (2, 4096, 8), (8, 4096, 8),
        ):  # fmt: skip
            if block_k < 2 * num_inputs:
                yield Tile(block_n, block_k, -(-num_inputs // block_k), warps)
        return
    for block_n, block_k, num_tiles, stages in (
        (64, 512, 1, 2), (64, 256, 1, 2), (64, 512, 2, 3), (64, 256, 8, 4), (64, 512, 4, 3),
        (128, 512, 1, 2), (128, 256, 1, 2), (128, 256, 4, 3), (128, 256, 8, 3), (128, 256, 16, 3),
        (128, 128, 16, 4), (128, 128, 32, 4),
    ):  # fmt: skip
        if num_inputs % (block_k * num_tiles) == 0:
            yield Tile(block_n, block_k, num_tiles, block_n // 16, stages)


def fp8_linear_cases() -> Iterator[Case]:
    models = ((QWEN3_06B, (1, 8, 16, 64, 256, 8192)), (QWEN3_8B, (1, 8, 16, 64, 256, 8192)))
    for model, counts in models:
        for (name, size), num_tokens in product(model.items(), counts):
            shape = f"m{num_tokens} {name} {size[0]}×{size[1]}"
            num_bytes = size[0] * size[1]
            work = 2 * num_bytes * num_tokens if num_tokens > 64 else 0
            group = "fp8few" if num_tokens <= 16 else "fp8"
            build = partial(build_linear, None, num_tokens, name, size)
            yield Case(group, shape, "cuBLAS bf16", 2 * num_bytes, work, build)
            for how in ("alone", "with tokens"):
                build = partial(build_fp8, how, num_tokens, name, size)
                yield Case(group, shape, f"_scaled_mm {how}", num_bytes, work, build, 2 * RATE)
            for tile in fp8_tiles_for(num_tokens, name, size) if num_tokens <= 16 else ():
                build = partial(build_fp8, tile, num_tokens, name, size)
                yield Case(group, shape, describe(tile), num_bytes, 0, build)


def build_quantizing(name: str, num_tokens: int):
    """Norm or SiLU·mul of Qwen3-8B with the quantization; how much more it loses than torch's."""
    hidden, factors, gate_up = randn(num_tokens, 4096), randn(4096), randn(num_tokens, 24576)
    runs = {
        "quantize": (lambda: quantize(hidden), lambda: hidden.double()),
        "norm, quantize": (
            lambda: quantize(hidden, RMSNorm(factors, 1e-6)),
            lambda: F.rms_norm(hidden.double(), (4096,), factors.double(), 1e-6),
        ),
        "act_and_mul, quantize": (
            lambda: act_and_mul_fp8(gate_up, "silu"),
            lambda: F.silu(gate_up[:, :12288].double()) * gate_up[:, 12288:].double(),
        ),
    }
    run, exact = runs[name]

    def error() -> float:
        expected = exact()
        ours, torchs = (
            relative_error(rows.values.double() * rows.scale.double(), expected)
            for rows in (run(), quantize_rows(expected))
        )
        return max(0.0, ours / torchs - 1)

    return run, 1, error


FP8_STREAMS = ((32, 2, 2, 5), (32, 3, 2, 6), (64, 2, 2, 3), (64, 2, 2, 4), (64, 3, 2, 3))


def fp8_cases() -> Iterator[Case]:
    token_bytes = {"quantize": 3 * 4096, "norm, quantize": 3 * 4096}
    token_bytes["act_and_mul, quantize"] = 5 * 12288
    for name, num_tokens in product(token_bytes, (64, 256, 8192)):
        build = partial(build_quantizing, name, num_tokens)
        yield Case("fp8", f"{num_tokens} tokens", name, token_bytes[name] * num_tokens, 0, build)
    yield from fp8_linear_cases()
    chosen = tuning_for(attention_spec((16, 8), 16, E4M3))
    for rows, length in ((1, 4096), (8, 1024), (64, 1024), (256, 1024)):
        args, num_bytes = ((1,) * rows, (length,) * rows, (16, 8), 16), rows * length * 8 * 256
        ways = [(None, chosen, "as chosen"), (E4M3, chosen, "as chosen")]
        if rows >= 64:
            for keys, stages, warps, programs in FP8_STREAMS:
                tuning = replace(
                    chosen, decode=Tiling(keys, stages, warps, tma=False),
                    programs_per_sm=programs, few=(),
                )  # fmt: skip
                ways.append((E4M3, tuning, f"n{keys} s{stages} w{warps} p{programs}"))
        for dtype, tuning, way in ways:
            build = partial(build_attention, tuning, *args, dtype)
            label = f"{'bf16' if dtype is None else 'fp8'} KV {way}"
            total = num_bytes * (2 if dtype is None else 1)
            yield Case("fp8", f"decode {rows}×{length} h16/8", label, total, 0, build)
    for dtype in (None, E4M3):
        lengths = (4096,) * 4
        spec = attention_spec((16, 8), 16, dtype)
        build = partial(build_attention, tuning_for(spec), lengths, lengths, (16, 8), 16, dtype)
        label = f"{'bf16' if dtype is None else 'fp8'} KV"
        yield Case("fp8", "prefill 4×4096 h16/8", label, 0, 4 * 4096 * 4097 / 2 * 8192, build)


# ---------------------------------------------------------------- elementwise and sampling


def build_elementwise(name: str, num_tokens: int):
    copies = max(2, min(28, int(2e8 // (num_tokens * 4096))))
    hidden = randn(copies, num_tokens, 1024)
    factors, gate_up = randn(1024), randn(max(2, copies // 6), num_tokens, 6144)
    qkv = randn(max(2, copies // 4), num_tokens, 4096)
    cache = randn(2, num_tokens // 16 + 1, 16, 8, 128)
    cos_sin = torch.randn(4096, 128, device=CUDA)
    positions = torch.randint(4096, (num_tokens,), device=CUDA)
    slots = torch.randperm(num_tokens, device=CUDA)
    norms = argparse.Namespace(q_weight=randn(128), k_weight=randn(128), eps=1e-6)

    def rope(x: Tensor) -> Tensor:
        return KERNELS.rope_and_cache(
            x, cos_sin=cos_sin, positions=positions, slot_mapping=slots, layer_cache=cache,
            qk_norm=norms,
        )  # fmt: skip

    runs = {
        "rms_norm": (lambda i: KERNELS.rms_norm(hidden[i], RMSNorm(factors, 1e-6)), copies),
        "act_and_mul": (lambda i: act_and_mul(gate_up[i], "silu"), len(gate_up)),
        "rope_and_cache": (lambda i: rope(qkv[i]), len(qkv)),
        "rope_and_cache of keys": (lambda i: rope(qkv[i, :, 2048:]), len(qkv)),
    }  # fmt: skip
    one, count = runs[name]
    return (lambda: [one(i) for i in range(count)]), count, None


def elementwise_cases() -> Iterator[Case]:
    token_bytes = {"rms_norm": 4096, "act_and_mul": 18432, "rope_and_cache": 18432}
    token_bytes["rope_and_cache of keys"] = 10240
    for name, num_tokens in product(token_bytes, (1, 256, 8192, 16384)):
        build = partial(build_elementwise, name, num_tokens)
        num_bytes = token_bytes[name] * num_tokens
        yield Case("elementwise", f"{num_tokens} tokens", name, num_bytes, 0, build)


def build_sampler(n: int, dtype: torch.dtype, spread: float, top_k: int, top_p: float, num: int):
    vocab = 151936
    logits = [
        torch.randn(n, vocab, device=CUDA).mul_(spread).to(dtype) for _ in range(2 if n > 64 else 8)
    ]
    columns = {
        "temperature": torch.full((n,), 0.6, device=CUDA),
        "top_k": torch.full((n,), top_k, dtype=torch.int32, device=CUDA),
        "top_p": torch.full((n,), top_p, device=CUDA),
        "min_p": torch.zeros(n, device=CUDA),
    }
    rows = torch.arange(n, device=CUDA)
    seeds, positions = torch.randint(2**40, (2, n), device=CUDA)

    def run() -> Tensor:
        fused_sampler.SEGMENTS_PER_PROGRAM = num
        for line in logits:
            out = fused_sampler.sample_tokens(
                line, rows=rows, positions=positions, columns=columns, seeds=seeds,
            )  # fmt: skip
        return out

    def error() -> float:
        """The share of rows whose token differs from the plain sampler's."""
        from nanovllm.worker.sampling import distribution as d

        probs = d.to_probabilities(logits[-1].float().clone(), columns["temperature"])
        if top_k:
            probs = d.truncate_top_k(probs, columns["top_k"], most=top_k)
        if top_p < 1:
            probs = d.truncate_top_p(probs, columns["top_p"])
        return float((d.draw(probs, seeds, positions) != run()).double().mean())

    return run, len(logits), error


def sampler_cases() -> Iterator[Case]:
    for n, dtype in product((1, 64, 256), (torch.float32, torch.bfloat16)):
        for num in (16, 32, 64):
            build = partial(build_sampler, n, dtype, 3.0, 0, 1.0, num)
            num_bytes = n * 151936 * dtype.itemsize
            yield Case("sampler", f"{n} rows {dtype}", f"temperature {num}", num_bytes, 0, build)
        for spread, top_k, top_p in (
            (3.0, 50, 1.0),
            (3.0, 20, 0.95),
            (3.0, 0, 0.95),
            (0.5, 0, 0.95),
        ):
            build = partial(build_sampler, n, dtype, spread, top_k, top_p, 32)
            label = f"k{top_k} p{top_p} spread {spread}"
            yield Case("sampler", f"{n} rows {dtype}", label, num_bytes, 0, build)


# ---------------------------------------------------------------- running


def median_time(run: Callable[[], object], times: int) -> float:
    """Seconds of one time: the median of graph replays."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(13)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    spans = sorted(a.elapsed_time(b) for a, b in pairwise(events))
    return spans[len(spans) // 2] / times * 1e-3


def measure(case: Case) -> float:
    """Print one line; returns seconds, infinite on failure."""
    head = f"{case.group:11} {case.shape:24} {case.variant:30}"
    try:
        run, times, error = case.build()
        wrong = error() if error is not None else 0.0
        seconds = median_time(run, times)
    except Exception as failure:  # one variant must not end the others
        print(f"{head} failed: {type(failure).__name__} {str(failure)[:110]!r}", flush=True)
        return math.inf
    # Of sampled tokens, a few lie on the border between two: sums there round differently.
    allowed = 3e-2 if case.group == "sampler" else 1e-2
    floor = max(case.num_bytes / BANDWIDTH, case.num_operations / case.rate)
    rate = (
        f"{case.num_operations / seconds * 1e-12:6.0f} TFLOP/s"
        if case.num_operations
        else f"{case.num_bytes / seconds * 1e-12:6.2f} TB/s   "
    )
    note = f"  error {wrong:.1e}" + ("" if wrong < allowed else "  WRONG")
    print(
        f"{head} {seconds * 1e6:9.1f} µs {rate} {floor / seconds:5.2f} of floor{note}", flush=True
    )
    return seconds if wrong < allowed else math.inf


def all_cases(groups: list[str]) -> list[Case]:
    makers = (
        elementwise_cases,
        decode_cases,
        small_cases,
        prefill_cases,
        linear_cases,
        share_cases,
        gated_cases,
        layer_cases,
        model_cases,
        gemma_cases,
        fp8_cases,
        sampler_cases,
    )
    return [case for make in makers for case in make() if case.group in groups]


def compile_all(groups: list[str], shard: int | None) -> None:
    """Compile in parallel: each shard launches its share of the cases once, into Triton's cache."""
    if shard is None:
        command = [sys.executable, __file__, "--only", ",".join(groups), "--shard"]
        shards = [subprocess.Popen([*command, str(i)]) for i in range(NUM_COMPILERS)]
        for process in shards:
            process.wait(timeout=300)
        return
    for case in all_cases(groups)[shard::NUM_COMPILERS]:
        try:
            case.build()[0]()
            torch.cuda.synchronize()
        except triton.runtime.errors.OutOfResources:
            continue
        except Exception as failure:  # reported where it is measured
            print(f"shard {shard}: {case.shape} {case.variant}: {str(failure)[:200]!r}", flush=True)
            if "CUDA error" in str(failure):
                return


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--only",
        default="elementwise,decode,prefix,small,prefill,long,layer,model,linear,large,gated,gemma,"
        "fp8few,fp8,sampler",
    )
    parser.add_argument("--shard", type=int)
    parser.add_argument("--compile", action="store_true", help="only fill Triton's cache")
    arguments = parser.parse_args()
    groups = arguments.only.split(",")
    torch.manual_seed(0)
    if arguments.compile or arguments.shard is not None:
        compile_all(groups, arguments.shard)
        return
    best: dict[tuple[str, str], tuple[float, str]] = {}
    first: dict[tuple[str, str], tuple[float, str]] = {}
    for case in all_cases(groups):
        seconds = measure(case)
        key = (case.group, case.shape)
        best[key] = min(best.get(key, (math.inf, "")), (seconds, case.variant))
        first.setdefault(key, (seconds, case.variant))
    print("\nbest of each:")
    for (group, shape), (seconds, variant) in best.items():
        baseline, name = first[group, shape]
        beside = f"  ({name} {baseline * 1e6:.1f})" if name != variant else ""
        print(f"{group:11} {shape:24} {variant:30} {seconds * 1e6:9.1f} µs{beside}")


if __name__ == "__main__":
    main()
