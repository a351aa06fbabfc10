"""Truncation against straightforward NumPy; draws against the distribution they come from."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm.worker.sampling.distribution import (
    NUM_CANDIDATES,
    SEGMENT,
    draw,
    to_probabilities,
    truncate_min_p,
    truncate_top_k,
    truncate_top_p,
)

VOCAB = 4096 + 37  # not whole segments


def make_probs(num_rows: int, *, spread: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, VOCAB, generator=generator) * spread
    return to_probabilities(logits, torch.ones(num_rows))


def kept(probs: Tensor) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in probs]


def nucleus(probs: "np.ndarray[tuple[int], np.dtype[np.float64]]", top_p: float) -> set[int]:
    order = np.argsort(-probs, kind="stable")
    above = np.cumsum(probs[order]) - probs[order]
    return set(order[above < top_p * probs.sum()].tolist())


def test_probabilities_are_a_softmax_in_whole_segments() -> None:
    logits = torch.randn(3, VOCAB)
    probs = to_probabilities(logits.clone(), torch.tensor([0.5, 1.0, 2.0]))
    assert probs.shape[1] % SEGMENT == 0 and not probs[:, VOCAB:].any()
    expected = (logits / torch.tensor([[0.5], [1.0], [2.0]])).softmax(-1)
    assert torch.allclose(probs[:, :VOCAB], expected, rtol=1e-5)


@pytest.mark.parametrize("top_ks", [[1, 0, 5], [50, 3, 1], [4000, 0, 7], [10**9, 1, 2]])
def test_top_k(top_ks: list[int]) -> None:
    probs = make_probs(3, spread=2.0)
    truncated = truncate_top_k(probs.clone(), torch.tensor(top_ks), most=max(top_ks))
    for row, survivors, top_k in zip(probs.numpy(), kept(truncated), top_ks, strict=True):
        order = np.argsort(-row[:VOCAB], kind="stable")
        assert survivors == set(order[: top_k or VOCAB].tolist())


def test_top_k_keeps_all_that_tie_at_the_boundary() -> None:
    logits = torch.zeros(1, SEGMENT)
    logits[0, 3] = 1.0
    probs = truncate_top_k(to_probabilities(logits, torch.ones(1)), torch.tensor([2]), most=2)
    assert len(kept(probs)[0]) == SEGMENT


@pytest.mark.parametrize("width", [SEGMENT, 2 * SEGMENT, 64 * NUM_CANDIDATES])
def test_a_nucleus_may_end_anywhere(width: int) -> None:
    """Also with the last of those that are looked at first, or with the last there is."""
    edges = {1, 2, NUM_CANDIDATES - 1, NUM_CANDIDATES, NUM_CANDIDATES + 1, width - 1, width}
    sizes = sorted(size for size in edges if size <= width)
    row = torch.arange(4 * width, 3 * width, -1, dtype=torch.float64)  # exact, and no two alike
    mass = row.cumsum(0)
    top_p = torch.stack([(mass[size - 1] - width) / mass[-1] for size in sizes]).float()
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    probs = row[order].float().expand(len(sizes), -1).clone()
    for survivors, size in zip(kept(truncate_top_p(probs, top_p)), sizes, strict=True):
        assert sorted(order[list(survivors)].tolist()) == list(range(size))


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])  # nuclei of thousands, hundreds, few tokens
def test_top_p(spread: float) -> None:
    top_ps = [0.05, 0.5, 0.9, 0.999, 1.0]
    probs = make_probs(len(top_ps), spread=spread)
    truncated = truncate_top_p(probs.clone(), torch.tensor(top_ps))
    for row, survivors, top_p in zip(probs.numpy(), kept(truncated), top_ps, strict=True):
        if top_p == 1:
            assert survivors == set(np.flatnonzero(row).tolist())
            continue
        # Float32 sums may decide a token at the very edge otherwise than float64 ones.
        smaller = nucleus(row.astype(np.float64), top_p * (1 - 1e-6))
        larger = nucleus(row.astype(np.float64), float(np.float32(top_p)) * (1 + 1e-6))
        assert smaller <= survivors <= larger
    widths = [len(survivors) for survivors in kept(truncated)]
    if spread == 0.01:
        assert widths[0] > NUM_CANDIDATES  # settled by the search over the whole row


def test_min_p() -> None:
    min_ps = [0.0, 0.1, 1.0]
    probs = make_probs(3, spread=2.0)
    truncated = truncate_min_p(probs.clone(), torch.tensor(min_ps))
    for row, survivors, min_p in zip(probs.numpy(), kept(truncated), min_ps, strict=True):
        expected = np.flatnonzero((row >= np.float32(min_p) * row.max()) & (row > 0))
        assert survivors == set(expected.tolist())


def test_truncations_compose_like_renormalized_steps() -> None:
    """min-p, then top-k, then top-p of what is left, as vLLM orders them."""
    probs = make_probs(1, spread=2.0)
    truncated = truncate_min_p(probs.clone(), torch.tensor([0.02]))
    truncated = truncate_top_k(truncated, torch.tensor([30]), most=30)
    truncated = truncate_top_p(truncated, torch.tensor([0.8]))
    row = probs[0].double().numpy()
    row[row < 0.02 * row.max()] = 0
    row[np.argsort(-row, kind="stable")[30:]] = 0
    assert kept(truncated)[0] == nucleus(row, 0.8)


def draw_many(probs: Tensor, num_draws: int, *, seed: int = 11) -> Tensor:
    """Of one row ([1, width]), at as many positions."""
    drawn = []
    for start in range(0, num_draws, 1000):
        positions = torch.arange(start, min(start + 1000, num_draws))
        seeds = torch.full_like(positions, seed)
        drawn.append(draw(probs.expand(len(positions), -1), seeds, positions))
    return torch.cat(drawn)


def check_frequencies(drawn: Tensor, probs: Tensor) -> None:
    """Pearson's test, unlikely tokens taken together. probs: [width], of any total."""
    expected = probs.double() / probs.double().sum() * len(drawn)
    counts = torch.bincount(drawn, minlength=len(expected)).double()
    assert not counts[expected == 0].any()
    rare = expected < 10
    if expected[rare].sum() >= 10:
        counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    else:
        counts, expected = counts[~rare], expected[~rare]
    chi_square, freedom = float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1
    # 99.99 %, by Wilson and Hilferty's approximation.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < limit


@pytest.mark.parametrize("temperature", [0.2, 1.0, 30.0])  # a few tokens, many, nearly all alike
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = torch.randn(1, 600, generator=torch.Generator().manual_seed(3)) * 2
    probs = to_probabilities(logits, torch.tensor([temperature]))
    check_frequencies(draw_many(probs, 30_000), probs[0])


def test_draws_of_a_truncated_row_follow_what_is_left() -> None:
    probs = make_probs(1, spread=1.5, seed=4)
    probs = truncate_min_p(probs, torch.tensor([0.001]))
    probs = truncate_top_k(probs, torch.tensor([200]), most=200)
    probs = truncate_top_p(probs, torch.tensor([0.8]))
    assert 20 < len(kept(probs)[0]) < 200
    check_frequencies(draw_many(probs, 30_000), probs[0])


def test_unlikely_tokens_are_drawn_as_often_as_they_should_be() -> None:
    """A tail of 4,000 tokens of one in ten million each, which coarse noise would never reach, or
    too often; the likely token and most of the tail lie in different segments."""
    probs = torch.zeros(1, 32 * SEGMENT)
    probs[0, 5] = 1.0
    probs[0, 64:4064] = 1e-7
    drawn = draw_many(probs, 100_000)
    num_tail = int((drawn != 5).sum())
    expected = 100_000 * 4e-4
    assert abs(num_tail - expected) < 4 * math.sqrt(expected)
    assert (drawn[drawn != 5] >= 64).all() and (drawn < 4064).all()


def chance_of_another(before: Tensor, after: Tensor) -> float:
    """That a race with the same times has another winner. [width] each.

    Token i wins both with chance 1 / sum_j max(p_j / p_i, q_j / q_i): the times are exponential.
    """

    def same(p: Tensor, q: Tensor) -> Tensor:
        ratios = torch.maximum(p[None, :] / p[:, None], q[None, :] / q[:, None])
        return 1 / ratios.sum(1)

    p, q = (probs.double().view(-1, SEGMENT) for probs in (before, after))
    of_segments = same(p.sum(1), q.sum(1))
    of_tokens = torch.stack([same(a, b).sum() for a, b in zip(p, q, strict=True)])
    return float(1 - (of_segments * of_tokens).sum())


@pytest.mark.parametrize(("error", "num_draws"), [(1e-5, 40_000), (3e-3, 40_000)])
def test_rounding_changes_a_draw_as_rarely_as_can_be(error: float, num_draws: int) -> None:
    """Logits recomputed otherwise (one chunk instead of many steps) differ in their last bits."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(1, 8 * SEGMENT, generator=generator) * 4
    noise = torch.randn(logits.shape, generator=generator)
    one = torch.ones(1)
    before = to_probabilities(logits.clone(), one)
    after = to_probabilities(logits * (1 + error * noise), one)
    chance = chance_of_another(before[0], after[0])
    total_variation = float((before.double() - after.double()).abs().sum() / 2)
    assert total_variation <= chance < 4 * total_variation  # two races, each at most twice its own
    changed = draw_many(before, num_draws) != draw_many(after, num_draws)
    expected = num_draws * chance
    assert abs(int(changed.sum()) - expected) < 4 * math.sqrt(expected) + 1


def test_draw_never_takes_what_was_truncated() -> None:
    probs = torch.zeros(1, 4 * SEGMENT)
    probs[:, [5, 70, 130]] = torch.tensor([0.25, 1e-30, 0.5])
    drawn = draw_many(probs, 3000)
    assert set(drawn.tolist()) == {5, 130}
    probs[:, [5, 130]] = 0.0
    assert set(draw_many(probs, 300).tolist()) == {70}


def test_draw_of_a_row_without_numbers_is_an_index() -> None:
    drawn = draw_many(torch.full((1, 2 * SEGMENT), torch.nan), 1)
    assert 0 <= drawn.item() < 2 * SEGMENT


def test_rows_do_not_see_each_other() -> None:
    """Bit-equal alone and in any batch: what a request samples must not hang on its neighbours."""
    probs = make_probs(9, spread=1.5)
    top_p = torch.linspace(0.3, 0.99, 9)
    top_k = torch.tensor([0, 5, 300, 40, 1, 0, 64, 2000, 7])
    seeds, positions = torch.arange(9) << 33, torch.arange(9) * 1000

    def run(rows: list[int]) -> list[int]:
        some = truncate_top_k(probs[rows], top_k[rows], most=max(1, int(top_k[rows].max())))
        some = truncate_top_p(some, top_p[rows])
        return draw(some, seeds[rows], positions[rows]).tolist()

    together = run(list(range(9)))
    assert [run([row])[0] for row in range(9)] == together
    assert run([8, 2, 5]) == [together[8], together[2], together[5]]
