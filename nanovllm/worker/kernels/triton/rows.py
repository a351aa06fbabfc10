"""What is done to each token's row by itself: norms, gates, and quantizing it to e4m3.

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

from nanovllm.checkpoint.spec import Activation
from nanovllm.worker.kernels.triton.activations import activated
from nanovllm.worker.kernels.triton.e4m3 import quantized
from nanovllm.worker.kernels.triton.launch import launch_options
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.quant import fp8
from nanovllm.worker.quant.fp8 import QuantizedGroups
from nanovllm.worker.quant.scaled_rows import QuantizedRows

GATE_BLOCK = 1024


@triton.jit
def _store_row(row, columns, inside, out, out_scale, token, size, BLOCK: tl.constexpr,
               GROUP: tl.constexpr):  # fmt: skip
    """A token's row, [BLOCK] in the precision it has, or in e4m3 with a scale for each GROUP."""
    if GROUP > 0:
        row, scale = quantized(tl.reshape(row, [BLOCK // GROUP, GROUP]))
        row = tl.reshape(row, [BLOCK])
        groups = tl.arange(0, BLOCK // GROUP)[:, None]
        scales = out_scale + groups * tl.num_programs(0) + token
        tl.store(scales, scale, groups * GROUP < size)
    tl.store(out + token * size + columns, row, inside)


@triton.jit
def normed_row(x, weight, factors, inside, eps, size, CENTERS: tl.constexpr):
    """A token's row, [BLOCK], in the precision it has. factors: the loaded weight, fp32."""
    dtype = x.dtype
    x = x.to(tl.float32)
    if CENTERS:
        x = tl.where(inside, x - tl.sum(x, 0) / size, 0.0)
    x *= tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    if weight.dtype.element_ty == dtype and not CENTERS:
        x = x.to(dtype).to(tl.float32)  # rounded before the weight, as Llama's norms are
    return (x * factors).to(dtype)


@triton.jit
def _rows_kernel(
    hidden,  # [num_tokens, size]
    weight,  # [size]
    out,  # like hidden; e4m3 if quantized
    out_scale,  # [groups, num_tokens] fp32, if quantized
    eps,
    size,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    CENTERS: tl.constexpr,
    GROUP: tl.constexpr,
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
        x = normed_row(x, weight, factors, inside, eps, size, CENTERS)
    _store_row(x, columns, inside, out, out_scale, token, size, BLOCK, GROUP)


@triton.jit
def _add_normed_kernel(
    product,  # [num_tokens, size]
    residual,  # like product; the sum is written over it
    weight,  # [size], of the product's norm
    next_weight,  # [size], of the norm that comes next; perhaps None, like next_out
    next_out,  # like product
    eps, next_eps, size,
    BLOCK: tl.constexpr, CENTERS: tl.constexpr, NEXT_CENTERS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program per token: residual + norm(product), and what the next norm makes of it."""
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    factors = tl.load(weight + columns, inside, other=0.0).to(tl.float32)
    if next_weight is not None:
        next_factors = tl.load(next_weight + columns, inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    places = tl.program_id(0).to(tl.int64) * size + columns
    x = tl.load(product + places, inside, other=0.0)
    before = tl.load(residual + places, inside, other=0.0).to(tl.float32)
    x = normed_row(x, weight, factors, inside, eps, size, CENTERS)
    x = (x.to(tl.float32) + before).to(residual.dtype.element_ty)
    tl.store(residual + places, x, inside)
    if next_weight is not None:
        x = normed_row(x, next_weight, next_factors, inside, next_eps, size, NEXT_CENTERS)
        tl.store(next_out + places, x, inside)


@triton.jit
def _act_and_mul_kernel(
    gate_up,  # [num_tokens, 2 * size]
    out,  # [num_tokens, size]; e4m3 if quantized
    out_scale,  # [num_tokens] fp32, if quantized
    size,
    BLOCK: tl.constexpr,  # all of size, if quantized
    ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr,
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
    gate = activated(gate, ACTIVATION).to(up.dtype)  # rounded, as it alone would be
    _store_row(gate * up, columns, inside, out, out_scale, token, size, BLOCK, GROUP)


def rms_norm(hidden: Tensor, norm: RMSNorm) -> Tensor:
    """hidden: [num_tokens, size], contiguous. Returns new memory."""
    out = torch.empty_like(hidden)
    _launch_rows(hidden, QuantizedRows(out, out), norm=norm)
    return out


def add_normed(
    product: Tensor, residual: Tensor, norm: RMSNorm, next_norm: RMSNorm | None
) -> Tensor | None:
    """Adds norm(product) to the residual, in place; both [num_tokens, size], contiguous. Returns
    what the norm that comes next makes of the sum, in new memory."""
    num_tokens, size = product.shape
    assert product.is_contiguous() and residual.is_contiguous()
    out = None if next_norm is None else torch.empty_like(residual)
    block = triton.next_power_of_2(size)
    _add_normed_kernel[(num_tokens,)](
        product, residual, norm.weight, None if next_norm is None else next_norm.weight, out,
        norm.eps, 0.0 if next_norm is None else next_norm.eps, size,
        BLOCK=block, CENTERS=norm.centers, NEXT_CENTERS=next_norm is not None and next_norm.centers,
        # Else a product of half precision and the sum after it become one, which rounds once.
        enable_fp_fusion=False,
        num_warps=num_warps_for(block), **launch_options(product.device),
    )  # fmt: skip
    return out


def quantize(hidden: Tensor, norm: RMSNorm | None = None) -> QuantizedRows:
    """As `quant.fp8.quantize_rows`, of norm(hidden) if there is one."""
    rows = _empty_rows(hidden, hidden.shape[1])
    _launch_rows(hidden, rows, norm=norm)
    return rows


def quantize_groups(hidden: Tensor, group: int, norm: RMSNorm | None = None) -> QuantizedGroups:
    """The same with a scale for each `group` of a token's numbers."""
    num_tokens, size = hidden.shape
    assert size % group == 0
    scale = hidden.new_empty(size // group, num_tokens, dtype=torch.float32)
    groups = QuantizedGroups(hidden.new_empty(num_tokens, size, dtype=fp8.E4M3), scale)
    _launch_rows(hidden, groups, norm=norm, group=group)
    return groups


def act_and_mul(gate_up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up of [num_tokens, 2 * size], gates first. Returns new memory."""
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    _launch_gate(gate_up, activation, QuantizedRows(out, out), block=GATE_BLOCK)
    return out


def act_and_mul_fp8(gate_up: Tensor, activation: Activation) -> QuantizedRows:
    """`act_and_mul`, quantized per token; a program takes a whole row to know its peak."""
    size = gate_up.shape[1] // 2
    rows = _empty_rows(gate_up, size)
    _launch_gate(gate_up, activation, rows, block=triton.next_power_of_2(size))
    return rows


def _empty_rows(like: Tensor, size: int) -> QuantizedRows:
    values = like.new_empty(len(like), size, dtype=fp8.E4M3)
    return QuantizedRows(values, like.new_empty(len(like), 1, dtype=torch.float32))


def num_warps_for(block: int) -> int:
    return min(max(block // 256, 1), 16)  # 8 elements (16 bytes) a thread and load


def _launch_rows(
    hidden: Tensor,
    out: QuantizedRows | QuantizedGroups,
    *,
    norm: RMSNorm | None,
    group: int | None = None,
) -> None:
    """Norm and quantize, whichever `norm` and the type of `out` ask for. group: whole rows."""
    num_tokens, size = hidden.shape
    assert hidden.is_contiguous()
    weight, eps = (hidden, 0.0) if norm is None else (norm.weight, norm.eps)
    block = triton.next_power_of_2(size)
    _rows_kernel[(num_tokens,)](
        hidden, weight, *out, eps, size,
        BLOCK=block, NORM=norm is not None, CENTERS=norm is not None and norm.centers,
        GROUP=(group or block) if out.values.dtype == fp8.E4M3 else 0,
        num_warps=num_warps_for(block), **launch_options(hidden.device),
    )  # fmt: skip


def _launch_gate(
    gate_up: Tensor, activation: Activation, out: QuantizedRows, *, block: int
) -> None:
    num_tokens, size = out.values.shape
    assert gate_up.is_contiguous()
    _act_and_mul_kernel[(num_tokens, triton.cdiv(size, block))](
        gate_up, *out, size,
        BLOCK=block, ACTIVATION=activation,
        GROUP=block if out.values.dtype == fp8.E4M3 else 0,
        num_warps=num_warps_for(block), **launch_options(gate_up.device),
    )  # fmt: skip
