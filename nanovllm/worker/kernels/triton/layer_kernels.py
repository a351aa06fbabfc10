"""The elementwise maths of a decoder as fused Triton kernels (`base.Kernels`), for CUDA.

Layers call one `TritonKernels`, chosen at start. Every kernel computes in fp32 and rounds where
plain torch in the model's dtype would have to store, so both backends mean the same numbers.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.worker.kernels.base import QKNorm, Stream
from nanovllm.worker.kernels.triton.e4m3 import narrowed, quantized
from nanovllm.worker.kernels.triton.gated_linear import can_gate, gated_linear
from nanovllm.worker.kernels.triton.launch import converts_fp8, launch_options
from nanovllm.worker.kernels.triton.linear_tuning import beats_cublas
from nanovllm.worker.kernels.triton.skinny_linear import silu, skinny_add, skinny_linear
from nanovllm.worker.layers.linear import UNQUANTIZED, Linear
from nanovllm.worker.quant import fp8
from nanovllm.worker.quant.fp8 import Fp8, QuantizedRows

ROPE_HEADS = 8  # heads per program
SILU_BLOCK = 1024


@triton.jit
def _store_row(row, columns, inside, out, out_scale, token, size, QUANTIZE: tl.constexpr):
    """A token's row, [BLOCK] in the precision it has; if asked for, quantized to e4m3."""
    if QUANTIZE:
        row, scale = quantized(row)
        tl.store(out_scale + token + tl.arange(0, 1), scale)
    tl.store(out + token * size + columns, row, inside)


@triton.jit
def _rows_kernel(
    hidden,  # [num_tokens, size]
    weight,  # [size]
    out,  # like hidden; e4m3 if QUANTIZE
    out_scale,  # [num_tokens] fp32, if QUANTIZE
    eps,
    size,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    QUANTIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program per token: norm, quantize, or both."""
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    if NORM:
        factors = tl.load(weight + columns, inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    x = tl.load(hidden + token * size + columns, inside, other=0.0)
    if NORM:
        dtype = x.dtype
        x = x.to(tl.float32)
        x *= tl.rsqrt(tl.sum(x * x, 0) / size + eps)
        # Rounded before the weight, as Hugging Face's norms are.
        x = (x.to(dtype).to(tl.float32) * factors).to(dtype)
    _store_row(x, columns, inside, out, out_scale, token, size, QUANTIZE)


@triton.jit
def _silu_and_mul_kernel(
    gate_up,  # [num_tokens, 2 * size]
    out,  # [num_tokens, size]; e4m3 if QUANTIZE
    out_scale,  # [num_tokens] fp32, if QUANTIZE
    size,
    BLOCK: tl.constexpr,  # all of size, if QUANTIZE
    QUANTIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(gate_up + token * 2 * size + columns, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (token * 2 + 1) * size + columns, inside, other=0.0)
    gate = silu(gate).to(up.dtype)  # rounded, as silu alone would be
    _store_row(gate * up, columns, inside, out, out_scale, token, size, QUANTIZE)


@triton.jit
def normed(first, second, weight, lanes, inside, eps, HALF: tl.constexpr):
    """RMS norm of heads given in halves, [heads, lanes] fp32 each."""
    square = tl.sum(first * first + second * second, 1) / (2 * HALF)
    scale = tl.rsqrt(square + eps)[:, None]
    dtype = weight.dtype.element_ty
    first_weight = tl.load(weight + lanes, inside, other=0.0).to(tl.float32)
    second_weight = tl.load(weight + HALF + lanes, inside, other=0.0).to(tl.float32)
    first = (first * scale).to(dtype).to(tl.float32) * first_weight[None, :]
    second = (second * scale).to(dtype).to(tl.float32) * second_weight[None, :]
    return first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)


@triton.jit
def _normed_by_kind(first, second, is_query, q_weight, k_weight, lanes, inside, eps,
                    NUM_HEADS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """Queries, if there are any, by one weight, all other heads by the other."""
    k_first, k_second = normed(first, second, k_weight, lanes, inside, eps, HALF)
    if NUM_HEADS > 0:
        q_first, q_second = normed(first, second, q_weight, lanes, inside, eps, HALF)
        k_first = tl.where(is_query, q_first, k_first)
        k_second = tl.where(is_query, q_second, k_second)
    return k_first, k_second


@triton.jit
def rotated(first, second, cos, sin):
    """Heads given in halves, [heads, lanes] fp32 each, turned by the angles of their tokens."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _rope_and_cache_kernel(
    qkv,  # [num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * 2 * HALF]; rotated in place
    token_stride,
    cos_sin,  # [max_positions, 2 * HALF] fp32
    positions,  # [num_tokens] int64
    slot_mapping,  # [num_tokens] int64
    cache,  # keys [num_slots, NUM_KV_HEADS, 2 * HALF]; values lie value_offset elements behind
    value_offset: tl.int64,
    q_weight, k_weight, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    HEADS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program takes HEADS heads of one token: queries, then keys, then values, as qkv has them.

    Values pass through the arithmetic, unchanged, so that no program needs to know what it holds.
    Keys and values are left in qkv as a reader of the cache would find them; of tokens that are not
    cached as zeros, as tiles of a row's keys reach beyond its end, and 0 * NaN is NaN.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < HALF
    is_query = (heads < NUM_HEADS)[:, None]
    rotates = (heads < NUM_HEADS + NUM_KV_HEADS)[:, None]
    kv_heads = heads[:, None] - tl.where(rotates, NUM_HEADS, NUM_HEADS + NUM_KV_HEADS)
    real = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & inside[None, :]
    source = qkv + token * token_stride + heads[:, None] * (2 * HALF) + lanes[None, :]
    raw_first = tl.load(source, real, other=0.0)
    raw_second = tl.load(source + HALF, real, other=0.0)
    first, second = raw_first.to(tl.float32), raw_second.to(tl.float32)
    if NORM:
        first, second = _normed_by_kind(first, second, is_query, q_weight, k_weight, lanes, inside,
                                        eps, NUM_HEADS, HALF)  # fmt: skip
    dtype = qkv.dtype.element_ty
    angles = cos_sin + tl.load(positions + token) * (2 * HALF) + lanes
    cos = tl.load(angles, inside, other=0.0)[None, :]
    sin = tl.load(angles + HALF, inside, other=0.0)[None, :]
    first, second = rotated(first, second, cos, sin)
    new_first = tl.where(rotates, first.to(dtype), raw_first)
    new_second = tl.where(rotates, second.to(dtype), raw_second)
    cached = cache.dtype.element_ty
    if cached != dtype:  # values change, too
        rotates = heads[:, None] >= 0
        new_first = tl.where(is_query, new_first, narrowed(new_first, cached).to(dtype))
        new_second = tl.where(is_query, new_second, narrowed(new_second, cached).to(dtype))
    slot = tl.load(slot_mapping + token)  # negative: not to be cached
    lost = ~is_query & (slot < 0)
    tl.store(source, tl.where(lost, 0.0, new_first).to(dtype), real & (rotates | lost))
    tl.store(source + HALF, tl.where(lost, 0.0, new_second).to(dtype), real & (rotates | lost))
    kept = real & ~is_query & ~lost
    target = cache + (slot * NUM_KV_HEADS + kv_heads) * (2 * HALF) + lanes[None, :]
    target += tl.where(heads[:, None] < NUM_HEADS + NUM_KV_HEADS, 0, value_offset)
    # Narrowed once more: of e4m3 numbers that are stored and widened as well, ptxas 12.8 widens
    # every second pair from a register that holds something else.
    tl.store(target, narrowed(new_first, cached), kept)
    tl.store(target + HALF, narrowed(new_second, cached), kept)


def _fp8(linear: Linear) -> Fp8 | None:
    """The method of an FP8 layer whose numbers kernels here can read and make."""
    method = linear.method
    return method if isinstance(method, Fp8) and converts_fp8(linear.weight.device) else None


def _is_skinny(x: Tensor, linear: Linear, *, gated: bool = False) -> bool:
    """Whether our own product can take this one over, and is faster."""
    plain = linear.method is UNQUANTIZED and x.dtype == linear.weight.dtype
    ours = plain or _fp8(linear) is not None
    return ours and beats_cublas(len(x), linear.weight, gated=gated)


class TritonKernels:
    """Implements `Kernels`; stateless. Tensors' last dimensions must be contiguous.

    A few tokens go through our own products, which take norms, gate and residual along, and with
    FP8 weights quantize what they multiply. More go through cuBLAS: in the model's precision with
    the residual, in FP8 with tokens quantized by the kernel before. Other methods do as they do.
    Of a prompt's tokens the gated product is ours again (`gated_linear`).
    """

    def rms_norm(self, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Returns new memory."""
        out = torch.empty_like(hidden)
        _launch_rows(hidden, QuantizedRows(out, out), norm=(weight, eps))
        return out

    def norm_linear(self, stream: Stream, weight: Tensor, eps: float, linear: Linear) -> Tensor:
        if _is_skinny(stream.hidden, linear):
            return self._skinny(stream, (weight, eps), linear, gated=False)
        return self._wide(stream.hidden, (weight, eps), linear)

    def linear_add(
        self, hidden: Tensor, linear: Linear, stream: Tensor, next_norm: Tensor
    ) -> Stream:
        if _is_skinny(hidden, linear):
            return skinny_add(hidden, linear, stream, next_norm=next_norm)
        if linear.method is UNQUANTIZED and linear.bias is None:
            return Stream(stream.addmm_(hidden, linear.weight.t()))
        if (method := _fp8(linear)) is not None:
            product = method.multiply(linear, self.quantize(hidden), hidden.dtype)
            return Stream(stream.add_(product))
        return Stream(stream.add_(linear(hidden)))

    def mlp(
        self,
        stream: Stream,
        weight: Tensor,
        eps: float,
        gate_up: Linear,
        down: Linear,
        next_norm: Tensor,
    ) -> Stream:
        hidden = stream.hidden
        if _is_skinny(hidden, gate_up, gated=True):
            inner = self._skinny(stream, (weight, eps), gate_up, gated=True)
            return self.linear_add(inner, down, hidden, next_norm)
        if can_gate(hidden, gate_up):
            inner = gated_linear(self.rms_norm(hidden, weight, eps), gate_up)
            return self.linear_add(inner, down, hidden, next_norm)
        product = self._wide(hidden, (weight, eps), gate_up)
        if (method := _fp8(down)) is None or beats_cublas(len(hidden), down.weight):
            return self.linear_add(self.silu_and_mul(product), down, hidden, next_norm)
        rows = self.silu_and_mul_fp8(product)
        return Stream(hidden.add_(method.multiply(down, rows, hidden.dtype)))

    def _skinny(
        self, stream: Stream, norm: tuple[Tensor, float], linear: Linear, *, gated: bool
    ) -> Tensor:
        """Norm and product of a few tokens; in one kernel if the stream comes weighed."""
        if stream.weighed is None:
            return skinny_linear(self.rms_norm(stream.hidden, *norm), linear, gated=gated)
        values, squares = stream.weighed
        return skinny_linear(values, linear, norm=(squares, norm[1]), gated=gated)

    def _wide(self, hidden: Tensor, norm: tuple[Tensor, float], linear: Linear) -> Tensor:
        """Norm and product of many tokens."""
        if (method := _fp8(linear)) is not None:
            return method.multiply(linear, self.quantize(hidden, norm), hidden.dtype)
        return linear(self.rms_norm(hidden, *norm))

    def quantize(self, hidden: Tensor, norm: tuple[Tensor, float] | None = None) -> QuantizedRows:
        """As `quant.fp8.quantize_rows`, of rms_norm(hidden) if norm (weight and eps) is given."""
        rows = _empty_rows(hidden, hidden.shape[1])
        _launch_rows(hidden, rows, norm=norm)
        return rows

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """Returns new memory."""
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        _launch_silu(gate_up, QuantizedRows(out, out), block=SILU_BLOCK)
        return out

    def silu_and_mul_fp8(self, gate_up: Tensor) -> QuantizedRows:
        """`silu_and_mul`, quantized per token; a program takes a whole row to know its peak."""
        size = gate_up.shape[1] // 2
        rows = _empty_rows(gate_up, size)
        _launch_silu(gate_up, rows, block=triton.next_power_of_2(size))
        return rows

    def rope_and_cache(
        self,
        qkv: Tensor,
        *,
        cos_sin: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        layer_cache: Tensor,
        qk_norm: QKNorm | None,
    ) -> Tensor:
        """Rotates where they lie: what returns is a view of `qkv`."""
        num_kv_heads, head_dim = layer_cache.shape[-2:]
        num_tokens, num_all = qkv.shape[0], qkv.shape[1] // head_dim
        num_heads = num_all - 2 * num_kv_heads
        assert qkv.stride(1) == 1 and layer_cache[0].is_contiguous() and cos_sin.is_contiguous()
        heads = min(ROPE_HEADS, triton.next_power_of_2(num_all))
        _rope_and_cache_kernel[(num_tokens, triton.cdiv(num_all, heads))](
            qkv,
            qkv.stride(0),
            cos_sin,
            positions,
            slot_mapping,
            layer_cache,
            layer_cache.stride(0),
            qkv if qk_norm is None else qk_norm.q_weight,
            qkv if qk_norm is None else qk_norm.k_weight,
            0.0 if qk_norm is None else qk_norm.eps,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HALF=head_dim // 2,
            BLOCK=triton.next_power_of_2(head_dim // 2),
            HEADS=heads,
            NORM=qk_norm is not None,
            num_warps=2,
            **launch_options(qkv.device),
        )
        return qkv.view(num_tokens, num_all, head_dim)[:, :num_heads]


def _empty_rows(like: Tensor, size: int) -> QuantizedRows:
    values = like.new_empty(len(like), size, dtype=fp8.E4M3)
    return QuantizedRows(values, like.new_empty(len(like), 1, dtype=torch.float32))


def _warps(block: int) -> int:
    return min(max(block // 256, 1), 16)  # 8 elements (16 bytes) a thread and load


def _launch_rows(hidden: Tensor, out: QuantizedRows, *, norm: tuple[Tensor, float] | None) -> None:
    """Norm and quantize, whichever `norm` and the type of `out` ask for."""
    num_tokens, size = hidden.shape
    assert hidden.is_contiguous()
    weight, eps = norm or (hidden, 0.0)
    block = triton.next_power_of_2(size)
    _rows_kernel[(num_tokens,)](
        hidden, weight, *out, eps, size,
        BLOCK=block, NORM=norm is not None, QUANTIZE=out.values.dtype == fp8.E4M3,
        num_warps=_warps(block), **launch_options(hidden.device),
    )  # fmt: skip


def _launch_silu(gate_up: Tensor, out: QuantizedRows, *, block: int) -> None:
    num_tokens, size = out.values.shape
    assert gate_up.is_contiguous()
    _silu_and_mul_kernel[(num_tokens, triton.cdiv(size, block))](
        gate_up, *out, size,
        BLOCK=block, QUANTIZE=out.values.dtype == fp8.E4M3,
        num_warps=_warps(block), **launch_options(gate_up.device),
    )  # fmt: skip
