"""The native sampler against the plain one (`sampling.sampler`), whatever rows ask for."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm.protocol.plan import NewRow, StepMasks
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.kernels.native import library as native

if (unusable := native.unusable()) is not None:
    pytest.skip(unusable, allow_module_level=True)

from nanovllm.worker.kernels.native.sampler import NativeSampler
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling import edit_tables
from nanovllm.worker.sampling.columns import COLUMNS
from nanovllm.worker.sampling.logprobs import PackedLogprobs, pack_logprobs
from nanovllm.worker.sampling.sampler import Sampled, Sampler, SamplingTargets
from tests.worker.kernels.test_fused_sampler import plain
from tests.worker.planning import EOS, make_plan, new_row, rows_with_biases
from tests.worker.sampling.test_device_sampler import DRAWS, EDITS, PENALTIES, WORDS

DRAWN_BY = ("temperature", "top_k", "top_p", "min_p")
CPU = torch.device("cpu")
VOCAB_SIZE = 1003  # seven segments and a part of one


@pytest.fixture(params=native.runnable_isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> None:
    native.use(request.param, num_threads=2)


def make_rows(num_rows: int = 8, *, max_model_len: int = 64) -> RequestRows:
    return RequestRows(
        num_rows=num_rows,
        max_model_len=max_model_len,
        block_size=4,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=[EOS],
        device=CPU,
    )


def random_logits(num_rows: int, vocab_size: int = VOCAB_SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, vocab_size, generator=generator) * 3


def masks_of(allowed: dict[int, list[int]], *, shifted_by: int = 0) -> StepMasks | None:
    """line → the ids that may be sampled there. shifted_by: where in a buffer the bits begin."""
    if not allowed:
        return None
    bits = np.zeros((len(allowed), -(-VOCAB_SIZE // 32) * 32), np.uint8)
    for line, token_ids in zip(bits, allowed.values(), strict=True):
        line[token_ids] = 1
    packed = bytes(shifted_by) + np.packbits(bits, bitorder="little").tobytes()
    lines = list(range(7, 7 + len(allowed)))
    return StepMasks(list(allowed), lines, lines, memoryview(packed)[shifted_by:])


# ---- draws


def check_draws(logits: Tensor, **values: list[float]) -> None:
    """values: of columns; the others are neutral."""
    num_rows = len(logits)
    rows = make_rows(num_rows)
    for column in COLUMNS:
        rows.columns[column.name].fill_(column.neutral)
    for name, given in values.items():
        rows.columns[name][:num_rows] = torch.tensor(given)
    generator = torch.Generator().manual_seed(1)
    rows.seeds.random_(-(2**62), 2**62, generator=generator)
    positions = torch.randint(2**40, (num_rows,), generator=generator)
    drawn_by = {name: rows.columns[name] for name in DRAWN_BY}
    expected = plain(logits, drawn_by, rows.seeds, positions)
    order = torch.randperm(num_rows, generator=generator)  # lines are not in the rows' order
    places = order.int().numpy()
    targets = SamplingTargets(order, positions[order], places, positions[order].int().numpy())
    found = NativeSampler(rows).sample(logits[order], targets)
    assert found.token_ids.tolist() == expected[order].tolist()


def test_temperature_and_greedy() -> None:
    logits = random_logits(8)
    logits[3, 700:] = float("-inf")
    logits[0, 1002] = logits[5, 3] = logits[5, 700] = 19.0  # the first of equals
    check_draws(logits, temperature=[0.0, 0.6, 1.0, 0.8, 5.0, 0.0, 1e-3, 1.0])


def test_one_truncation_at_a_time() -> None:
    warm = [1.0] * 8
    logits = random_logits(8)
    logits[1, ::7] = logits[1, 0]  # equals, all kept or none
    check_draws(logits, temperature=warm, top_k=[1, 5, 50, 300, 1002, 1003, 5000, 0])
    check_draws(logits, temperature=warm, top_p=[1e-9, 0.1, 0.5, 0.9, 0.99, 0.999999, 1.0, 0.3])
    check_draws(logits, temperature=warm, min_p=[0.0, 1e-4, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0])


def test_all_truncations_of_many_rows() -> None:
    torch.manual_seed(1)
    count = 120
    check_draws(
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
    check_draws(logits, temperature=[1.0] * 4, top_k=[0, 2, 0, 0], top_p=[1.0, 0.5, 0.1, 1.0])


def test_no_rows() -> None:
    rows, nothing = make_rows(), np.empty(0, np.int32)
    targets = SamplingTargets.of(nothing, nothing, CPU)
    assert NativeSampler(rows).sample(torch.empty(0, VOCAB_SIZE), targets).token_ids.tolist() == []


# ---- what else rows ask for


class Pair:
    """The same rows, sampled by both."""

    def __init__(self, num_rows: int = 8, *, max_model_len: int = 64) -> None:
        self.rows = make_rows(num_rows, max_model_len=max_model_len)
        self.plain = Sampler(self.rows)
        self.native = Sampler(self.rows, NativeSampler(self.rows))
        self.length: dict[int, int] = {}

    def admit(self, *new_rows: NewRow) -> None:
        plan = make_plan(0, [], new_rows=list(new_rows))
        self.rows.write(torch.from_numpy(self.rows.record(plan)))
        self.length |= {new.row: len(new.token_ids) for new in new_rows}

    def step(self, order: list[int], logits: Tensor, masks: StepMasks | None = None) -> list[int]:
        """Sample for these rows by both, and compare. logits: [len(order), VOCAB_SIZE]."""
        positions = np.array([self.length[row] for row in order], np.int32)
        targets = SamplingTargets.of(np.array(order, np.int32), positions, CPU)
        if masks is not None:
            self.rows.masks.take(masks)
        expected = self.plain.sample(logits.clone(), targets, masks)
        found = self.native.sample(logits.clone(), targets, masks)
        assert found.token_ids.tolist() == expected.token_ids.tolist()
        check_logprobs(found, expected, logits)
        self.rows.token_ids[targets.rows, targets.positions] = found.token_ids.int()
        for row in order:
            self.length[row] += 1
        return found.token_ids.tolist()


def check_logprobs(found: Sampled, expected: Sampled, logits: Tensor) -> None:
    """Ids and ranks are plain torch's; values are within 1e-6 of what they would be exactly."""
    assert found.logprob_indices == expected.logprob_indices
    assert found.num_top_logprobs == expected.num_top_logprobs
    assert (found.logprobs is None) == (expected.logprobs is None)
    if found.logprobs is None or expected.logprobs is None:
        return
    exact = logits.double().log_softmax(-1)
    pairs = (one.unpack(found.num_top_logprobs) for one in (found.logprobs, expected.logprobs))
    for line, ours, theirs in zip(found.logprob_indices, *pairs, strict=True):
        assert (ours.token_id, ours.rank) == (theirs.token_id, theirs.rank)
        assert ours.top_ids == theirs.top_ids
        ids = [ours.token_id, *ours.top_ids]
        values = torch.tensor([ours.logprob, *ours.top_logprobs], dtype=torch.float64)
        assert torch.allclose(values, exact[line, ids], rtol=1e-7, atol=1e-6)


def params_of(rng: random.Random) -> SamplingParams:
    """Each of the kinds of wishes or not, whatever the others are."""
    fields: dict[str, object] = {"max_tokens": 60, **rng.choice(DRAWS)}
    for choices in (EDITS, PENALTIES):
        if rng.random() < 0.4:
            fields |= rng.choice(choices)
    if rng.random() < 0.4:
        fields["logprobs"] = rng.choice([0, 1, 5, 20, -1])
    return SamplingParams(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(8))
def test_random_lives_choose_what_plain_torch_chooses(seed: int) -> None:
    """Rows come and go, in the order of no step: also those who are preempted and come again."""
    rng, pair, logits = random.Random(seed), Pair(), random_logits(8)
    for step in range(8):
        for row in range(8):
            if step == 0 or rng.random() < 0.25:
                tokens = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 12))]
                pair.admit(
                    new_row(
                        row,
                        tokens,
                        params_of(rng),
                        num_prompt_tokens=rng.randint(1, len(tokens)),
                        seed=rng.getrandbits(60),
                        bad_words_token_ids=rng.choice([[], [], *WORDS]),
                    )
                )
        order = rng.sample(range(8), rng.randint(1, 8))
        some = rng.choice([1, 3, 60, VOCAB_SIZE - 2])
        allowed = {
            line: sorted(rng.sample(range(VOCAB_SIZE), some))
            for line in range(len(order))
            if rng.random() < 0.3
        }
        pair.step(order, logits[rng.sample(range(8), len(order))], masks_of(allowed))


@pytest.mark.parametrize("num_tokens", [1, 5, 1200])
def test_penalties_of_short_and_long_rows(num_tokens: int) -> None:
    """Some tokens occur often, in the prompt, the output or both; others never."""
    rng, pair = random.Random(num_tokens), Pair(max_model_len=2000)
    for row in range(8):
        tokens = [rng.randrange(0, VOCAB_SIZE, 1 + row) for _ in range(num_tokens)]
        params = SamplingParams(**PENALTIES[row % 3], temperature=0.9 * (row % 2), max_tokens=60)  # type: ignore[arg-type]
        num_prompt_tokens = rng.randint(1, num_tokens)
        pair.admit(new_row(row, tokens, params, num_prompt_tokens=num_prompt_tokens, seed=row))
    for _ in range(4):
        pair.step(list(range(8)), random_logits(8))


def test_edited_logits_are_plain_torchs_to_the_bit() -> None:
    """Of rows that ask for edits, a mask or penalties alone: theirs are edited in place, and those
    of their neighbours stay as they are."""
    logits = random_logits(4)
    edits = SamplingParams(logit_bias={5: 0.1, 900: -7.0}, min_tokens=3, max_tokens=9)
    penalties = SamplingParams(repetition_penalty=1.1, frequency_penalty=0.3, presence_penalty=0.1)
    pair = Pair()
    pair.admit(*(new_row(row, [5, 7, 7, 1002, 3], num_prompt_tokens=2) for row in (0, 2)))
    pair.admit(new_row(1, [1], edits), new_row(3, [5, 7, 7, 3], penalties, num_prompt_tokens=2))
    positions = np.array([5, 1, 5, 4], np.int32)
    targets = SamplingTargets.of(np.arange(4, dtype=np.int32), positions, CPU)
    masks = masks_of({2: [3, 900]})
    assert masks is not None
    pair.rows.masks.take(masks)
    results = []
    for sampler in (pair.plain, pair.native):
        results.append(logits.clone())
        sampler.sample(results[-1], targets, masks)
    assert torch.equal(*results)
    assert torch.equal(results[1][0], logits[0])


def test_a_grammar_wins_where_edits_leave_nothing() -> None:
    pair = Pair()
    greedy = {"temperature": 0.0, "max_tokens": 50, "logprobs": 2}
    params = [
        SamplingParams(**greedy, allowed_token_ids=[8]),  # type: ignore[arg-type]
        SamplingParams(**greedy, min_tokens=4),  # type: ignore[arg-type]
        SamplingParams(**greedy, allowed_token_ids=[8, 5]),  # type: ignore[arg-type]
    ]
    pair.admit(*(new_row(row, [1, 2], one) for row, one in enumerate(params)))
    masks = masks_of({0: [5, 9], 1: [EOS], 2: [5, 9]})
    chosen = pair.step([0, 1, 2], random_logits(3), masks)
    assert chosen[0] in (5, 9) and chosen[1:] == [EOS, 5]


@pytest.mark.parametrize("shifted_by", range(4))
def test_masks_may_lie_anywhere_in_a_frame(shifted_by: int) -> None:
    pair = Pair()
    pair.admit(*(new_row(row, [1]) for row in range(3)))
    ids = [[VOCAB_SIZE - 1], list(range(64, 192)), [0, 31, 32, 63, 64, 65]]
    masks = masks_of(dict(enumerate(ids)), shifted_by=shifted_by)
    chosen = pair.step([2, 0, 1], random_logits(3), masks)
    assert all(token in some for token, some in zip(chosen, ids, strict=True))


def test_tables_survive_the_move_to_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edit_tables, "LEAST_CAPACITY", 64)
    pair = Pair()
    for turn in range(6):
        pair.admit(*rows_with_biases(turn, vocab_size=VOCAB_SIZE))
        pair.step(list(range(8)), random_logits(8))


def test_a_row_whose_edits_cannot_be_made_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    pair.admit(
        new_row(0, [1], SamplingParams(logit_bias={5: 1.0})),
        new_row(1, [1], SamplingParams(temperature=0.0, logit_bias={900: 100.0})),
    )
    pack = edit_tables.pack_edits

    def failing(edits: edit_tables.RowEdits) -> edit_tables.Int32Array:
        if 5 in edits.biased_ids:
            raise RuntimeError("no")
        return pack(edits)

    monkeypatch.setattr(edit_tables, "pack_edits", failing)
    targets = SamplingTargets.of(np.array([0, 1], np.int32), np.ones(2, np.int32), CPU)
    assert pair.native.sample(random_logits(2), targets).token_ids[1] == 900
    assert pair.rows.failures == {0: "RuntimeError: no"}


# ---- log-probabilities


def packed_by_both(logits: Tensor, token_ids: Tensor, *, num_top: int) -> tuple[Tensor, Tensor]:
    sampler = NativeSampler(make_rows())
    return (
        sampler.pack_logprobs(logits, token_ids, num_top=num_top),
        pack_logprobs(logits, token_ids, num_top=num_top),
    )


@pytest.mark.parametrize("vocab_size", [7, 128, 1003, 50_000])
@pytest.mark.parametrize("num_top", [0, 1, 5, 20, 300, -1])
def test_packed_logprobs_equal_plain_torchs(vocab_size: int, num_top: int) -> None:
    logits = random_logits(5, vocab_size)
    logits[1, vocab_size // 2 :] = -torch.inf
    logits[2] = logits[2].sort().values  # each segment is likelier than all before it
    logits[3] *= 30
    exact = logits.double().log_softmax(-1)
    token_ids = torch.randint(0, vocab_size // 2, (5,), generator=torch.Generator().manual_seed(1))
    for lines in (torch.arange(5), torch.tensor([3, 1])):
        ours, theirs = packed_by_both(logits[lines], token_ids[lines], num_top=num_top)
        assert ours.shape == theirs.shape
        tops = [num_top] * len(ours)
        pairs = (PackedLogprobs(words).unpack(tops) for words in (ours, theirs))
        for line, one, other in zip(lines.tolist(), *pairs, strict=True):
            assert (one.token_id, one.rank) == (other.token_id, other.rank)
            finite = [i for i, value in enumerate(other.top_logprobs) if value > -np.inf]
            found = torch.tensor(one.top_logprobs, dtype=torch.float64)
            assert torch.allclose(found, exact[line, one.top_ids], rtol=1e-7, atol=1e-6)
            assert found.sort(descending=True).values.equal(found)
            # Of values that are equal in single precision, torch takes any order.
            values = logits[line]
            assert values[one.top_ids[: len(finite)]].equal(values[other.top_ids[: len(finite)]])
            assert one.logprob == pytest.approx(
                exact[line, one.token_id].item(), rel=1e-7, abs=1e-6
            )


def test_of_equal_logits_the_first_are_the_likeliest() -> None:
    logits = torch.zeros(1, 300)
    logits[0, [40, 299, 7]] = 2.0
    logits[0, 3] = -0.0  # as likely as the other zeros
    words = NativeSampler(make_rows()).pack_logprobs(logits, torch.tensor([299]), num_top=7)
    (found,) = PackedLogprobs(words).unpack([7])
    assert found.top_ids == [7, 40, 299, 0, 1, 2, 3] and found.rank == 1


def test_lines_without_numbers_disturb_no_others() -> None:
    """Of a model that has gone wrong: ids are ids, and each alternative is another one."""
    logits = random_logits(4, 1003)
    expected = packed_by_both(logits, torch.zeros(4, dtype=torch.int64), num_top=20)[1]
    logits[0] = torch.nan
    logits[1, 5:] = torch.nan
    logits[3] = -torch.inf
    found = packed_by_both(logits, torch.zeros(4, dtype=torch.int64), num_top=20)[0]
    assert found[2, 3:23].equal(expected[2, 3:23])
    assert all(len(set(line)) == 20 for line in found[:, 3:23].tolist())
    assert found[:, 3:23].min() >= 0 and found[:, 3:23].max() < 1003
    pair = Pair()
    params = SamplingParams(repetition_penalty=1.1, logit_bias={3: 1.0}, logprobs=3)
    pair.admit(*(new_row(row, [1, 2], params) for row in range(4)))
    targets = SamplingTargets.of(np.arange(4, dtype=np.int32), np.full(4, 2, np.int32), CPU)
    chosen = pair.native.sample(logits, targets).token_ids
    assert chosen.min() >= 0 and chosen.max() < 1003
