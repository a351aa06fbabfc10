"""Philox against the authors' known answers and against plain Python."""

import random

import pytest
import torch

from nanovllm.worker.sampling.philox import MULTIPLIERS, ROUNDS, WEYL, WORD, philox4x32, uniforms

# From kat_vectors of Random123, lines "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    for _ in range(ROUNDS):
        high0, low0 = divmod(MULTIPLIERS[0] * counter[0], 2**32)
        high1, low1 = divmod(MULTIPLIERS[1] * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + WEYL[0]) & WORD, (key[1] + WEYL[1]) & WORD]
    return counter


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, result: str) -> None:
    tensors = [torch.tensor(words(text))[:, None] for text in (counter, key)]
    assert philox4x32(*tensors)[:, 0].tolist() == words(result)
    assert plain_philox(words(counter), words(key)) == words(result)


def test_uniforms_are_philox_of_seed_and_position() -> None:
    generator = random.Random(0)
    seeds = [generator.getrandbits(63) for _ in range(100)]
    positions = [generator.randrange(2**20) for _ in range(100)]
    result = uniforms(torch.tensor(seeds), torch.tensor(positions)).tolist()
    for seed, position, uniform in zip(seeds, positions, result, strict=True):
        first, second, *_ = plain_philox([position, 0, 0, 0], [seed & WORD, seed >> 32])
        assert uniform == ((first << 20 | second >> 12) + 0.5) / 2**52


def test_uniforms_are_uniform_over_seeds_and_positions() -> None:
    steps = torch.arange(100_000)
    zeros = torch.zeros_like(steps)
    for sample in (uniforms(zeros, steps), uniforms(steps, zeros)):
        counts = torch.histc(sample.float(), bins=100, min=0, max=1)
        chi_square = ((counts - 1000) ** 2 / 1000).sum().item()
        assert chi_square < 148.2  # 99.9 % of a chi-square of 99 degrees of freedom
        assert sample.min() > 0 and sample.max() < 1
