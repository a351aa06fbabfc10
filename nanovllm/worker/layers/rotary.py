"""Rotary position embedding (Su et al. 2021): the table of cosines and sines.

`Decoder` builds one for all layers that turn alike; attention backends rotate by it. Everything is
computed in fp32, in the order transformers does, so that greedy ids agree. Kernels know one layout:
the numbers of a pair lie half a head apart, and all of a head turn. Other layouts are brought into
it when q and k are loaded (`memory_order`), which changes no product of a query and a key.
"""

import math

import torch
from torch import Tensor

from nanovllm.checkpoint.spec import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    YarnScaling,
)


def turning_size(rope: Rope, head_dim: int) -> int:
    """How many numbers of a head turn."""
    return int(head_dim * rope.share)


def memory_order(rope: Rope, head_dim: int) -> list[int] | None:
    """Which number of a checkpoint's head lies where in memory; None: all stay where they are."""
    size = head_dim if rope.proportional else turning_size(rope, head_dim)
    turning, still = list(range(size)), list(range(size, head_dim))
    half = len(still) // 2
    if rope.interleaved:
        firsts, seconds = turning[0::2], turning[1::2]
    else:
        firsts, seconds = turning[: size // 2], turning[size // 2 :]
    order = firsts + still[:half] + seconds + still[half:]
    return None if order == list(range(head_dim)) else order


def inverse_frequencies(rope: Rope, head_dim: int, *, max_positions: int) -> Tensor:
    """Radians per token of each pair of numbers that turns. Returns [turning size / 2] fp32.

    max_positions: that are served, for scalings that depend on it.
    """
    size = turning_size(rope, head_dim)
    whole = head_dim if rope.proportional else size
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / whole
    periods = rope.theta**exponents
    plain = 1.0 / periods
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
        case YarnScaling() as yarn:
            keep = 1 - _ramp(rope.theta, yarn, size)
            return 1.0 / (yarn.factor * periods) * (1 - keep) + plain * keep
        case LongRopeScaling(short, long, original_context):
            return 1.0 / (
                torch.tensor(long if max_positions > original_context else short) * periods
            )


def _ramp(theta: float, yarn: YarnScaling, size: int) -> Tensor:
    """How far each pair is on its way from staying to being divided, in [0, 1]: [size / 2]."""

    def pair_that_turns(times: float) -> float:
        return (size * math.log(yarn.original_context / (times * 2 * math.pi))) / (
            2 * math.log(theta)
        )

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncates:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001  # no division by zero
    return ((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def cos_sin_table(
    rope: Rope | None, *, head_dim: int, max_positions: int, device: torch.device
) -> Tensor:
    """Row p: the cosines, then the sines, of p times each frequency. [max_positions, head_dim].

    Numbers that do not turn have angles of zero; without rope all have.
    """
    table = torch.zeros(max_positions, 2, head_dim // 2)
    table[:, 0] = 1
    if rope is not None:
        positions = torch.arange(max_positions, dtype=torch.float32)
        frequencies = inverse_frequencies(rope, head_dim, max_positions=max_positions)
        angles = torch.outer(positions, frequencies)
        table[:, 0, : len(frequencies)] = angles.cos()
        table[:, 1, : len(frequencies)] = angles.sin()
        if isinstance(rope.scaling, YarnScaling | LongRopeScaling):
            table[..., : len(frequencies)] *= rope.scaling.attention_factor
    return table.flatten(1).to(device)
