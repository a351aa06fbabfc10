"""Steps on a model whose every logit is known: what the device remembers, and what comes back."""

import numpy as np
import pytest
import torch

from nanovllm.config import SchedulerConfig
from nanovllm.protocol.plan import StepResult, TokenLogprobs
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker import model_runner
from nanovllm.worker.cuda_graph import CallGraphs, StepGraphs, StepOutput, StepShape, Variant
from nanovllm.worker.forward_batch import ForwardBatch, expand_view
from nanovllm.worker.kernels.base import Residual
from nanovllm.worker.kernels.select import FusedStep
from nanovllm.worker.kernels.triton.edit_logits import sample_edited
from nanovllm.worker.kernels.triton.fused_sampler import sample_tokens
from nanovllm.worker.kernels.triton.slice_sampler import sample_slices
from nanovllm.worker.kernels.triton.token_logprobs import pack_logprobs, pack_wished
from nanovllm.worker.model_runner import ModelRunner
from nanovllm.worker.sampling.sampler import Sampler
from tests.worker.called_graphs import CalledGraphs
from tests.worker.fake_model import (
    FakeAttention,
    FakeModel,
    make_kv_cache,
    reference,
    reference_logits,
)
from tests.worker.kernels import triton_device  # noqa: F401  # mends the interpreter
from tests.worker.planning import (
    CUDA,
    ON_A_CPU_ALONE,
    blocks_of,
    make_masks,
    make_plan,
    make_rows,
    new_row,
)

PROMPTS = {3: [11, 12, 13, 14, 15, 16, 17, 18, 19], 0: [150, 2, 7], 5: [42]}


# Kernels of the ends of a step, in the interpreter.
FUSED = FusedStep(
    expand_view, sample_tokens, sample_slices, sample_edited, pack_wished, pack_logprobs
)


class UncapturedGraphs(StepGraphs):
    """Steps in their padded shapes, but run eagerly each time."""

    def run(self, shape: StepShape, variant: Variant) -> StepOutput:
        return self._step(shape, variant)


class LargerGraphs(UncapturedGraphs):
    """The largest of their kind stand in for all others."""

    def captured_shape_for(self, shape: StepShape, variant: Variant) -> StepShape:
        return max(one for one in self.shapes if one.is_decode == shape.is_decode)


PADDED = [pytest.param(name, marks=ON_A_CPU_ALONE) for name in ("cpu, padded", "cpu, padded more")]


@pytest.fixture(params=["cpu", *PADDED, CUDA])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where to run; "padded" runs steps in the shapes of CUDA graphs, "more" in larger ones."""
    graphs = LargerGraphs if request.param.endswith("more") else UncapturedGraphs
    monkeypatch.setattr(model_runner, "StepGraphs", graphs)
    return str(request.param)


def make_runner(
    device: str, model: FakeModel | None = None, attention: FakeAttention | None = None
) -> ModelRunner:
    device, _, padded = device.partition(", ")
    runner = ModelRunner(
        model or FakeModel(),
        attention or FakeAttention(),
        sampler=Sampler(make_rows(device=device)),
        kv_cache=make_kv_cache(device),
        limits=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=24).limits("cuda"),
        fused=FUSED if padded else None,
        captures=bool(padded),
    )
    if runner._device_sampler is not None:
        runner._device_sampler._calls = CallGraphs(CalledGraphs())
    return runner


def run(runner: ModelRunner, *args: object, **kwargs: object) -> StepResult:
    masks: dict[int, list[int]] = kwargs.pop("masks", {})  # type: ignore[assignment]
    plan = make_plan(*args, **kwargs)  # type: ignore[arg-type]
    return runner.execute(plan, make_masks(masks)).result()


def test_prefill_and_decode_of_mixed_rows(device: str) -> None:
    runner = make_runner(device)
    new_rows = [new_row(row, prompt) for row, prompt in PROMPTS.items()]
    entries = [(row, 0, len(prompt)) for row, prompt in PROMPTS.items()]
    outputs = [run(runner, 0, entries, new_rows=new_rows).token_ids]
    for step in range(1, 9):
        entries = [(row, len(prompt) + step - 1, 1) for row, prompt in PROMPTS.items()]
        outputs.append(run(runner, step, entries).token_ids)
    for column, prompt in enumerate(PROMPTS.values()):
        assert [ids[column] for ids in outputs] == reference(prompt, 9)


@pytest.mark.parametrize("chunk", [1, 2, 4, 5])
def test_chunks_equal_one_shot(device: str, chunk: int) -> None:
    prompt = PROMPTS[3]
    runner = make_runner(device)
    for start in range(0, len(prompt), chunk):
        size = min(chunk, len(prompt) - start)
        done = start + size == len(prompt)
        new_rows = [new_row(3, prompt)] if start == 0 else []
        sampling = [0] if done else []
        result = run(runner, start, [(3, start, size)], new_rows=new_rows, sampling=sampling)
        assert len(result.token_ids) == done
    assert result.token_ids == reference(prompt, 1)


def test_steps_submitted_before_earlier_results_are_read(device: str) -> None:
    runner = make_runner(device)
    first, late = PROMPTS[3], PROMPTS[0]
    handles = [
        runner.execute(make_plan(0, [(3, 0, 9)], new_rows=[new_row(3, first)])),
        runner.execute(make_plan(1, [(3, 9, 1), (0, 0, 3)], new_rows=[new_row(0, late)])),
        runner.execute(make_plan(2, [(0, 3, 1), (3, 10, 1)])),
        runner.execute(make_plan(3, [(3, 11, 1), (0, 4, 1)])),
    ]
    results = [handle.result() for handle in handles]
    assert [result.step for result in results] == [0, 1, 2, 3]
    ids = [result.token_ids for result in results]
    assert [ids[0][0], ids[1][0], ids[2][1], ids[3][0]] == reference(first, 4)
    assert [ids[1][1], ids[2][0], ids[3][1]] == reference(late, 3)


@pytest.mark.parametrize("start", [0, 8], ids=["in one step", "before"])
def test_attention_is_told_when_rows_read_what_the_step_writes(device: str, start: int) -> None:
    """Or is given so many tokens that it writes all first."""
    attention = FakeAttention()
    attention.most_at_once = 20
    runner = make_runner(device, attention=attention)
    first = PROMPTS[3]
    second = [*first[:8], 5, 7]
    blocks = [*blocks_of(3)[:2], blocks_of(0)[0]]
    if start:
        run(runner, 0, [(3, 0, start)], new_rows=[new_row(3, first)], sampling=[])
    new_rows = [new_row(0, second, block_ids=blocks)]
    if not start:
        new_rows.append(new_row(3, first))
    entries = [(3, start, len(first) - start), (0, 8, 2)]
    result = run(runner, 1, entries, new_rows=new_rows)
    assert result.token_ids == [*reference(first, 1), *reference(second, 1)]
    batch = attention.last
    assert batch is not None
    if "padded" in device:
        assert (batch.num_tokens > 20) is (start == 0 or "more" in device)
    else:
        assert batch.reads_new is (start == 0)


def test_a_row_is_taken_again_while_its_old_step_is_unread(device: str) -> None:
    runner = make_runner(device)
    old, new = PROMPTS[3], PROMPTS[0]
    handles = [
        runner.execute(make_plan(0, [(3, 0, 9)], new_rows=[new_row(3, old)])),
        runner.execute(make_plan(1, [(3, 0, 3)], new_rows=[new_row(3, new)])),
        runner.execute(make_plan(2, [(3, 3, 1)])),
    ]
    ids = [handle.result().token_ids[0] for handle in handles]
    assert ids == reference(old, 1) + reference(new, 2)


def test_preempted_sequence_continues_where_it_was(device: str) -> None:
    prompt = PROMPTS[3]
    expected = reference(prompt, 6)
    runner = make_runner(device)
    resumed = new_row(1, prompt + expected[:3], num_prompt_tokens=len(prompt))
    ids = run(runner, 0, [(1, 0, 12)], new_rows=[resumed]).token_ids
    for step, start in enumerate((12, 13), 1):
        ids += run(runner, step, [(1, start, 1)]).token_ids
    assert ids == expected[3:]


def check(logprobs: TokenLogprobs, context: list[int], token_id: int, num_top: int) -> None:
    expected = reference_logits(context).double().log_softmax(0)
    assert logprobs.token_id == token_id
    assert logprobs.logprob == pytest.approx(expected[token_id].item(), abs=1e-4)
    assert logprobs.rank == 1 + int((expected > expected[token_id]).sum())
    assert len(logprobs.top_ids) == num_top
    assert np.allclose(logprobs.top_logprobs, expected.topk(num_top).values, atol=1e-4)


@pytest.mark.parametrize("chunk", [3, 9])
def test_prompt_logprobs(device: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runner, "MAX_LOGIT_ROWS", 4)
    prompt = PROMPTS[3]
    model = FakeModel()
    runner = make_runner(device, model)
    params = SamplingParams(temperature=0.0, prompt_logprobs=2)
    found: list[TokenLogprobs] = []
    neighbour = new_row(0, PROMPTS[0])
    for start in range(0, len(prompt), chunk):
        # The entry that asks is the second, so that its tokens are not the first of the batch.
        new_rows = [new_row(3, prompt, params)] if start == 0 else []
        result = run(
            runner,
            start,
            [(0, 0, 3), (3, start, chunk)],
            new_rows=[neighbour, *new_rows],
            sampling=[0, 1] if start + chunk == len(prompt) else [0],
        )
        assert set(result.prompt_logprobs) == {1}
        found += result.prompt_logprobs[1]
    assert len(found) == len(prompt) - 1
    for position, logprobs in enumerate(found, 1):
        check(logprobs, prompt[:position], prompt[position], 2)
    assert model.max_logit_rows <= (8 if "padded" in device else 4)  # a padded step's rows
    assert not run(runner, 99, [(3, len(prompt), 1)]).prompt_logprobs


def test_sampled_logprobs_are_keyed_by_sample(device: str) -> None:
    runner = make_runner(device)
    params = SamplingParams(temperature=0.0, logprobs=3)
    new_rows = [new_row(0, PROMPTS[0]), new_row(3, PROMPTS[3], params), new_row(5, PROMPTS[5])]
    entries = [(0, 0, 2), (5, 0, 1), (3, 0, 9)]  # the first is a chunk and does not sample
    result = run(runner, 0, entries, new_rows=new_rows, sampling=[1, 2])
    assert set(result.logprobs) == {1}
    check(result.logprobs[1], PROMPTS[3], reference(PROMPTS[3], 1)[0], 3)


def test_seeded_draws_do_not_hang_on_chunks_rows_or_overlap(device: str) -> None:
    params = SamplingParams(temperature=500.0, seed=9)  # its logits are in the thousands
    prompt = PROMPTS[3]

    def generate(row: int, chunk: int) -> list[int]:
        runner = make_runner(device)
        handles = []
        new_rows = [new_row(row, prompt, params, seed=9)]
        for start in range(0, len(prompt), chunk):
            done = start + chunk >= len(prompt)
            entry = (row, start, min(chunk, len(prompt) - start))
            plan = make_plan(start, [entry], new_rows=new_rows, sampling=[0] if done else [])
            handles.append(runner.execute(plan))
            new_rows = []
        for position in range(len(prompt), len(prompt) + 8):
            handles.append(runner.execute(make_plan(position, [(row, position, 1)])))
        return [token_id for handle in handles for token_id in handle.result().token_ids]

    outputs = generate(0, 9)
    assert len(set(outputs)) > 4
    assert generate(6, 2) == outputs


def test_result_is_host_data_only(device: str) -> None:
    result = run(make_runner(device), 0, [(5, 0, 1)], new_rows=[new_row(5, PROMPTS[5])])
    assert all(type(token_id) is int for token_id in result.token_ids)
    assert not torch.is_inference_mode_enabled()


class FaultyModel(FakeModel):
    """Fails on its way through the forward passes named, after it has written to the cache."""

    def __init__(self, *failing: int) -> None:
        super().__init__()
        self._failing = failing
        self._num_forwards = 0

    def forward(
        self, batch: ForwardBatch, kv_cache: torch.Tensor, *, wanted: torch.Tensor | None = None
    ) -> Residual:
        self._num_forwards += 1
        residual = super().forward(batch, kv_cache, wanted=wanted)
        if self._num_forwards in self._failing:
            raise torch.OutOfMemoryError("no memory for the logits")
        return residual


@pytest.mark.parametrize("failing", [(1,), (2,), (2, 3), (1, 2, 3)])
def test_steps_after_one_that_raised_are_right(device: str, failing: tuple[int, ...]) -> None:
    """Rows of a failed step are admitted anew; rows that were not in it go on."""
    runner = make_runner(device, FaultyModel(*failing))
    spared, first = PROMPTS[5], PROMPTS[3]
    plans = [
        make_plan(
            0, [(3, 0, 9)], new_rows=[new_row(3, first, SamplingParams(logit_bias={7: 9.0}))]
        ),
        make_plan(1, [(3, 9, 1)]),
        make_plan(2, [(3, 10, 1)]),
    ]
    for number, plan in enumerate(plans, 1):
        if number in failing:
            with pytest.raises(torch.OutOfMemoryError):
                runner.execute(plan)
        else:
            runner.execute(plan)
    outputs = []
    admitted = [new_row(3, PROMPTS[0]), new_row(5, spared)]
    outputs.append(run(runner, 3, [(3, 0, 3), (5, 0, 1)], new_rows=admitted).token_ids)
    for step in range(1, 5):
        outputs.append(run(runner, 3 + step, [(3, 2 + step, 1), (5, step, 1)]).token_ids)
    assert [ids[0] for ids in outputs] == reference(PROMPTS[0], 5)
    assert [ids[1] for ids in outputs] == reference(spared, 5)


def test_a_mask_belongs_to_its_sample_in_prefill_and_decode(device: str) -> None:
    """Entry 0 does not sample, so the first mask is of entry 1."""
    runner = make_runner(device)
    long, short = PROMPTS[3], PROMPTS[0]
    logits = reference_logits(short)
    allowed = logits.argsort()[:5].tolist()  # the least likely ones
    result = run(
        runner,
        0,
        [(3, 0, 4), (0, 0, 3)],
        new_rows=[new_row(3, long), new_row(0, short)],
        sampling=[1],
        masks={0: allowed},
    )
    (first,) = result.token_ids
    assert first == max(allowed, key=lambda token_id: float(logits[token_id]))
    result = run(runner, 1, [(3, 4, 5), (0, 3, 1)], masks={1: [7]})
    assert result.token_ids == [reference(long, 1)[0], 7]
    result = run(runner, 2, [(0, 4, 1), (3, 9, 1)])
    assert result.token_ids == [reference([*short, first, 7], 1)[0], reference(long, 2)[1]]
