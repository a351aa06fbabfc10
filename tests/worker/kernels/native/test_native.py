"""Every native kernel against torch, by every instruction set that this CPU can run."""

import ctypes
from typing import NamedTuple

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from nanovllm.checkpoint.model_size import NATIVE_TYPES
from nanovllm.worker.kernels.native import library as native
from nanovllm.worker.kernels.native.library import library
from nanovllm.worker.kernels.native.packed import can_pack, pack_bfloat16, pack_gguf

if (unusable := native.unusable()) is not None:
    pytest.skip(unusable, allow_module_level=True)

TYPES = [
    GGMLType[name] for name in ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
]
TOKEN_COUNTS = [1, 2, 3, 7, 8, 33, 70]


@pytest.fixture(params=native.runnable_isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> str:
    native.use(request.param, num_threads=2)
    torch.manual_seed(0)
    return str(request.param)


def stored_rows(kind: GGMLType, rows: int, columns: int) -> np.ndarray:
    """Random blocks with reasonable scales: [rows, bytes per row] uint8."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(1)
    blocks = generator.integers(0, 256, (rows, columns // block_size, block_bytes), np.uint8)
    scales = (generator.random((rows, columns // block_size, 2)) * 0.02 - 0.01).astype(np.float16)
    if kind == GGMLType.Q6_K:
        blocks[..., -2:] = scales[..., :1].copy().view(np.uint8)
    else:
        has_two = kind in (GGMLType.Q4_1, GGMLType.Q5_1, GGMLType.Q4_K, GGMLType.Q5_K)
        count = 2 if has_two else 1
        blocks[..., : 2 * count] = scales[..., :count].copy().view(np.uint8)
    return blocks.reshape(rows, -1)


def as_bytes(x: Tensor) -> Tensor:
    """Tokens as products of bytes see them: 8 bits and a scale for each 32 values."""
    groups = x.view(*x.shape[:-1], -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scale).round() * scale).view(x.shape)


def multiplied(linear: native.Linear, x: Tensor) -> Tensor:
    out = torch.full((len(x), linear.rows), torch.nan)
    library().nv_linear(ctypes.byref(linear), x.data_ptr(), len(x), out.data_ptr())
    return out


def test_a_plan_knows_which_types_are_kept_as_stored() -> None:
    kept = {kind.name for kind in GGMLType if can_pack(int(kind), 256)}
    assert kept == {*NATIVE_TYPES, "BF16"}, "which takes as much as what is made half precision"


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_packed_weights_are_the_files_numbers(kind: GGMLType) -> None:
    raw = stored_rows(kind, 37, 512)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    packed = pack_gguf(raw, int(kind), columns=512, name="w")
    rows = torch.tensor([36, 0, 15, 16, 20])
    found = torch.empty(len(rows), 512)
    library().nv_rows(ctypes.byref(packed.matrix), rows.data_ptr(), len(rows), found.data_ptr())
    torch.testing.assert_close(found, expected[rows], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_tokens", TOKEN_COUNTS)
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_quantized_products(kind: GGMLType, num_tokens: int) -> None:
    raw = stored_rows(kind, 53, 768)
    weight = torch.from_numpy(gguf.quants.dequantize(raw, kind).astype(np.float32))
    packed, bias = pack_gguf(raw, int(kind), columns=768, name="w"), torch.randn(53)
    x = torch.randn(num_tokens, 768)
    linear = native.Linear((packed.matrix,), 1, 53, bias.data_ptr())
    found = multiplied(linear, x)
    spread = (x.norm(dim=-1)[:, None] * weight.norm(dim=-1)) / 768**0.5
    # Either form of the tokens rounds them by no more than these shares of the whole.
    exact = x @ weight.T + bias
    assert ((found - exact).abs() / spread).max() < 0.12
    by_bytes = as_bytes(x) @ weight.T + bias
    by_halves = x.bfloat16().float() @ weight.bfloat16().float().T + bias
    nearest = torch.minimum(
        ((found - by_bytes).abs() / spread).max(), ((found - by_halves).abs() / spread).max()
    )
    assert nearest < 2e-3


@pytest.mark.parametrize("num_tokens", TOKEN_COUNTS)
def test_products_of_merged_bfloat16_weights(num_tokens: int) -> None:
    weights = [torch.randn(rows, 96).bfloat16() for rows in (32, 5, 17)]
    packed = [pack_bfloat16(weight) for weight in weights]
    linear = native.Linear(tuple(p.matrix for p in packed), 3, 54, None)
    x = torch.randn(num_tokens, 96)
    expected = x.bfloat16().float() @ torch.cat(weights).float().T
    torch.testing.assert_close(multiplied(linear, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_threads", [1, 3, 4])
def test_products_are_the_same_by_any_number_of_threads(isa: str, num_threads: int) -> None:
    """More threads than processors: some wait asleep while others hold the last piece."""
    packed = pack_bfloat16(torch.randn(1200, 320).bfloat16())
    linear, x = native.Linear((packed.matrix,), 1, 1200, None), torch.randn(3, 320)
    expected = multiplied(linear, x)
    native.use(isa, num_threads=num_threads)
    for _ in range(200):
        assert torch.equal(multiplied(linear, x), expected)


def test_products_of_no_tokens() -> None:
    packed = pack_bfloat16(torch.randn(16, 32).bfloat16())
    linear = native.Linear((packed.matrix,), 1, 16, None)
    assert multiplied(linear, torch.empty(0, 32)).shape == (0, 16)


def test_a_scale_that_is_no_number_is_refused() -> None:
    raw = stored_rows(GGMLType.Q4_1, 20, 64)
    raw[17, :2] = np.array([np.nan], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match=r"'w' is damaged in row 17: fetch it again"):
        pack_gguf(raw, int(GGMLType.Q4_1), columns=64, name="w")


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 40])
def test_rms_norm(num_tokens: int, adds: bool) -> None:
    x, weight = torch.randn(num_tokens, 576), torch.randn(576)
    found = torch.randn_like(x)
    expected = torch.nn.functional.rms_norm(x, (576,), weight, 1e-5) + adds * found
    library().nv_rms_norm(
        x.data_ptr(), weight.data_ptr(), 1e-5, 576, num_tokens, found.data_ptr(), adds
    )
    torch.testing.assert_close(found, expected)


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def through_mlp(gate_up: native.Linear, down: native.Linear, x: Tensor, activation: str) -> Tensor:
    found = torch.full((len(x), down.rows), torch.nan)
    number = native.ACTIVATIONS.index(activation)
    library().nv_mlp(
        ctypes.byref(gate_up), ctypes.byref(down), x.data_ptr(), len(x), number, found.data_ptr()
    )
    return found


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 40, 64])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("activation", native.ACTIVATIONS)
def test_activated_gates_are_exact_but_for_one_rounding(
    activation: str, merged: bool, num_tokens: int
) -> None:
    """Gates, what they let through, and outputs are the inputs themselves, by weights of 1."""
    unit = torch.eye(192).bfloat16()
    packed = (
        [pack_bfloat16(unit)] if merged else [pack_bfloat16(unit[:96]), pack_bfloat16(unit[96:])]
    )
    last = pack_bfloat16(torch.eye(96).bfloat16())
    bias = torch.randn(192) * 4
    gate_up = native.Linear(tuple(p.matrix for p in packed), len(packed), 192, bias.data_ptr())
    down = native.Linear((last.matrix,), 1, 96, None)
    x = (torch.randn(num_tokens, 192) * 20).bfloat16().float()
    expected = gated(activation, *(x + bias).chunk(2, -1))
    found = through_mlp(gate_up, down, x, activation)
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 3, 40])
@pytest.mark.parametrize("activation", native.ACTIVATIONS)
def test_gated_products_of_quantized_weights(activation: str, num_tokens: int) -> None:
    """Gates of another type than what they let through, and down of a third."""
    up = (torch.randn(64, 96) / 8).bfloat16()
    raw_gate = stored_rows(GGMLType.Q8_0, 64, 96)
    raw_down = stored_rows(GGMLType.Q4_1, 48, 64)
    packed = (
        pack_gguf(raw_gate, int(GGMLType.Q8_0), columns=96, name="gate"),
        pack_bfloat16(up),
        pack_gguf(raw_down, int(GGMLType.Q4_1), columns=64, name="down"),
    )
    gate_up = native.Linear((packed[0].matrix, packed[1].matrix), 2, 128, None)
    down = native.Linear((packed[2].matrix,), 1, 48, None)
    x = torch.randn(num_tokens, 96)
    gate = torch.from_numpy(gguf.quants.dequantize(raw_gate, GGMLType.Q8_0))
    last = torch.from_numpy(gguf.quants.dequantize(raw_down, GGMLType.Q4_1))
    expected = gated(activation, x @ gate.T, x @ up.float().T) @ last.T
    found = through_mlp(gate_up, down, x, activation)
    assert (found - expected).norm() / expected.norm() < 0.02  # tokens are rounded twice


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("size", [0, 5, 16, 161])
def test_logits_are_scaled_and_capped(size: int, softcap: float) -> None:
    room = torch.randn(size + 1) * 90
    expected = room * 0.7
    if softcap:
        expected = softcap * torch.tanh(expected / softcap)
    expected[size] = room[size]  # what lies behind them is left alone
    library().nv_cap(room.data_ptr(), size, 0.7, softcap)
    torch.testing.assert_close(room, expected, rtol=1e-5, atol=1e-5)


class Paged:
    """Rows with paged keys and values: `lengths` are (computed before, new tokens).

    shape: heads, heads of keys, numbers in a head.
    """

    def __init__(
        self, lengths: list[tuple[int, int]], *, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> None:
        self.block_size, self.dtype, self.lengths = 16, dtype, lengths
        self.heads, self.kv_heads, self.dim = shape
        _, kv_heads, dim = shape
        most = max((sum(length) for length in lengths), default=0) // self.block_size + 1
        num_blocks = len(lengths) * most + 1
        order = torch.randperm(num_blocks - 1) + 1
        self.tables = order.view(len(lengths), most).int()
        self.cache = torch.randn(2, num_blocks, self.block_size, kv_heads, dim).to(dtype)
        counts = [new for _, new in lengths]
        self.starts = torch.tensor([0, *counts]).cumsum(0).int()
        positions = [torch.arange(old, old + new) for old, new in lengths]
        self.positions = torch.cat([torch.empty(0, dtype=torch.int64), *positions])
        rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(counts))
        blocks = self.tables[rows, self.positions // self.block_size].long()
        self.slots = blocks * self.block_size + self.positions % self.block_size

    @property
    def batch(self) -> native.Batch:
        return native.Batch(
            self.positions.data_ptr(),
            self.slots.data_ptr(),
            self.starts.data_ptr(),
            self.tables.data_ptr(),
            len(self.positions),
            len(self.lengths),
            self.tables.stride(0),
        )

    @property
    def native_cache(self) -> native.Cache:
        is_bf16 = int(self.dtype == torch.bfloat16)
        return native.Cache(self.cache.data_ptr(), self.cache.stride(0), is_bf16, self.block_size)

    def row(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a row, [length, kv_heads, dim] float32."""
        length = sum(self.lengths[row])
        blocks = self.cache[:, self.tables[row].long()].flatten(1, 2)[:, :length].float()
        return blocks[0], blocks[1]


class Variant(NamedTuple):
    window: int = 0
    softcap: float = 0.0
    has_sinks: bool = False


def naive_attention(
    queries: Tensor, paged: Paged, variant: Variant, sinks: Tensor | None
) -> Tensor:
    outputs, (window, softcap, _) = [], variant
    for row, (old, new) in enumerate(paged.lengths):
        keys, values = paged.row(row)
        keys = keys.repeat_interleave(paged.heads // paged.kv_heads, 1)
        values = values.repeat_interleave(paged.heads // paged.kv_heads, 1)
        start = int(paged.starts[row])
        scores = torch.einsum("qhd,khd->hqk", queries[start : start + new], keys) * paged.dim**-0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(old, old + new)[:, None] - torch.arange(old + new)
        seen = (distance >= 0) & (distance < (window or old + new))
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            column = sinks[:, None, None].expand(-1, new, 1)
            scores = torch.cat((scores, column), -1)
        weights = scores.softmax(-1)[..., : old + new]
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(9, 3, 64), (8, 8, 128), (20, 1, 16), (4, 2, 80), (16, 2, 256)], ids=str
)
@pytest.mark.parametrize(
    "lengths",
    [
        [(0, 1), (200, 1), (3, 1), (64, 1)],
        [(0, 0), (0, 70), (37, 1), (100, 29), (15, 2), (7, 0)],
        [(2600, 1)],
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "variant",
    [Variant(), Variant(33, 0.0, True), Variant(0, 5.0, False), Variant(1, 3.0, True)],
    ids=str,
)
def test_attention(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    lengths: list[tuple[int, int]],
    variant: Variant,
) -> None:
    paged = Paged(lengths, shape=shape, dtype=dtype)
    heads, kv_heads, dim = shape
    queries = torch.randn(len(paged.positions), heads, dim)
    sinks = torch.randn(heads) if variant.has_sinks else None
    address = None if sinks is None else sinks.data_ptr()
    described = native.Heads(
        heads, kv_heads, dim, variant.window, dim**-0.5, variant.softcap, address
    )
    found = torch.full_like(queries, torch.nan)
    library().nv_attend(
        queries.data_ptr(),
        heads * dim,
        ctypes.byref(described),
        ctypes.byref(paged.native_cache),
        ctypes.byref(paged.batch),
        found.data_ptr(),
    )
    expected = naive_attention(queries, paged, variant, sinks)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normed", ["nothing", "each head", "all heads"])
@pytest.mark.parametrize("dim", [16, 64, 80])
def test_rope_and_cache(dtype: torch.dtype, normed: str, dim: int) -> None:
    paged = Paged([(3, 2), (0, 0), (40, 9)], shape=(6, 2, dim), dtype=dtype)
    before = paged.cache.clone()
    num_tokens = len(paged.positions)
    qkv = torch.randn(num_tokens, 10 * dim)
    angles = torch.outer(torch.arange(64.0), torch.rand(dim // 2))
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    has_norms, norms_all = normed != "nothing", normed == "all heads"
    counts = (6, 2) if norms_all else (1, 1)  # of heads that are normed as one
    norms = [torch.rand(count * dim) + 0.5 for count in counts]
    growth = torch.rand(64) + 0.5
    heads = qkv.clone().view(num_tokens, 10, dim)
    queries, keys, values = heads[:, :6], heads[:, 6:8], heads[:, 8:]
    if has_norms:
        queries, keys = (
            torch.nn.functional.rms_norm(x.view(-1, len(norm)), norm.shape, norm, 1e-6).view_as(x)
            for x, norm in zip((queries.clone(), keys.clone()), norms, strict=True)
        )
    queries = queries * growth[paged.positions][:, None, None]
    cos, sin = cos_sin[paged.positions][:, None].chunk(2, -1)

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    paged.slots[-1] = -1  # a token whose keys are not kept
    rope = native.Rope(
        cos_sin.data_ptr(),
        *(norm.data_ptr() if has_norms else None for norm in norms),
        growth.data_ptr(),
        1e-6,
        norms_all,
    )
    shape = native.Heads(6, 2, dim, 0, 1.0, 0.0, None)
    library().nv_rope_and_cache(
        qkv.data_ptr(),
        qkv.stride(0),
        ctypes.byref(rope),
        ctypes.byref(shape),
        ctypes.byref(paged.native_cache),
        ctypes.byref(paged.batch),
    )
    torch.testing.assert_close(qkv.view_as(heads)[:, :6], rotated(queries), rtol=1e-5, atol=1e-5)
    slots = paged.slots[:-1]
    expected = before.flatten(1, 2)
    expected[0, slots], expected[1, slots] = rotated(keys)[:-1].to(dtype), values[:-1].to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # a unit in the last place of bfloat16
    torch.testing.assert_close(
        paged.cache.flatten(1, 2).float(), expected.float(), rtol=tolerance, atol=tolerance
    )
