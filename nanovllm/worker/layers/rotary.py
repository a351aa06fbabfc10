"""Rotary position embedding (Su et al. 2021): the table of cosines and sines, and who uses it.

`Decoder` builds one table for all layers; attention backends rotate by a layer's `Rotary`.
Everything is computed in fp32, in the order transformers does, so that greedy ids agree.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.worker.forward_batch import ForwardBatch
from nanovllm.worker.kernels.base import Kernels, QKNorm


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions are divided by `factor` (Chen et al. 2023, "position interpolation")."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's: only frequencies too low to turn within `original_context` are divided.

    A frequency that turns at least `high_freq_factor` times within the original context stays, one
    that turns at most `low_freq_factor` times is divided by `factor`; between, it is blended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int  # tokens


@dataclass(frozen=True, slots=True)
class Rope:
    """Base and scaling of the rotary frequencies."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | None = None


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per token of each pair of dimensions. Returns [head_dim / 2] fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (rope.theta**exponents)
    match rope.scaling:
        case None:
            return plain
        case LinearScaling(factor):
            return plain / factor
        case Llama3Scaling(factor, low, high, original_context):
            wavelengths = 2 * math.pi / plain
            keep = (original_context / wavelengths - low) / (high - low)
            blended = (1 - keep) * plain / factor + keep * plain
            scaled = torch.where(wavelengths > original_context / low, plain / factor, blended)
            return torch.where(wavelengths < original_context / high, plain, scaled)


def cos_sin_table(rope: Rope, *, head_dim: int, max_positions: int, device: torch.device) -> Tensor:
    """Row p: the cosines, then the sines, of p times each frequency. [max_positions, head_dim]."""
    positions = torch.arange(max_positions, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(rope, head_dim))
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


@dataclass(frozen=True, slots=True)
class Rotary:
    """What a layer does between its qkv product and attention."""

    kernels: Kernels
    cos_sin: Tensor  # [max_positions, head_dim] fp32
    qk_norm: QKNorm | None

    def apply(self, qkv: Tensor, batch: ForwardBatch, layer_cache: Tensor) -> Tensor:
        """Rotate, cache keys and values, and return the queries (`Kernels.rope_and_cache`)."""
        return self.kernels.rope_and_cache(
            qkv,
            cos_sin=self.cos_sin,
            positions=batch.positions,
            slot_mapping=batch.slot_mapping,
            layer_cache=layer_cache,
            qk_norm=self.qk_norm,
        )
