"""MXFP4 weights: floats of 4 bits, and for each 32 inputs of an output a power of two.

A `LinearMethod` for weights alone; tokens stay as they are. Formats as in "OCP Microscaling Formats
(MX) Specification", 2023: e2m1 numbers, two in a byte; e8m0 scales. Kept are 16 bytes for a scale,
the first 16 inputs in their lower halves: so kernels find neighbours together, as in GGUF files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nanovllm.checkpoint.gguf import GGUFTensor
from nanovllm.checkpoint.quantization import WeightFormat
from nanovllm.worker.layers.linear import Linear, WeightSlot
from nanovllm.worker.parallel import Cut
from nanovllm.worker.quant.packed import pack_nibbles, unpack_nibbles

KIND = "mxfp4"
BLOCK = 32  # inputs that share a scale
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of e2m1; the bit above them is the sign
BIAS = 127  # of scales' exponents
PEAK_EXPONENT = 2  # of the largest magnitude


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """`linear.weight` [out_features, in_features / 2] (as of `packed.pack_nibbles`) and
    `linear.scale` [out_features, in_features / 32] are bytes."""

    kept: WeightFormat
    kind: ClassVar[str] = KIND

    def create(self, linear: Linear, device: torch.device) -> None:
        num_outputs, num_inputs = linear.weight.shape
        if num_inputs % BLOCK:
            raise ValueError(
                f"config.json: MXFP4 weights have blocks of {BLOCK} inputs, and a layer has "
                f"{num_inputs}, or tensor_parallel_size leaves so many of them"
            )
        shape = num_outputs, num_inputs // BLOCK
        linear.weight = torch.empty(num_outputs, num_inputs // 2, dtype=torch.uint8, device=device)
        linear.scale = torch.empty(shape, dtype=torch.uint8, device=device)
        linear.allocate_bias(device)

    def slots(self, linear: Linear) -> Iterator[WeightSlot]:
        assert linear.scale is not None
        for part, cut, rows in linear.rows():
            weight, scale, inputs = linear.weight[rows], linear.scale[rows], linear.inputs
            if self.kept.layout == "gguf":
                keep = partial(_keep_blocks, weight, scale)
                values = torch.empty(weight.shape[0], inputs.size, device="meta")
                yield WeightSlot(part, "weight", values, (cut, inputs), keep=keep)
            elif self.kept.is_stored:
                blocks = Cut(*(size // BLOCK for size in inputs))
                halves = Cut.all_of(BLOCK // 2)
                target, piece = weight.view(len(weight), -1, BLOCK // 2), (cut, blocks, halves)
                put = partial(_put_blocks, target)
                yield WeightSlot(part, "blocks", target, piece, dtype=torch.uint8, put=put)
                yield WeightSlot(part, "scales", scale, (cut, blocks), dtype=torch.uint8)
            else:
                put = partial(_put_rounded, weight, scale)
                values = torch.empty(weight.shape[0], inputs.size, device="meta")
                yield WeightSlot(part, "weight", values, (cut, inputs), put=put)
            yield from linear.bias_slots(part, cut, rows)

    def tensors(self, linear: Linear) -> Iterator[Tensor]:
        assert linear.scale is not None
        yield from (linear.weight, linear.scale)

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        assert linear.scale is not None
        return F.linear(x, dequantize(linear.weight, linear.scale, x.dtype), linear.bias)


def dequantize(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[num_outputs, num_inputs] of the bytes of a layer; exact in bfloat16 and float32."""
    magnitudes = torch.tensor(MAGNITUDES, device=packed.device)
    table = torch.cat((magnitudes, -magnitudes))
    codes = unpack_nibbles(packed, 2 * packed.shape[1])
    values = table[codes.int()].view(len(codes), -1, BLOCK)
    exponents = scales.int() - BIAS
    return torch.ldexp(values, exponents[..., None]).flatten(1).to(dtype)


def round_to_nearest(values: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes and scales of values [num_outputs, num_inputs]; the peak of a block may be clamped, as
    the specification has it."""
    blocks = values.float().reshape(len(values), -1, BLOCK)
    peak = blocks.abs().amax(-1, keepdim=True).clamp_(min=2.0**-BIAS * 4)
    exponents = torch.frexp(peak).exponent.int() - 1 - PEAK_EXPONENT
    scaled = torch.ldexp(blocks, -exponents)
    table = torch.tensor(MAGNITUDES, device=values.device)
    bounds = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(scaled.abs(), bounds).to(torch.uint8) + (scaled < 0) * 8
    return pack_nibbles(codes.flatten(1)), (exponents.squeeze(-1) + BIAS).to(torch.uint8)


def neighbours_apart(blocks: Tensor) -> Tensor:
    """Bytes as they are kept of bytes that hold two neighbours each, the first in its lower half;
    both [..., 16]."""
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    low, high = codes.chunk(2, -1)
    return low | high << 4


def _put_blocks(target: Tensor, blocks: Tensor, rows: slice) -> None:
    """blocks: as files of safetensors have them. On the device of the target."""
    target[rows].copy_(neighbours_apart(blocks.to(target.device)))


def _keep_blocks(weight: Tensor, scale: Tensor, tensor: GGUFTensor) -> None:
    """GGUF's blocks of 17 bytes: a scale, then bytes as they are kept."""
    raw = torch.from_numpy(np.array(tensor.raw)).view(len(scale), -1, 1 + BLOCK // 2)
    weight.copy_(raw[..., 1:].flatten(1))
    scale.copy_(raw[..., 0])


def _put_rounded(weight: Tensor, scale: Tensor, values: Tensor, rows: slice) -> None:
    """On the device of the weight."""
    packed, scales = round_to_nearest(values.to(weight.device))
    weight[rows].copy_(packed)
    scale[rows].copy_(scales)
