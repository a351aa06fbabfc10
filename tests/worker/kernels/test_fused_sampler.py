"""The fused sampler against the plain one (`sampling.distribution`), token by token."""

import pytest
import torch
from torch import Tensor

from nanovllm.worker.kernels.triton.fused_sampler import (
    choose_tokens,
    measure_segments,
    sample_tokens,
)
from nanovllm.worker.parallel import SEGMENT
from nanovllm.worker.sampling.distribution import (
    draw,
    to_probabilities,
    truncate_min_p,
    truncate_top_k,
    truncate_top_p,
)
from tests.worker.kernels.triton_device import DEVICE
from tests.worker.warmup.compiling import run_compiling

VOCAB_SIZE = 1000


def columns_of(
    temperature: list[float], top_k: list[int], top_p: list[float], min_p: list[float]
) -> dict[str, Tensor]:
    """Columns as the rows hold them: one word each of wider records."""
    words = torch.zeros(len(temperature), 5, dtype=torch.int32, device=DEVICE)
    columns = {
        name: words[:, place].view(torch.int32 if name == "top_k" else torch.float32)
        for place, name in enumerate(("temperature", "top_k", "top_p", "min_p"))
    }
    for name, values in zip(columns, (temperature, top_k, top_p, min_p), strict=True):
        columns[name].copy_(torch.tensor(values))
    return columns


def plain(logits: Tensor, columns: dict[str, Tensor], seeds: Tensor, positions: Tensor) -> Tensor:
    """One row at a time, through the plain torch sampler."""
    tokens = []
    for row, line in enumerate(logits.float()):
        temperature, top_k, top_p, min_p = (column[row : row + 1] for column in columns.values())
        if temperature == 0:
            tokens.append(int(line.argmax()))
            continue
        probs = truncate_min_p(to_probabilities(line[None].clone(), temperature), min_p)
        probs = truncate_top_k(probs, top_k, most=max(int(top_k), 1))
        probs = truncate_top_p(probs, top_p)
        tokens.append(int(draw(probs, seeds[row : row + 1], positions[row : row + 1])))
    return torch.tensor(tokens, device=logits.device)


def check(
    logits: Tensor,
    temperature: list[float],
    top_k: list[int] | None = None,
    top_p: list[float] | None = None,
    min_p: list[float] | None = None,
) -> None:
    n = len(temperature)
    columns = columns_of(temperature, top_k or [0] * n, top_p or [1.0] * n, min_p or [0.0] * n)
    seeds = torch.randint(-(2**62), 2**62, (n, 3), device=DEVICE)[:, 1]
    positions = torch.randint(2**40, (n,), device=DEVICE)
    expected = plain(logits, columns, seeds, positions)
    order = torch.randperm(n, device=DEVICE)  # lines of logits are not in the rows' order
    tokens = sample_tokens(
        logits[order],
        rows=order,
        positions=positions[order],
        columns=columns,
        seeds=seeds,
    )
    assert tokens.tolist() == expected[order].tolist()


def random_logits(n: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(n, VOCAB_SIZE, device=DEVICE) * 3


def test_temperature_and_greedy() -> None:
    logits = random_logits(8)
    logits[3, 700:] = float("-inf")
    check(logits, [0.0, 0.6, 1.0, 0.8, 5.0, 0.0, 1e-3, 1.0])


def test_tokens_are_written_where_they_will_be_read() -> None:
    columns = columns_of([0.0] * 3, [0] * 3, [1.0] * 3, [0.0] * 3)
    known = torch.full((3, 9), -1, dtype=torch.int32, device=DEVICE)
    rows, positions = torch.tensor([[2, 0], [7, 0]], dtype=torch.int32, device=DEVICE)
    seeds = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    tokens = sample_tokens(
        random_logits(2),
        rows=rows,
        positions=positions,
        columns=columns,
        seeds=seeds,
        known=known,
    )
    assert [known[2, 7].item(), known[0, 0].item()] == tokens.tolist()
    assert (known == -1).sum() == known.numel() - 2


def test_first_of_equal_maxima() -> None:
    logits = random_logits(3)
    logits[:, [77, 130, 900]] = 20.0
    check(logits, [0.0, 0.0, 0.7])


def test_each_truncation_alone() -> None:
    n = 6
    logits = random_logits(n)
    check(logits, [1.0] * n, top_k=[1, 2, 7, 40, 999, 5000])
    check(logits, [1.0] * n, top_p=[0.01, 0.3, 0.5, 0.9, 0.99, 1.0])
    check(logits, [1.0] * n, min_p=[1.0, 0.5, 0.1, 1e-3, 1e-6, 0.0])


def test_truncations_together_and_mixed_with_others() -> None:
    check(
        random_logits(6),
        [0.7, 1.0, 0.0, 2.0, 1.3, 0.9],
        top_k=[50, 0, 0, 20, 500, 0],
        top_p=[0.95, 1.0, 1.0, 0.5, 0.999, 0.8],
        min_p=[0.0, 0.0, 0.0, 0.05, 0.01, 0.1],
    )


def test_flat_and_tied_logits() -> None:
    logits = random_logits(4)
    logits[0] = 1.0
    logits[1] = (logits[1] * 2).round() / 2  # every value many times: ties at the cut all stay
    logits[2] = -5.0
    logits[2, 123] = 0.0
    check(logits, [1.0] * 4, top_k=[10, 30, 5, 0], top_p=[1.0, 1.0, 1.0, 0.9])
    check(logits, [1.0] * 4, top_p=[0.5, 0.7, 0.5, 0.9])


def test_half_precision_logits() -> None:
    check(random_logits(3).half(), [0.0, 0.6, 1.0], top_k=[0, 0, 20], top_p=[1.0, 1.0, 0.9])


def test_a_uniform_distribution_over_whole_and_odd_vocabularies() -> None:
    for vocab_size in (4096, 1000, 130, 100):
        n = 16
        seeds = torch.randint(-(2**62), 2**62, (n,), device=DEVICE)
        positions = torch.randint(2**40, (n,), device=DEVICE)
        logits = torch.zeros(n, vocab_size, device=DEVICE)
        columns = columns_of([1.0] * n, [0] * n, [1.0] * n, [0.0] * n)
        tokens = sample_tokens(
            logits,
            rows=torch.arange(n, device=DEVICE),
            positions=positions,
            columns=columns,
            seeds=seeds,
        )
        assert tokens.tolist() == plain(logits, columns, seeds, positions).tolist()
        assert tokens.max() < vocab_size


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
def test_a_row_without_numbers_gets_an_index() -> None:
    logits = torch.full((2, VOCAB_SIZE), torch.nan, device=DEVICE)
    tokens = sample_tokens(
        logits,
        rows=torch.arange(2, device=DEVICE),
        positions=torch.arange(2, device=DEVICE),
        columns=columns_of([1.0, 0.5], [0, 7], [1.0, 1.0], [0.0, 0.0]),
        seeds=torch.arange(2, device=DEVICE),
    )
    assert (tokens >= 0).all() and (tokens < VOCAB_SIZE).all()


def test_ids_go_to_their_lines_among_others() -> None:
    """And nowhere if they have none; whatever their rows are then."""
    out = torch.full((5,), -1, device=DEVICE)
    lines = torch.tensor([3, -1, 1], dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([0, 99_999, 1], dtype=torch.int32, device=DEVICE)
    logits, columns = random_logits(3), columns_of([0.0] * 3, [0] * 3, [1.0] * 3, [0.0] * 3)
    segments = torch.empty(2, 3, -(-VOCAB_SIZE // SEGMENT), device=DEVICE)
    some = torch.arange(3, device=DEVICE)
    measure_segments(logits, some, columns["temperature"], *segments)
    choose_tokens(
        logits,
        segments,
        (rows, rows),
        columns=columns,
        seeds=some,
        known=None,
        out=(out, lines),
    )
    first, _, second = logits.argmax(1).tolist()
    assert out.tolist() == [-1, second, -1, first, -1]


def test_it_compiles_for_hopper_without_spilling() -> None:
    found = run_compiling("compile_for_gpu.py", "sampler")
    assert len(found) == 4
    for case, usage in found.items():
        assert usage["spilled"] == 0, case
        limit = 128 if case.startswith("choose") else 96  # one program of 16 warps per SM; several
        assert usage["registers"] <= limit, (case, usage)
