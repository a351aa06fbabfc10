"""The native sampler against the plain one (`sampling.distribution`), token by token."""

import pytest
import torch
from torch import Tensor

from nanovllm.worker.kernels.native import library as native

if (unusable := native.unusable()) is not None:
    pytest.skip(unusable, allow_module_level=True)

from nanovllm.worker.kernels.native.sampler import sample_tokens
from tests.worker.kernels.test_fused_sampler import plain

NAMES = ("temperature", "top_k", "top_p", "min_p")


@pytest.fixture(params=native.runnable_isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> None:
    native.use(request.param, num_threads=2)


def columns_of(**values: list[float]) -> dict[str, Tensor]:
    """Columns as rows hold them: one word each of wider records. What is not given is off."""
    num_rows = len(next(iter(values.values())))
    words = torch.zeros(num_rows, 6, dtype=torch.int32)
    columns = {
        name: words[:, place].view(torch.int32 if name == "top_k" else torch.float32)
        for place, name in enumerate(NAMES)
    }
    columns["top_p"].fill_(1.0)
    for name, given in values.items():
        columns[name].copy_(torch.tensor(given))
    return columns


def check(logits: Tensor, **values: list[float]) -> None:
    columns, num_rows = columns_of(**values), len(logits)
    seeds = torch.randint(-(2**62), 2**62, (num_rows, 3))[:, 1]
    positions = torch.randint(2**40, (num_rows,))
    expected = plain(logits, columns, seeds, positions)
    order = torch.randperm(num_rows)  # lines of logits are not in the rows' order
    tokens = sample_tokens(
        logits[order], rows=order, positions=positions[order], columns=columns, seeds=seeds
    )
    assert tokens.tolist() == expected[order].tolist()


def random_logits(num_rows: int, vocab_size: int = 1003) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(num_rows, vocab_size) * 3


def test_temperature_and_greedy() -> None:
    logits = random_logits(8)
    logits[3, 700:] = float("-inf")
    logits[0, 1002] = logits[5, 3] = logits[5, 700] = 19.0  # the first of equals
    check(logits, temperature=[0.0, 0.6, 1.0, 0.8, 5.0, 0.0, 1e-3, 1.0])


def test_one_truncation_at_a_time() -> None:
    warm = [1.0] * 8
    logits = random_logits(8)
    logits[1, ::7] = logits[1, 0]  # equals, all kept or none
    check(logits, temperature=warm, top_k=[1, 5, 50, 300, 1002, 1003, 5000, 0])
    check(logits, temperature=warm, top_p=[1e-9, 0.1, 0.5, 0.9, 0.99, 0.999999, 1.0, 0.3])
    check(logits, temperature=warm, min_p=[0.0, 1e-4, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0])


def test_all_truncations_of_many_rows() -> None:
    torch.manual_seed(1)
    count = 120
    check(
        random_logits(count, 4999),
        temperature=(torch.rand(count) * 2).where(torch.rand(count) < 0.9, 0.0).tolist(),
        top_k=torch.randint(200, (count,)).where(torch.rand(count) < 0.5, 0).tolist(),
        top_p=torch.rand(count).where(torch.rand(count) < 0.5, 1.0).tolist(),
        min_p=(torch.rand(count) * 0.1).where(torch.rand(count) < 0.5, 0.0).tolist(),
    )


def test_a_mask_that_leaves_few_tokens() -> None:
    logits = torch.full((4, 1003), float("-inf"))
    logits[0, 1002] = logits[1, 0] = logits[2, 500] = 0.0
    logits[3, [4, 900]] = torch.tensor([-3e38, 3.0])
    check(logits, temperature=[1.0] * 4, top_k=[0, 2, 0, 0], top_p=[1.0, 0.5, 0.1, 1.0])


def test_no_rows() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    columns = columns_of(temperature=[1.0])
    found = sample_tokens(
        torch.empty(0, 1003), rows=nothing, positions=nothing, columns=columns, seeds=nothing
    )
    assert found.tolist() == []
