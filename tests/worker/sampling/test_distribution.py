"""Truncation against straightforward NumPy; draws against the distribution they come from."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm.worker.sampling.distribution import (
    BLOCK,
    NUM_CANDIDATES,
    draw,
    to_probabilities,
    truncate_min_p,
    truncate_top_k,
    truncate_top_p,
)

VOCAB = 4096 + 37  # not whole blocks


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


def test_probabilities_are_a_softmax_in_whole_blocks() -> None:
    logits = torch.randn(3, VOCAB)
    probs = to_probabilities(logits.clone(), torch.tensor([0.5, 1.0, 2.0]))
    assert probs.shape[1] % BLOCK == 0 and not probs[:, VOCAB:].any()
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
    logits = torch.zeros(1, BLOCK)
    logits[0, 3] = 1.0
    probs = truncate_top_k(to_probabilities(logits, torch.ones(1)), torch.tensor([2]), most=2)
    assert len(kept(probs)[0]) == BLOCK


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


def test_draw_inverts_the_cumulative_distribution() -> None:
    probs = make_probs(1, spread=2.0)
    numbers = torch.linspace(1e-9, 1 - 1e-9, 2000, dtype=torch.float64)
    drawn = draw(probs.expand(len(numbers), -1).contiguous(), numbers).numpy()
    cumulative = np.cumsum(probs[0].double().numpy())
    low, high = (
        np.searchsorted(cumulative, numbers.numpy() * cumulative[-1] + shift, side="right")
        for shift in (-1e-6, 1e-6)
    )
    assert (low <= drawn).all() and (drawn <= high).all()
    assert (drawn == low).mean() > 0.99


def test_draw_never_takes_what_was_truncated() -> None:
    probs = torch.zeros(4, 4 * BLOCK)
    probs[:, [5, 70, 130]] = torch.tensor([0.25, 1e-30, 0.5])
    tiny = 2.0**-53
    drawn = draw(probs, torch.tensor([tiny, 0.33, 0.34, 1 - tiny], dtype=torch.float64))
    assert drawn.tolist() == [5, 5, 130, 130]


def test_draw_of_a_row_without_numbers_is_an_index() -> None:
    drawn = draw(torch.full((1, 2 * BLOCK), torch.nan), torch.tensor([0.5], dtype=torch.float64))
    assert 0 <= drawn.item() < 2 * BLOCK


def test_rows_do_not_see_each_other() -> None:
    """Bit-equal alone and in any batch: what a request samples must not hang on its neighbours."""
    probs = make_probs(9, spread=1.5)
    top_p = torch.linspace(0.3, 0.99, 9)
    top_k = torch.tensor([0, 5, 300, 40, 1, 0, 64, 2000, 7])
    numbers = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def run(rows: list[int]) -> list[int]:
        some = truncate_top_k(probs[rows], top_k[rows], most=max(1, int(top_k[rows].max())))
        return draw(truncate_top_p(some, top_p[rows]), numbers[rows]).tolist()

    together = run(list(range(9)))
    assert [run([row])[0] for row in range(9)] == together
    assert run([8, 2, 5]) == [together[8], together[2], together[5]]
