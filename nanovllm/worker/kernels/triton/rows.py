"""What is done to each token's row by itself: norms, SiLU · mul, and quantizing it to e4m3.

`products` and `layer_kernels` call these around products. Every kernel computes in fp32 and rounds
where plain torch in the model's dtype would have to store, so both mean the same numbers.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.worker.kernels.triton.e4m3 import quantized
from nanovllm.worker.kernels.triton.launch import launch_options
from nanovllm.worker.kernels.triton.skinny_linear import silu
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.quant import fp8
from nanovllm.worker.quant.scaled_rows import QuantizedRows

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
    CENTERS: tl.constexpr,
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
        if CENTERS:
            x = tl.where(inside, x - tl.sum(x, 0) / size, 0.0)
        x *= tl.rsqrt(tl.sum(x * x, 0) / size + eps)
        if weight.dtype.element_ty == dtype:
            x = x.to(dtype).to(tl.float32)  # rounded before the weight, as Llama's norms are
        x = (x * factors).to(dtype)
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


def rms_norm(hidden: Tensor, norm: RMSNorm) -> Tensor:
    """hidden: [num_tokens, size], contiguous. Returns new memory."""
    out = torch.empty_like(hidden)
    _launch_rows(hidden, QuantizedRows(out, out), norm=norm)
    return out


def quantize(hidden: Tensor, norm: RMSNorm | None = None) -> QuantizedRows:
    """As `quant.fp8.quantize_rows`, of norm(hidden) if there is one."""
    rows = _empty_rows(hidden, hidden.shape[1])
    _launch_rows(hidden, rows, norm=norm)
    return rows


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [num_tokens, 2 * size], gates first. Returns new memory."""
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    _launch_silu(gate_up, QuantizedRows(out, out), block=SILU_BLOCK)
    return out


def silu_and_mul_fp8(gate_up: Tensor) -> QuantizedRows:
    """`silu_and_mul`, quantized per token; a program takes a whole row to know its peak."""
    size = gate_up.shape[1] // 2
    rows = _empty_rows(gate_up, size)
    _launch_silu(gate_up, rows, block=triton.next_power_of_2(size))
    return rows


def _empty_rows(like: Tensor, size: int) -> QuantizedRows:
    values = like.new_empty(len(like), size, dtype=fp8.E4M3)
    return QuantizedRows(values, like.new_empty(len(like), 1, dtype=torch.float32))


def _warps(block: int) -> int:
    return min(max(block // 256, 1), 16)  # 8 elements (16 bytes) a thread and load


def _launch_rows(hidden: Tensor, out: QuantizedRows, *, norm: RMSNorm | None) -> None:
    """Norm and quantize, whichever `norm` and the type of `out` ask for."""
    num_tokens, size = hidden.shape
    assert hidden.is_contiguous()
    weight, eps = (hidden, 0.0) if norm is None else (norm.weight, norm.eps)
    block = triton.next_power_of_2(size)
    _rows_kernel[(num_tokens,)](
        hidden, weight, *out, eps, size,
        BLOCK=block, NORM=norm is not None, CENTERS=norm is not None and norm.centers,
        QUANTIZE=out.values.dtype == fp8.E4M3,
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
