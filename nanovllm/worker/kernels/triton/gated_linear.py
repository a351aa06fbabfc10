"""The gated product of many tokens, activation(gate) * up, whose halves never go to memory.

`TritonKernels.mlp` calls `gated_linear` where it `can_gate`. A program takes tile after tile, as
in Triton's tutorial on persistent matmuls: while it gates and stores one, the copy engine (TMA)
brings the first inputs of the next.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.checkpoint.spec import Activation
from nanovllm.worker.kernels.triton.activations import activated
from nanovllm.worker.kernels.triton.launch import (
    has_tensor_memory_accelerator,
    launch_options,
    num_multiprocessors,
)
from nanovllm.worker.layers.linear import Linear

MIN_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class GatedTile:
    """What a program computes at a time: block_m tokens, block_n outputs, each a gate and an up."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    programs_per_sm: int | None = 1  # None: as many as tiles, each of which ends its program


FEWER, CHOSEN = GatedTile(128, 64, 64, 5, warps=8), GatedTile(128, 128, 64, 3, warps=8)


@triton.jit
def _tile_at(index, num_m, num_n, GROUP: tl.constexpr):
    """Row and column of a tile. GROUP rows go from column to column together, so that programs
    which run together share what they read."""
    group = index // (GROUP * num_n)
    height = tl.minimum(num_m - group * GROUP, GROUP)
    within = index % (GROUP * num_n)
    return group * GROUP + within % height, within // height


@triton.jit(do_not_specialize=["num_tokens"])
def _gated_kernel(
    x_desc,  # [num_tokens, K], boxes [BLOCK_M, BLOCK_K]
    weight_desc,  # [2, num_outputs, K], gates and ups; boxes [2, BLOCK_N, BLOCK_K]
    out_desc,  # [num_tokens, num_outputs], boxes [BLOCK_M, BLOCK_N]
    num_tokens, num_outputs,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gates and ups of a tile are one product, side by side in one accumulator."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    num_m, num_n = tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(num_outputs, BLOCK_N)
    for index in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = _tile_at(index, num_m, num_n, GROUP)
        token, output = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([token, k])
            w = tl.reshape(weight_desc.load([0, output, k]), [2 * BLOCK_N, BLOCK_K])
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        both = tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N]), [0, 2, 1])
        gate, up = tl.split(both)
        dtype = x_desc.dtype
        gate = activated(gate.to(dtype).to(tl.float32), ACTIVATION).to(dtype)  # as it alone rounds
        out_desc.store([token, output], gate * up.to(dtype))


def can_gate(x: Tensor, linear: Linear) -> bool:
    """Whether `gated_linear` can multiply these, and there are enough tokens to make it faster.

    The copy engine needs rows of whole 16 bytes.
    """
    weight = linear.weight
    plain = linear.bias is None and x.dtype == weight.dtype
    is_half = weight.dtype in (torch.bfloat16, torch.float16)
    is_whole = weight.shape[0] % 16 == 0 and weight.shape[1] % 8 == 0
    can = plain and is_half and is_whole and has_tensor_memory_accelerator(weight.device)
    return can and len(x) >= MIN_TOKENS


def gated_linear(
    x: Tensor, linear: Linear, activation: Activation = "silu", *, tile: GatedTile | None = None
) -> Tensor:
    """activation(gate) * up, [num_tokens, num_outputs], of the layer's outputs: gates, then ups.

    x: [num_tokens, num_inputs].
    """
    num_tokens, num_inputs = x.shape
    num_outputs = len(linear.weight) // 2
    # Of fewer tiles, small ones keep more of the device busy.
    tile = tile or (CHOSEN if num_tokens * num_outputs >= 6 * 2**20 else FEWER)
    halves = linear.weight.view(2, num_outputs, num_inputs)
    assert x.is_contiguous() and halves.is_contiguous()
    out = x.new_empty(num_tokens, num_outputs)
    programs = triton.cdiv(num_tokens, tile.block_m) * triton.cdiv(num_outputs, tile.block_n)
    if tile.programs_per_sm is not None:
        programs = min(programs, num_multiprocessors(x.device) * tile.programs_per_sm)
    _gated_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(halves, [2, tile.block_n, tile.block_k]),
        TensorDescriptor.from_tensor(out, [tile.block_m, tile.block_n]),
        num_tokens, num_outputs,
        K=num_inputs, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP=8,
        ACTIVATION=activation,
        num_stages=tile.stages, num_warps=tile.warps, **launch_options(x.device),
    )  # fmt: skip
    return out
