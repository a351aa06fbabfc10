"""Every sampling parameter through the sampler, on rows admitted by a plan."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm.protocol.plan import NewRow
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling.logits_processors import prepare_edits
from nanovllm.worker.sampling.sampler import Sampled, Sampler, SamplingTargets
from tests.worker.planning import CUDA, EOS, GREEDY, VOCAB_SIZE, make_plan, make_rows, new_row

TOP = VOCAB_SIZE - 1  # the likeliest token under `ramp`


def ramp(num_rows: int) -> Tensor:
    """Logits that rise with the token id, from -4 to 4."""
    return torch.linspace(-4, 4, VOCAB_SIZE).repeat(num_rows, 1)


def admit(*new_rows: NewRow, device: str = "cpu") -> RequestRows:
    rows = make_rows(device=device)
    plan = make_plan(0, [], new_rows=list(new_rows))
    rows.write(torch.from_numpy(rows.record(plan)).to(device))
    return rows


def sample(rows: RequestRows, logits: Tensor, lengths: dict[int, int]) -> Sampled:
    """lengths: row → its number of tokens, which is the position of the next one."""
    host_rows = np.array(list(lengths), np.int32)
    positions = np.array(list(lengths.values()), np.int32)
    targets = SamplingTargets.of(host_rows, positions, logits.device)
    return Sampler(rows).sample(logits.clone(), targets)


def sample_one(logits: Tensor, new: NewRow) -> int:
    return int(sample(admit(new), logits, {new.row: len(new.token_ids)}).token_ids.item())


def greedy(**fields: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=50, **fields)  # type: ignore[arg-type]


def test_greedy_takes_the_largest_and_ignores_truncation() -> None:
    assert sample_one(ramp(1), new_row(0, [1], greedy(top_k=5, top_p=0.1, min_p=0.5))) == TOP


def test_allowed_token_ids() -> None:
    params = greedy(allowed_token_ids=[7, 3, 10**6])
    assert sample_one(ramp(1), new_row(0, [1], params)) == 7


def test_logit_bias() -> None:
    params = greedy(logit_bias={5: 100.0, 6: 90.0, 10**6: 100.0})
    assert sample_one(ramp(1), new_row(0, [1], params)) == 5
    assert sample_one(ramp(1), new_row(0, [1], greedy(logit_bias={TOP: -100.0}))) == TOP - 1


def test_logit_bias_cannot_bring_back_what_is_not_allowed() -> None:
    params = greedy(allowed_token_ids=[3], logit_bias={5: 100.0})
    assert sample_one(ramp(1), new_row(0, [1], params)) == 3


def test_the_last_id_can_be_biased_and_what_lies_beyond_is_left_out() -> None:
    last = VOCAB_SIZE - 1
    biases = {last: 100.0, VOCAB_SIZE: 200.0, VOCAB_SIZE + 5: 300.0}
    assert sample_one(ramp(1), new_row(0, [1], greedy(logit_bias=biases))) == last
    words = [[last], [VOCAB_SIZE], [1, VOCAB_SIZE + 5]]
    edits = prepare_edits(
        new_row(0, [1], greedy(logit_bias=biases), bad_words_token_ids=words),
        vocab_size=VOCAB_SIZE,
        eos_token_ids=[],
    )
    assert edits is not None and edits.bad_words == [[last]]
    assert (edits.biased_ids.tolist(), edits.biases.tolist()) == ([last], [100.0])


def test_bad_words() -> None:
    words = [[TOP], [8, 9, TOP - 1], [9, TOP - 2], [1, TOP - 3]]

    def after(outputs: list[int]) -> int:
        new = new_row(0, [1, *outputs], num_prompt_tokens=1, bad_words_token_ids=words)
        return sample_one(ramp(1), new)

    assert after([]) == TOP - 1  # the prompt's 1 is not part of the output
    assert after([9]) == TOP - 1
    assert after([8, 9]) == TOP - 3
    assert after([8, 9, 8]) == TOP - 1


def test_bad_words_may_share_their_last_token() -> None:
    words = [[TOP], [5, TOP], [5, 6, TOP]]
    new = new_row(0, [1, 5], num_prompt_tokens=1, bad_words_token_ids=words)
    assert sample_one(ramp(1), new) == TOP - 1


def test_min_tokens_masks_stop_ids_and_eos_until_reached() -> None:
    logits = ramp(1)
    logits[0, EOS] = 9.0
    for ignore_eos in (False, True):
        params = greedy(min_tokens=2, stop_token_ids=[TOP, 10**6], ignore_eos=ignore_eos)
        new = [new_row(0, [1, *[5] * count], params, num_prompt_tokens=1) for count in range(3)]
        assert [sample_one(logits, row) for row in new] == [TOP - 1, TOP - 1, EOS]


def test_penalties_equal_their_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, VOCAB_SIZE, generator=generator)
    prompt, outputs = [3, 4, 4, 5], [5, 6, 6, 6]
    cases = [(1.7, 0.0, 0.0), (1.0, 0.3, 0.2), (0.6, -1.0, 2.0)]
    # Token chosen = argmax, so compare the whole row through its log-probabilities of "all".
    for index, (repetition, presence, frequency) in enumerate(cases):
        expected = logits[index].double().clone()
        for token in {*prompt, *outputs}:
            value = expected[token]
            expected[token] = value / repetition if value > 0 else value * repetition
        for token in set(outputs):
            expected[token] -= frequency * outputs.count(token) + presence
        params = SamplingParams(
            temperature=0.0,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
        )
        rows = admit(new_row(index, prompt + outputs, params, num_prompt_tokens=len(prompt)))
        penalized = logits.clone()
        host_rows = np.array([index], np.int32)
        targets = SamplingTargets(
            torch.tensor([index]), torch.tensor([8]), host_rows, np.array([8], np.int32)
        )
        Sampler(rows).sample(penalized[index : index + 1], targets)
        assert torch.allclose(penalized[index].double(), expected, atol=1e-6)


def test_penalties_see_tokens_only_the_device_knows_and_leave_other_rows_alone() -> None:
    params = greedy(presence_penalty=2.0)
    rows = admit(new_row(2, [1], params), new_row(5, [TOP]))
    rows.token_ids[2, 1] = TOP  # as if sampled by the step before
    assert sample(rows, ramp(2), {5: 1, 2: 2}).token_ids.tolist() == [TOP, TOP - 1]


def test_sampled_rows_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0, -torch.inf])
    temperature, num_draws = 1.3, 20_000
    params = SamplingParams(temperature=temperature)
    rows = make_rows(vocab_size=5)
    rows.write(torch.from_numpy(rows.record(make_plan(0, [], new_rows=[new_row(0, [1], params)]))))
    positions = np.arange(1, num_draws + 1, dtype=np.int32)
    zeros = np.zeros(num_draws, np.int32)
    targets = SamplingTargets(
        torch.from_numpy(zeros).long(), torch.from_numpy(positions).long(), zeros, positions
    )
    drawn = Sampler(rows).sample(logits.repeat(num_draws, 1), targets).token_ids
    expected = (logits.double() / temperature).softmax(0)[:4] * num_draws
    counts = torch.bincount(drawn, minlength=5)
    chi_square = ((counts[:4] - expected) ** 2 / expected).sum().item()
    assert counts[4] == 0
    assert chi_square < 16.3  # 99.9 % of a chi-square of 3 degrees of freedom


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_draw_depends_on_seed_position_and_logits_only(device: str) -> None:
    """Same ids in any row, in any company, in any order, on any device; others for other seeds."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, VOCAB_SIZE, generator=generator)
    every = [
        SamplingParams(temperature=0.8, top_p=0.9, seed=3),
        SamplingParams(temperature=1.0),
        GREEDY,
        SamplingParams(temperature=1.5, top_k=20, min_p=0.01, repetition_penalty=1.2),
        SamplingParams(temperature=0.7, top_k=3, logprobs=2),
        SamplingParams(temperature=2.0, logit_bias={4: 3.0}),
    ]
    lengths = [3, 9, 4, 5, 3, 7]

    def run(order: list[int], shift: int, *, seed: int = 40, on: str = device) -> dict[int, int]:
        """order: the request at each place of the batch; request i is in row `(i + shift) % 8`."""
        row = {request: (request + shift) % 8 for request in order}
        new_rows = [
            new_row(row[i], list(range(lengths[i])), every[i], seed=seed + i) for i in order
        ]
        rows = admit(*new_rows, device=on)
        result = sample(rows, logits[order].to(on), {row[i]: lengths[i] for i in order})
        return dict(zip(order, result.token_ids.tolist(), strict=True))

    together = run(list(range(6)), 0, on="cpu")
    assert run([5, 2, 0, 3, 1, 4], 3) == together
    for request in range(6):
        assert run([request], 7) == {request: together[request]}
    assert run(list(range(6)), 0, seed=40 + 2**33) != together


def test_logprobs_are_raw_and_only_for_rows_that_ask() -> None:
    params = [
        GREEDY,
        SamplingParams(temperature=0.0, logprobs=0, logit_bias={5: 100.0}),
        SamplingParams(temperature=0.0, logprobs=3),
    ]
    rows = admit(*(new_row(row, [1], p) for row, p in enumerate(params)))
    sampled = sample(rows, ramp(3), {0: 1, 1: 1, 2: 1})
    assert sampled.logprobs is not None
    assert sampled.logprob_indices == [1, 2]
    biased, plain = sampled.logprobs.unpack(sampled.num_top_logprobs)
    expected = ramp(1)[0].double().log_softmax(0)
    assert (biased.token_id, biased.rank, biased.top_ids) == (5, VOCAB_SIZE - 5, [])
    assert abs(biased.logprob - expected[5].item()) < 1e-5
    assert (plain.token_id, plain.rank) == (TOP, 1)
    assert plain.top_ids == [TOP, TOP - 1, TOP - 2]
    assert np.allclose(plain.top_logprobs, expected[[TOP, TOP - 1, TOP - 2]], atol=1e-5)


def test_logprobs_of_the_whole_vocabulary() -> None:
    params = SamplingParams(temperature=0.0, logprobs=-1)
    sampled = sample(admit(new_row(0, [1], params)), ramp(1), {0: 1})
    assert sampled.logprobs is not None
    (all_of_them,) = sampled.logprobs.unpack(sampled.num_top_logprobs)
    assert all_of_them.top_ids == list(range(TOP, -1, -1))
    assert abs(np.exp(all_of_them.top_logprobs).sum() - 1) < 1e-5


def test_a_row_forgets_the_edits_of_its_former_owner() -> None:
    rows = admit(new_row(0, [1], greedy(allowed_token_ids=[3])))
    rows.write(torch.from_numpy(rows.record(make_plan(1, [], new_rows=[new_row(0, [1])]))))
    assert sample(rows, ramp(1), {0: 1}).token_ids.tolist() == [TOP]


def test_rows_ask_for_none_some_and_all_alternatives_in_one_batch() -> None:
    """As wide as the widest needs; each gets what it asked for."""
    wanted = [2, -1, 0]
    rows = admit(
        *(
            new_row(i, [1, 2], SamplingParams(temperature=0.0, logprobs=n))
            for i, n in enumerate(wanted)
        )
    )
    sampled = sample(rows, ramp(3), {0: 2, 1: 2, 2: 2})
    assert sampled.logprobs is not None
    found = sampled.logprobs.unpack(sampled.num_top_logprobs)
    assert [len(one.top_ids) for one in found] == [2, VOCAB_SIZE, 0]
    for one in found:
        assert one.top_ids == list(range(VOCAB_SIZE))[::-1][: len(one.top_ids)]
        assert (one.token_id, one.rank) == (TOP, 1)
    assert abs(np.exp(found[1].top_logprobs).sum() - 1) < 1e-5
