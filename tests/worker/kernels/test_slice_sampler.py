"""The fused sampler of slices against the one of all logits, token by token."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from nanovllm.worker.kernels.triton.fused_sampler import sample_tokens
from nanovllm.worker.kernels.triton.slice_sampler import sample_slices
from nanovllm.worker.layers.vocabulary import Vocabulary
from nanovllm.worker.parallel import TensorParallel
from tests.worker.kernels.test_fused_sampler import columns_of
from tests.worker.kernels.triton_device import DEVICE


@dataclass(frozen=True)
class InTurns(TensorParallel):
    """Ranks that run one after the other, twice: the first time they only say what they have."""

    said: dict[int, Tensor] = field(default_factory=dict)

    def reduce(self, partial: Tensor) -> Tensor:
        self.said.setdefault(self.rank, partial.clone())
        return torch.stack(list(self.said.values())).sum(0)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_write_what_one_would(size: int, dtype: torch.dtype) -> None:
    """Of 1000 ids in 8 segments; the last of 3 ranks has two of them, one in part."""
    temperature = [0.0, 1.0, 0.01, 5.0, 0.0, 0.8]
    n = len(temperature)
    logits = 3 * torch.randn(n, 1000, generator=torch.Generator().manual_seed(size))
    logits[4, 500:] = logits[4, 0] = 20.0
    logits[5, :600] = float("-inf")
    logits = logits.to(DEVICE, dtype)
    columns = columns_of(temperature, [0] * n, [1.0] * n, [0.0] * n)
    order = torch.randperm(n, device=DEVICE)
    positions = torch.arange(n, device=DEVICE) + 3
    asked = {"columns": columns, "seeds": torch.randint(-(2**62), 2**62, (n,), device=DEVICE)}
    known = torch.zeros(n, 16, dtype=torch.int32, device=DEVICE)
    expected = sample_tokens(logits, rows=order, positions=positions, known=known, **asked)
    targets = order, positions
    said: dict[int, Tensor] = {}
    vocabularies = [Vocabulary.of(1000, InTurns(rank, size, said=said)) for rank in range(size)]
    for turn in range(2):
        for vocabulary in vocabularies:
            wrote = torch.zeros_like(known)
            own = logits[:, vocabulary.cut.slice]
            found = sample_slices(own, vocabulary=vocabulary, targets=targets, known=wrote, **asked)
            if turn == 1:
                assert found.tolist() == expected.tolist()
                assert torch.equal(wrote, known)


def test_a_rank_without_ids() -> None:
    """Of 100 ids the second rank has none."""
    logits = torch.randn(3, 100, device=DEVICE)
    columns = columns_of([0.0, 1.0, 2.0], [0] * 3, [1.0] * 3, [0.0] * 3)
    numbers = torch.arange(3, device=DEVICE)
    asked = {"columns": columns, "seeds": numbers}
    asked |= {"known": torch.zeros(3, 8, dtype=torch.int32, device=DEVICE)}
    expected = sample_tokens(logits, rows=numbers, positions=numbers, **asked)
    asked["targets"] = numbers, numbers
    said: dict[int, Tensor] = {}
    for rank in (0, 1):
        vocabulary = Vocabulary.of(100, InTurns(rank, 2, said=said))
        found = sample_slices(logits[:, vocabulary.cut.slice], vocabulary=vocabulary, **asked)
    assert found.tolist() == expected.tolist()
