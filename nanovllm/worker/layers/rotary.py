"""Rotary position embedding (Su et al. 2021): the table of cosines and sines.

`Decoder` builds one for all layers that turn alike; attention backends rotate by it. Everything is
computed in fp32, in the order transformers does, so that greedy ids agree.
"""

import math

import torch
from torch import Tensor

from nanovllm.checkpoint.spec import LinearScaling, Llama3Scaling, Rope


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


def cos_sin_table(
    rope: Rope | None, *, head_dim: int, max_positions: int, device: torch.device
) -> Tensor:
    """Row p: the cosines, then the sines, of p times each frequency. [max_positions, head_dim].

    Without rope all angles are zero, and nothing turns.
    """
    positions = torch.arange(max_positions, dtype=torch.float32)
    frequencies = (
        torch.zeros(head_dim // 2) if rope is None else inverse_frequencies(rope, head_dim)
    )
    angles = torch.outer(positions, frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)
