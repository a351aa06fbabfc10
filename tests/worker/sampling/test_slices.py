"""Ranks that each have a slice of the vocabulary find the token that one rank would."""

from typing import NoReturn

import pytest
import torch
from torch import Tensor

from nanovllm.worker.layers.vocabulary import Vocabulary
from nanovllm.worker.parallel import TensorParallel
from nanovllm.worker.sampling.distribution import draw, to_probabilities
from nanovllm.worker.sampling.sampler import Sampler, SamplingTargets
from nanovllm.worker.sampling.slices import candidates, join
from tests.worker.planning import VOCAB_SIZE, make_rows

SIZES = [2, 3, 4]


def of_ranks(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, size: int):
    parts = []
    for rank in range(size):
        cut = TensorParallel(rank, size).share_vocabulary(logits.shape[1])
        own = logits[:, cut.slice].clone()
        parts.append(candidates(own, temperature, seeds, positions, start=cut.start))
    return join(torch.stack(parts), temperature)


def of_one(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    found = logits.argmax(-1)
    drawing = temperature > 0
    if not drawing.any():
        return found
    probs = to_probabilities(logits[drawing].clone(), temperature[drawing])
    found[drawing] = draw(probs, seeds[drawing], positions[drawing])
    return found


def asked(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    seeds = torch.randint(-(2**62), 2**62, (n,), generator=generator)
    return seeds, torch.randint(2**40, (n,), generator=generator)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("vocab_size", [100, 160, 1000, 3000])
@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0, 50.0])
def test_the_same_token_wins(vocab_size: int, size: int, temperature: float) -> None:
    """Of 100 ids the last ranks have none."""
    n = 200
    logits = 5 * torch.randn(n, vocab_size, generator=torch.Generator().manual_seed(1)) - 300
    logits[: n // 2, : vocab_size // 2] = -torch.inf
    seeds, positions = asked(n)
    warmth = torch.full((n,), temperature)
    expected = of_one(logits, warmth, seeds, positions)
    assert of_ranks(logits, warmth, seeds, positions, size).tolist() == expected.tolist()


@pytest.mark.parametrize("size", SIZES)
def test_rows_of_both_kinds_and_ties(size: int) -> None:
    """Of equal logits the lowest id wins, whichever rank has it."""
    logits = torch.zeros(6, 1000)
    logits[0, [400, 999]] = 1.0
    logits[2, [129, 700]] = 1.0
    temperature = torch.tensor([0.0, 0.7, 0.0, 1.0, 0.0, 2.0])
    seeds, positions = asked(6)
    found = of_ranks(logits, temperature, seeds, positions, size)
    assert found[::2].tolist() == [400, 129, 0]
    assert found.tolist() == of_one(logits, temperature, seeds, positions).tolist()


class Alone(TensorParallel):
    """A rank whose peer has nothing to offer."""

    def gather(self, part: Tensor) -> Tensor:
        nothing = torch.tensor([-torch.inf, 0.0, 0.0]).expand_as(part)
        return torch.stack((part, nothing))


class Ungathered(Vocabulary):
    def gather(self, logits: Tensor) -> NoReturn:
        raise AssertionError("logits have been gathered")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_stay_where_they_are_unless_rows_ask_for_more(temperature: float) -> None:
    rows = make_rows()
    vocabulary = Ungathered(Alone(0, 2), TensorParallel(0, 2).share_vocabulary(VOCAB_SIZE))
    rows.columns["temperature"][:] = temperature
    rows.host["temperature"][:] = temperature
    sampler = Sampler(rows, vocabulary=vocabulary)
    numbers = torch.tensor([0, 1], dtype=torch.int32).numpy()
    targets = SamplingTargets.of(numbers, numbers, torch.device("cpu"))
    logits = torch.zeros(2, vocabulary.cut.size)
    logits[:, 3] = 100.0
    assert sampler.sample(logits.clone(), targets).token_ids.tolist() == [3, 3]
    rows.host["top_k"][0] = 5
    with pytest.raises(AssertionError, match="gathered"):
        sampler.sample(logits, targets)
