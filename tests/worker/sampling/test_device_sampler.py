"""The kernels' second half of a step against the plain torch sampler: id by id, over several steps.

Rows ask for random combinations, come and go, and sample beside rows that ask for nothing.
"""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm.protocol.plan import NewRow, StepMasks, TokenLogprobs
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.cuda_graph import CallGraphs, CudaGraphs
from nanovllm.worker.forward_batch import SampleSlot, expand_view
from nanovllm.worker.kernels.select import FusedStep
from nanovllm.worker.kernels.triton.edit_logits import sample_edited
from nanovllm.worker.kernels.triton.fused_sampler import sample_tokens
from nanovllm.worker.kernels.triton.slice_sampler import sample_slices
from nanovllm.worker.kernels.triton.token_logprobs import pack_logprobs, pack_wished
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling import device_sampler, edit_tables, logprobs
from nanovllm.worker.sampling.columns import COLUMNS, NEUTRAL, Int32Array
from nanovllm.worker.sampling.device_sampler import DeviceSampler, Kind
from nanovllm.worker.sampling.sampler import OnHost, Sampler, SamplingTargets
from tests.worker.called_graphs import CalledGraphs
from tests.worker.kernels.triton_device import DEVICE
from tests.worker.planning import (
    EOS,
    VOCAB_SIZE,
    make_masks,
    make_plan,
    make_rows,
    new_row,
    rows_with_biases,
)
from tests.worker.warmup.compiling import run_compiling

FUSED = FusedStep(
    expand_view, sample_tokens, sample_slices, sample_edited, pack_wished, pack_logprobs
)
CPU = torch.device("cpu")
EDITS: list[dict[str, object]] = [
    {"allowed_token_ids": [3, 5, 8, 90, 91, 92, 199]},
    {"logit_bias": {5: 3.0, 90: -100.0, 199: 100.0}},
    {"min_tokens": 4, "stop_token_ids": [90, 199]},
    {"allowed_token_ids": [8, 9], "logit_bias": {9: 2.5, 8: -1.0, 7: 100.0}, "min_tokens": 2},
]
PENALTIES: list[dict[str, object]] = [
    {"repetition_penalty": 1.7},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"repetition_penalty": 0.6, "presence_penalty": -1.0, "frequency_penalty": 2.0},
]
DRAWS: list[dict[str, object]] = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05},
]
WORDS = [[[7]], [[7], [8, 9], [9, 3, 4], [5, 199]], [[i, i + 1] for i in range(150)]]


class Pair:
    """The same rows twice: in plain torch on the CPU, and for kernels."""

    def __init__(self) -> None:
        self.plain = make_rows()
        self.fused = make_rows(device=str(DEVICE))
        self.sampler = Sampler(self.plain)
        self.calls = CallGraphs(CudaGraphs() if DEVICE.type == "cuda" else CalledGraphs())
        self.device_sampler = DeviceSampler(self.fused, FUSED, calls=self.calls)
        self.length: dict[int, int] = {}

    def captured(self) -> list[Kind]:
        """Kinds of second halves that have graphs."""
        return [key[0] for key in self.calls._captured]  # type: ignore[index]

    def admit(self, *new_rows: NewRow) -> None:
        for rows in (self.plain, self.fused):
            plan = make_plan(0, [], new_rows=list(new_rows))
            rows.write(torch.from_numpy(rows.record(plan)).to(rows.seeds.device))
        for new in new_rows:
            self.length[new.row] = len(new.token_ids)

    def step(self, order: list[int], logits: Tensor, masks: StepMasks | None = None) -> list[int]:
        """Sample for these rows by both, and compare. logits: [len(order), VOCAB_SIZE] fp32."""
        rows = np.array(order, np.int32)
        positions = np.array([self.length[row] for row in order], np.int32)
        targets = SamplingTargets.of(rows, positions, CPU)
        if masks is not None:
            self.plain.masks.take(masks)
            self.fused.masks.take(masks)
        expected = self.sampler.sample(logits.clone(), targets, masks)
        self.plain.token_ids[targets.rows, targets.positions] = expected.token_ids.int()
        slot = self.device_sampler.staging.take()
        found = self.run_fused(slot, rows, positions, logits.to(DEVICE), masks)
        assert found.token_ids.tolist() == expected.token_ids.tolist()
        known = self.fused.token_ids.cpu()
        assert torch.equal(known[:-1], self.plain.token_ids[:-1]), "all but the padding row"
        check_logprobs(found, OnHost.of(expected))
        slot.give_back()
        for row in order:
            self.length[row] += 1
        return expected.token_ids.tolist()

    def run_fused(
        self,
        slot: SampleSlot,
        rows: Int32Array,
        positions: Int32Array,
        logits: Tensor,
        masks: StepMasks | None,
    ) -> OnHost:
        """Both halves, and wait."""
        on_device = [torch.from_numpy(array).to(DEVICE) for array in (rows, positions)]
        sample_tokens(
            logits,
            rows=on_device[0],
            positions=on_device[1],
            columns=self.fused.columns,
            seeds=self.fused.seeds,
            known=self.fused.token_ids,
            out=self.device_sampler.staging.token_ids,
        )
        before = logits.clone()
        sampled = self.device_sampler.sample(
            logits, slot, rows=rows, positions=positions, masks=masks
        )
        assert torch.equal(logits, before), "the model's own are kept"
        if slot.done is not None:
            slot.done.record()
            slot.done.synchronize()
        return sampled


def check_logprobs(found: OnHost, expected: OnHost) -> None:
    ours, theirs = found.unpack_logprobs(), expected.unpack_logprobs()
    assert ours.keys() == theirs.keys()
    for index, one in ours.items():
        check_one(one, theirs[index])


def check_one(ours: TokenLogprobs, theirs: TokenLogprobs) -> None:
    assert (ours.token_id, ours.rank, ours.top_ids) == (
        theirs.token_id,
        theirs.rank,
        theirs.top_ids,
    )
    assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
    assert ours.top_logprobs == pytest.approx(theirs.top_logprobs, abs=1e-5)


@pytest.fixture
def logits() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, VOCAB_SIZE, generator=generator) * 3


def params_of(rng: random.Random, *, index: int) -> SamplingParams:
    fields: dict[str, object] = {"max_tokens": 60, **rng.choice(DRAWS)}
    if index % 4:  # every fourth row asks for nothing more
        for choices in (EDITS, PENALTIES):
            if rng.random() < 0.6:
                fields |= rng.choice(choices)
        if rng.random() < 0.4:
            fields["logprobs"] = rng.choice([0, 1, 5, 20])
    return SamplingParams(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(6))
def test_random_lives_choose_what_plain_torch_chooses(seed: int, logits: Tensor) -> None:
    rng = random.Random(seed)
    pair = Pair()
    for step in range(6):
        for row in range(8):
            if step == 0 or rng.random() < 0.25:  # somebody else's now
                tokens = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 12))]
                pair.admit(
                    new_row(
                        row,
                        tokens,
                        params_of(rng, index=row),
                        num_prompt_tokens=rng.randint(1, len(tokens)),
                        seed=rng.getrandbits(60),
                        bad_words_token_ids=rng.choice(WORDS) if row % 4 == 2 else [],
                    )
                )
        order = rng.sample(range(8), rng.randint(1, 8))
        allowed = {
            index: sorted(rng.sample(range(VOCAB_SIZE), rng.choice([1, 3, 60])))
            for index in range(len(order))
            if rng.random() < 0.3
        }
        pair.step(order, logits[rng.sample(range(8), len(order))], make_masks(allowed))


@pytest.mark.parametrize("length", [1, 5, 1024, 1500])
def test_counts_catch_up_with_what_a_row_has_got(length: int, logits: Tensor) -> None:
    """Also with tokens that were not sampled here, and with those of the prompt alone."""
    rows = RequestRows(
        num_rows=2,
        max_model_len=2000,
        block_size=16,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=[EOS],
        device=DEVICE,
    )
    rng = random.Random(0)
    tokens = [rng.randrange(VOCAB_SIZE) for _ in range(length)]
    params = SamplingParams(temperature=0.0, repetition_penalty=1.2)
    pair = Pair()
    pair.fused, pair.plain = rows, make_wide_rows()
    pair.sampler = Sampler(pair.plain)
    pair.device_sampler = DeviceSampler(rows, FUSED)
    pair.admit(new_row(1, tokens, params, num_prompt_tokens=(length + 1) // 2))
    pair.step([1], logits[:1])
    for known in (pair.plain.token_ids, rows.token_ids):  # as if a grammar had left no choice
        known[1, length + 1 : length + 4] = torch.tensor([17, 17, 4])
    pair.length[1] += 3
    pair.step([1], logits[:1])
    counts = pair.device_sampler._counts
    assert counts is not None
    whole = rows.token_ids[1, : length + 4].tolist()
    num_prompt = (length + 1) // 2
    for token in range(VOCAB_SIZE):
        expected = whole[num_prompt:].count(token) + ((token in whole[:num_prompt]) << 30)
        assert counts[1, token] == expected


def make_wide_rows() -> RequestRows:
    return RequestRows(
        num_rows=2,
        max_model_len=2000,
        block_size=16,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=[EOS],
        device=CPU,
    )


def test_a_grammar_wins_where_edits_leave_nothing(logits: Tensor) -> None:
    pair = Pair()
    greedy = {"temperature": 0.0, "max_tokens": 50}
    params = [
        SamplingParams(**greedy, allowed_token_ids=[8]),  # type: ignore[arg-type]
        SamplingParams(**greedy, min_tokens=4),  # type: ignore[arg-type]
        SamplingParams(**greedy, allowed_token_ids=[8, 5]),  # type: ignore[arg-type]
    ]
    pair.admit(*(new_row(row, [1, 2], one) for row, one in enumerate(params)))
    masks = make_masks({0: [5, 9], 1: [EOS], 2: [5, 9]})
    chosen = pair.step([0, 1, 2], logits[:3], masks)
    assert chosen[0] in (5, 9) and chosen[1:] == [EOS, 5]


@pytest.mark.parametrize("most", [device_sampler.MAX_CAPTURED, 4])
def test_whatever_few_ask_often_enough_to_be_captured_is_what_plain_torch_chooses(
    most: int, logits: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks alone, then beside what others ask, who come and go; also more than a graph has."""
    monkeypatch.setattr(device_sampler, "MAX_CAPTURED", most)
    rng = random.Random(most)
    pair = Pair()
    for row in range(8):
        params = SamplingParams(**DRAWS[row % 4], max_tokens=99)  # type: ignore[arg-type]
        if row == 7:
            params = SamplingParams(logprobs=5, max_tokens=99)
        pair.admit(new_row(row, [row, 3], params, seed=rng.getrandbits(60)))
    for step in range(40):
        if step in (16, 24, 28, 32, 36):
            params = params_of(rng, index=1)
            words = WORDS[1] if step > 24 else []
            pair.admit(new_row(step % 7, [5], params, seed=1, bad_words_token_ids=words))
        order = rng.sample(range(8), 8)
        indices = sorted(rng.sample(range(8), 1 + step % 8))
        allowed = {i: sorted(rng.sample(range(VOCAB_SIZE), rng.choice([1, 60]))) for i in indices}
        masks = make_masks(allowed, first_line=step % 5)
        chosen = pair.step(order, logits[rng.sample(range(8), 8)], masks)
        if step < 16:
            assert all(chosen[index] in ids for index, ids in allowed.items())
    assert pair.captured() and all(kind.num_edited <= most for kind in pair.captured())


def test_a_kind_is_captured_when_it_comes_again_and_follows_tables_to_new_memory(
    logits: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edit_tables, "LEAST_CAPACITY", 64)
    pair, places = Pair(), set()
    for turn in range(8):
        bias = {(turn * 9 + i) % VOCAB_SIZE: 10.0 + i for i in range(turn * turn + 1)}
        pair.admit(new_row(0, [1], SamplingParams(temperature=0.0, logit_bias=bias)))
        for step in range(2):
            pair.step([0], logits[:1])
            assert len(pair.captured()) == (turn + step > 0)
        places.add(pair.device_sampler._tables.words.data_ptr())
    assert len(places) > 2


def test_a_step_runs_what_it_asks_for_and_nothing_else(logits: Tensor) -> None:
    asks: list[dict[str, object]] = [
        {"logprobs": 2},
        {"repetition_penalty": 1.3},
        {"logit_bias": {7: 2.0}},
        {"logprobs": 20, "repetition_penalty": 1.3},
    ]
    pair = Pair()
    for row, one in enumerate(asks):
        pair.admit(new_row(row, [row, 1], SamplingParams(temperature=0.0, **one)))  # type: ignore[arg-type]
    pair.admit(new_row(4, [3]))
    orders = [[4], [4, 0], [1, 4], [4, 2], [2, 1, 4], [0, 2], [0], [3], [0, 1, 2, 3]]
    for order in orders * 3:
        pair.step(order, logits[: len(order)])
        pair.step(order, logits[: len(order)], make_masks({0: [5, 9, 60]}))
    found = {
        (bool(kind.num_edited), kind.has_edits, kind.has_penalties, bool(kind.num_told))
        for kind in pair.captured()
    }
    told_alone = {(False, False, False, True)}
    flags = [(edits, penalties) for edits in (False, True) for penalties in (False, True)]
    edited = {(True, *one, told) for one in flags for told in (False, True)}
    assert found == told_alone | edited


@pytest.mark.parametrize("num_top", [-1, 0, 3, 20])
def test_as_many_alternatives_as_are_asked_for(num_top: int, logits: Tensor) -> None:
    """Also all there are, beside others' fewer."""
    pair = Pair()
    for row, wanted in enumerate((num_top, 2, None, 0)):
        params = SamplingParams(temperature=0.0, logprobs=wanted, frequency_penalty=row % 2)
        pair.admit(new_row(row, [row, 1, 1], params))
    for order in ([0, 1, 2, 3], [3, 0], [0], [1, 3]):
        pair.step(order, logits[: len(order)])


def test_logits_of_ranks_are_gathered_if_somebody_asks(
    logits: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever they lie then."""
    pair, gathered = Pair(), list[Tensor]()

    def gather(part: Tensor) -> Tensor:
        assert part.shape[1] == VOCAB_SIZE // 2
        gathered.append(pair_logits.to(DEVICE).clone())
        return gathered[-1]

    monkeypatch.setattr(pair.device_sampler, "_vocabulary", SimpleNamespace(gather=gather))
    asks = SamplingParams(temperature=0.0, presence_penalty=1.0, logprobs=1)
    pair.admit(new_row(0, [1, 2], asks), new_row(1, [3], SamplingParams(temperature=0.0)))
    sample = pair.device_sampler.sample
    monkeypatch.setattr(
        pair.device_sampler,
        "sample",
        lambda whole, slot, **asked: sample(whole[:, : VOCAB_SIZE // 2], slot, **asked),
    )
    for step in range(5):
        pair_logits = logits[step : step + 2]
        pair.step([1, 0], pair_logits)
        assert len({one.data_ptr() for one in gathered}) == step + 1
    pair.step([1], logits[:1])
    assert len(gathered) == 5


def test_steps_under_way_keep_what_they_have_sampled(logits: Tensor) -> None:
    """Read late, and in another order than they were queued in."""
    pair = Pair()
    params = SamplingParams(temperature=0.0, logprobs=3, presence_penalty=0.5)
    pair.admit(new_row(0, [1, 2], params), new_row(1, [3]))
    rows, staging = np.array([0, 1], np.int32), pair.device_sampler.staging
    expected, under_way = [], []
    for step in range(5):
        some, slot = logits[step : step + 2], staging.take()
        positions = np.array([2 + step, 1 + step], np.int32)
        targets = SamplingTargets.of(rows, positions, CPU)
        sampled = pair.sampler.sample(some.clone(), targets)
        pair.plain.token_ids[targets.rows, targets.positions] = sampled.token_ids.int()
        expected.append(OnHost.of(sampled))
        under_way.append((slot, pair.run_fused(slot, rows, positions, some.to(DEVICE), None)))
    assert len({id(slot) for slot, _ in under_way}) == 5
    for step in (3, 0, 4, 1, 2):
        slot, found = under_way[step]
        assert found.token_ids.tolist() == expected[step].token_ids.tolist()
        check_logprobs(found, expected[step])
        slot.give_back()
        assert staging.take() is slot


def test_tables_survive_the_move_to_new_memory(
    logits: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edit_tables, "LEAST_CAPACITY", 64)
    pair = Pair()
    for turn in range(6):
        pair.admit(*rows_with_biases(turn, vocab_size=VOCAB_SIZE))
        pair.step(list(range(8)), logits)


def test_nothing_is_kept_for_rows_that_ask_for_nothing(logits: Tensor) -> None:
    pair = Pair()
    pair.admit(new_row(0, [1]), new_row(1, [2], SamplingParams(temperature=0.9, top_p=0.8)))
    pair.step([0, 1], logits[:2])
    assert pair.device_sampler._counts is None and not pair.calls._seen


@pytest.mark.parametrize("vocab_size", [7, 2048, 5000])
@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_packed_logprobs_equal_plain_torchs(vocab_size: int, num_top: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(5, vocab_size, generator=generator).to(DEVICE) * 4
    logits[1, vocab_size // 2 :] = -torch.inf
    token_ids = torch.randint(0, vocab_size // 2, (5,), generator=generator).to(DEVICE)
    ours = pack_logprobs(logits, token_ids, num_top=num_top)
    theirs = logprobs.pack_logprobs(logits, token_ids, num_top=num_top)
    assert ours.shape == theirs.shape
    pairs = (logprobs.PackedLogprobs(words.cpu()).unpack([num_top] * 5) for words in (ours, theirs))
    for one, other in zip(*pairs, strict=True):
        assert (one.token_id, one.rank) == (other.token_id, other.rank)
        finite = [i for i, value in enumerate(other.top_logprobs) if value > -np.inf]
        assert [one.top_ids[i] for i in finite] == [other.top_ids[i] for i in finite]
        assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-5)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


def test_of_equal_logits_the_first_are_the_likeliest() -> None:
    logits = torch.zeros(1, 300, device=DEVICE)
    logits[0, [40, 299, 7]] = 2.0
    words = pack_logprobs(logits, torch.tensor([299], device=DEVICE), num_top=5)
    (found,) = logprobs.PackedLogprobs(words.cpu()).unpack([5])
    assert found.top_ids == [7, 40, 299, 0, 1] and found.rank == 1


def test_half_precision_logits_are_edited_in_single(logits: Tensor) -> None:
    """A penalty is not rounded to the precision that the model computes in."""
    half = logits.bfloat16().float()
    pair = Pair()
    params = SamplingParams(temperature=0.9, repetition_penalty=1.1, logit_bias={5: 0.001})
    pair.admit(*(new_row(row, [*range(row, 60)], params, seed=row) for row in range(8)))
    rows, positions = (
        np.arange(8, dtype=np.int32),
        np.array([pair.length[row] for row in range(8)], np.int32),
    )
    expected = pair.sampler.sample(half.clone(), SamplingTargets.of(rows, positions, CPU))
    slot = pair.device_sampler.staging.take()
    found = pair.run_fused(slot, rows, positions, half.bfloat16().to(DEVICE), None)
    assert found.token_ids.tolist() == expected.token_ids.tolist()


def test_it_compiles_for_hopper_without_spilling() -> None:
    found = run_compiling("compile_for_gpu.py", "asking")
    assert len(found) == 8
    for case, usage in found.items():
        assert usage["spilled"] == 0, case
        assert usage["registers"] <= 128, (case, usage)


def test_every_column_but_the_fused_samplers_own_makes_an_entry_ask() -> None:
    """A column that is added must be respected by both samplers."""
    respected = {"temperature", "top_k", "top_p", "min_p", "logprobs", "prompt_logprobs"}
    respected |= {"repetition_penalty", "presence_penalty", "frequency_penalty"}
    assert {column.name for column in COLUMNS} == respected
    assert NEUTRAL["num_counted"] == 0
