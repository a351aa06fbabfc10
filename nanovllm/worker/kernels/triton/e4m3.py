"""Between e4m3 and the precisions kernels compute in: what all Triton kernels share."""
# ruff: noqa: N803

import triton
import triton.language as tl

from nanovllm.worker.quant import fp8, scaled_rows

E4M3_MAX = tl.constexpr(fp8.E4M3_MAX)
LEAST_PEAK = tl.constexpr(scaled_rows.LEAST_PEAK)


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """x as DTYPE keeps it: in e4m3 larger numbers would become NaN."""
    if tl.float8e4nv == DTYPE:
        x = tl.clamp(x.to(tl.float32), -E4M3_MAX, E4M3_MAX)
    return x.to(DTYPE)


@triton.jit
def quantized(x):
    """x [..., size] in e4m3, and the scale of each row, [..., 1] fp32: as `fp8.quantize_rows`."""
    wide = x.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(wide), -1, keep_dims=True), LEAST_PEAK) / E4M3_MAX
    return narrowed(wide / scale, tl.float8e4nv), scale


@triton.jit
def widened(x, DTYPE: tl.constexpr):
    """x, perhaps of e4m3, as DTYPE.

    A GPU turns two e4m3 numbers at once into float16, and from there each by a slow instruction of
    its own into bfloat16, unless it goes by way of float32.
    """
    if x.dtype == tl.float8e4nv and tl.bfloat16 == DTYPE:
        x = x.to(tl.float16).to(tl.float32)
    return x.to(DTYPE)


@triton.constexpr_function
def multiplied_as(dtype, cached):
    """In which type decoding queries meet cached keys: from e4m3 float16 is one instruction away,
    and holds all its numbers, and queries of up to 65,504."""
    return tl.float16 if cached == tl.float8e4nv and dtype == tl.bfloat16 else dtype
