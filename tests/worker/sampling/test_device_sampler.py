"""The kernels' second half of a step against the plain torch sampler: id by id, over several steps.

Rows ask for random combinations, come and go, and sample beside rows that ask for nothing.
"""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm.protocol.plan import NewRow, StepMasks, TokenLogprobs
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.forward_batch import expand_view
from nanovllm.worker.kernels.select import FusedStep
from nanovllm.worker.kernels.triton.edit_logits import edit_logits
from nanovllm.worker.kernels.triton.fused_sampler import sample_tokens
from nanovllm.worker.kernels.triton.slice_sampler import sample_slices
from nanovllm.worker.kernels.triton.token_logprobs import pack_logprobs
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling import edit_tables, edited_sampler, logprobs
from nanovllm.worker.sampling.columns import COLUMNS, NEUTRAL
from nanovllm.worker.sampling.device_sampler import DeviceSampler
from nanovllm.worker.sampling.sampler import Sampled, Sampler, SamplingTargets
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

FUSED = FusedStep(expand_view, sample_tokens, sample_slices, edit_logits, pack_logprobs)
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
        captures = DEVICE.type == "cuda"
        self.device_sampler = DeviceSampler(self.fused, FUSED, num_buffers=3, captures=captures)
        self.length: dict[int, int] = {}

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
        found = self.run_fused(rows, positions, logits.to(DEVICE), masks)
        assert found.token_ids.tolist() == expected.token_ids.tolist()
        known = self.fused.token_ids.cpu()
        assert torch.equal(known[:-1], self.plain.token_ids[:-1]), "all but the padding row"
        check_logprobs(found, expected)
        for row in order:
            self.length[row] += 1
        return expected.token_ids.tolist()

    def run_fused(
        self, rows: np.ndarray, positions: np.ndarray, logits: Tensor, masks: StepMasks | None
    ) -> Sampled:
        on_device = [torch.from_numpy(array).to(DEVICE) for array in (rows, positions)]
        chosen = sample_tokens(
            logits,
            rows=on_device[0],
            positions=on_device[1],
            columns=self.fused.columns,
            seeds=self.fused.seeds,
            known=self.fused.token_ids,
        )
        before = logits.clone()
        sampled = self.device_sampler.sample(
            logits, chosen, rows=rows, positions=positions, masks=masks
        )
        assert torch.equal(logits, before), "the model's own are kept"
        return sampled


def check_logprobs(found: Sampled, expected: Sampled) -> None:
    assert found.logprob_indices == expected.logprob_indices
    assert (found.logprobs is None) == (expected.logprobs is None)
    if found.logprobs is None or expected.logprobs is None:
        return
    unpacked = [
        sampled.logprobs.to_host().unpack(sampled.num_top_logprobs)  # type: ignore[union-attr]
        for sampled in (found, expected)
    ]
    for ours, theirs in zip(*unpacked, strict=True):
        check_one(ours, theirs)


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
    pair.device_sampler = DeviceSampler(rows, FUSED, num_buffers=2)
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


@pytest.mark.parametrize("most", [edited_sampler.MAX_CAPTURED, 4])
def test_whatever_few_ask_often_enough_to_be_captured_is_what_plain_torch_chooses(
    most: int, logits: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks alone, then beside what others ask, who come and go; also more than a graph has."""
    monkeypatch.setattr(edited_sampler, "MAX_CAPTURED", most)
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
        chosen = pair.step(order, logits[rng.sample(range(8), 8)], make_masks(allowed))
        if step < 16:
            assert all(chosen[index] in ids for index, ids in allowed.items())
    sampler = pair.device_sampler._edited
    assert sampler._staged.keys() == {4, 8}
    if DEVICE.type == "cuda":
        assert {kind.size for kind in sampler._captured} == ({4, 8} if most > 8 else {4})


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs an NVIDIA GPU")
def test_graphs_follow_tables_to_new_memory(
    logits: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edit_tables, "LEAST_CAPACITY", 64)
    pair, kinds = Pair(), set()
    for turn in range(12):
        bias = {(turn * 9 + i) % VOCAB_SIZE: 10.0 + i for i in range(turn * turn + 1)}
        pair.admit(new_row(0, [1], SamplingParams(temperature=0.0, logit_bias=bias)))
        for _ in range(3):
            pair.step([0], logits[:1])
        captured = pair.device_sampler._edited._captured.values()
        kinds |= {one.tables for one in captured}
    assert len(kinds) > 2


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
    assert pair.device_sampler._counts is None


@pytest.mark.parametrize("vocab_size", [7, 2048, 5000])
@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_packed_logprobs_equal_plain_torchs(vocab_size: int, num_top: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(5, vocab_size, generator=generator).to(DEVICE) * 4
    logits[1, vocab_size // 2 :] = -torch.inf
    token_ids = torch.randint(0, vocab_size // 2, (5,), generator=generator).to(DEVICE)
    for lines in (None, torch.tensor([3, 1], dtype=torch.int32, device=DEVICE)):
        ours = pack_logprobs(logits, token_ids, num_top=num_top, lines=lines)
        theirs = logprobs.pack_logprobs(logits, token_ids, num_top=num_top, lines=lines)
        assert ours.shape == theirs.shape
        tops = [num_top] * len(ours)
        pairs = (logprobs.PackedLogprobs(words.cpu()).unpack(tops) for words in (ours, theirs))
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
    found = pair.run_fused(rows, positions, half.bfloat16().to(DEVICE), None)
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
