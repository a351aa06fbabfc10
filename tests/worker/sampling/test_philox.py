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


def test_uniforms_are_philox_of_seed_position_and_index() -> None:
    generator = random.Random(0)
    seeds = [generator.getrandbits(63) for _ in range(50)]
    positions = [generator.randrange(2**40) for _ in range(50)]
    result = uniforms(torch.tensor(seeds), torch.tensor(positions), 7).tolist()
    for seed, position, numbers in zip(seeds, positions, result, strict=True):
        key = [seed & WORD, seed >> 32]
        expected: list[int] = []
        for call in range(4):
            expected += plain_philox([position & WORD, position >> 32, call, 0], key)
        pairs = zip(expected[0::2], expected[1::2], strict=True)
        assert numbers == [((a << 20 | b >> 12) + 0.5) / 2**52 for a, b in pairs][:7]


def test_a_number_does_not_hang_on_how_many_are_asked_for() -> None:
    seeds, positions = torch.arange(5) << 40, torch.arange(5)
    many = uniforms(seeds, positions, 301)
    for count in (1, 2, 5, 300):
        assert torch.equal(uniforms(seeds, positions, count), many[:, :count])


def test_uniforms_are_uniform_over_seeds_positions_and_indices() -> None:
    steps = torch.arange(100_000)
    zeros = torch.zeros_like(steps)
    by_index = uniforms(zeros[:1], zeros[:1], len(steps))
    for sample in (uniforms(zeros, steps), uniforms(steps, zeros), by_index):
        counts = torch.histc(sample.float(), bins=100, min=0, max=1)
        chi_square = ((counts - 1000) ** 2 / 1000).sum().item()
        assert chi_square < 148.2  # 99.9 % of a chi-square of 99 degrees of freedom
        assert sample.min() > 0 and sample.max() < 1


def test_numbers_of_one_position_are_independent() -> None:
    sample = uniforms(torch.zeros(40_000, dtype=torch.int64), torch.arange(40_000), 6) * 4
    for first, second in [(0, 1), (0, 2), (1, 2), (3, 5)]:
        cells = sample[:, first].long() * 4 + sample[:, second].long()
        counts = torch.bincount(cells, minlength=16)
        assert ((counts - 2500) ** 2 / 2500).sum() < 37.7  # 99.9 % of 15 degrees of freedom
