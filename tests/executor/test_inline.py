"""The inline executor on a small random Llama: plans in, tokens out, by hand-made plans."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.config import EngineConfig
from nanovllm.executor.base import Executor
from nanovllm.executor.inline import inline_executor
from nanovllm.protocol.plan import DeviceLostError, NewRow, StepPlan, StepResult
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker import failures, startup
from nanovllm.worker.warmup import driver
from nanovllm.worker.warmup.precompile import Precompiler
from nanovllm.worker.worker import Worker
from tests.worker.planning import make_plan, new_row, run_step

PROMPTS = {4: [31, 7, 22, 150, 9, 10, 11, 12, 13, 99, 8], 0: [5, 6, 7], 7: [42]}
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=20)


Checkpoints = Callable[[str], Path]


def make_executor(model: Path, **settings: Any) -> Worker:
    values = {"dtype": "float32", "device": "cpu", "block_size": 4, "max_num_seqs": 8}
    values |= {"max_model_len": 64, "num_gpu_blocks_override": 200, **settings}
    executor = inline_executor(
        EngineConfig.from_kwargs(model=str(model), **values), lambda phase, progress: None
    )
    executor.allocate(executor.start().num_blocks)
    return executor


@pytest.fixture
def executor(tiny_checkpoint: Checkpoints) -> Iterator[Worker]:
    executor = make_executor(tiny_checkpoint("llama"))
    yield executor
    executor.shutdown()


def submit_all(executor: Executor, plans: list[StepPlan]) -> list[StepResult]:
    """Submit every plan before the first result is read."""
    handles = [run_step(executor, plan) for plan in plans]
    return [handle.result() for handle in handles]


def generate(
    executor: Executor, new: NewRow, *, chunk: int, num_outputs: int, first_step: int = 0
) -> list[int]:
    """One sequence alone: its prompt in chunks, then one token a step, all submitted at once."""
    plans = []
    length = len(new.token_ids)
    for start in range(0, length, chunk):
        count = min(chunk, length - start)
        plan = make_plan(
            first_step + len(plans),
            [(new.row, start, count)],
            new_rows=[] if start else [new],
            sampling=[0] if start + count == length else [],
        )
        if start:
            plan.block_appends.clear()  # the new row brought the blocks of its whole prompt
        plans.append(plan)
    for position in range(length, length + num_outputs - 1):
        plans.append(make_plan(first_step + len(plans), [(new.row, position, 1)]))
    return [i for result in submit_all(executor, plans) for i in result.token_ids]


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SAMPLED])
def test_chunked_prefill_and_decode_equal_one_shot(
    executor: Worker, params: SamplingParams
) -> None:
    prompt = PROMPTS[4]
    outputs = generate(executor, new_row(4, prompt, params, seed=3), chunk=11, num_outputs=12)
    assert len(outputs) == 12 and len(set(outputs)) > 3
    for row, chunk in ((4, 1), (1, 3), (6, 4), (0, 10)):
        new = new_row(row, prompt, params, seed=3)
        assert generate(executor, new, chunk=chunk, num_outputs=12) == outputs
    # Decoding equals running everything known in one go, at every length.
    for known in range(1, 12):
        resumed = new_row(
            2, prompt + outputs[:known], params, num_prompt_tokens=len(prompt), seed=3
        )
        assert generate(executor, resumed, chunk=64, num_outputs=1) == [outputs[known]]


def test_batches_equal_single_sequences(executor: Worker) -> None:
    alone = {
        row: generate(executor, new_row(row, prompt), chunk=64, num_outputs=6)
        for row, prompt in PROMPTS.items()
    }
    new_rows = [new_row(row, prompt) for row, prompt in PROMPTS.items()]
    lengths = {row: len(prompt) for row, prompt in PROMPTS.items()}
    plans = [make_plan(0, [(row, 0, n) for row, n in lengths.items()], new_rows=new_rows)]
    for step in range(1, 6):
        plans.append(make_plan(step, [(row, n + step - 1, 1) for row, n in lengths.items()]))
    results = submit_all(executor, plans)
    for column, row in enumerate(PROMPTS):
        assert [result.token_ids[column] for result in results] == alone[row]


def test_a_row_is_taken_again(executor: Worker) -> None:
    expected = generate(executor, new_row(3, PROMPTS[0]), chunk=64, num_outputs=4)
    generate(executor, new_row(3, PROMPTS[4]), chunk=5, num_outputs=9)
    assert generate(executor, new_row(3, PROMPTS[0]), chunk=2, num_outputs=4) == expected


def test_logprobs_of_prompt_and_output_agree(executor: Worker) -> None:
    """What was sampled, with what probability, is what the prompt's log-probabilities say."""
    params = SamplingParams(temperature=0.0, logprobs=3)
    plans = [make_plan(0, [(1, 0, 11)], new_rows=[new_row(1, PROMPTS[4], params)])]
    plans += [make_plan(step, [(1, 10 + step, 1)]) for step in range(1, 5)]
    results = submit_all(executor, plans)
    outputs = [result.token_ids[0] for result in results]
    params = SamplingParams(temperature=0.0, prompt_logprobs=3)
    plan = make_plan(9, [(1, 0, 15)], new_rows=[new_row(1, PROMPTS[4] + outputs[:4], params)])
    (prompt_logprobs,) = run_step(executor, plan).result().prompt_logprobs.values()
    assert [entry.token_id for entry in prompt_logprobs] == (PROMPTS[4] + outputs)[1:15]
    for result, again in zip(results, prompt_logprobs.after(10), strict=False):
        logprobs = result.logprobs[0]
        assert logprobs.rank == again.rank == 1
        assert logprobs.top_ids == again.top_ids
        assert logprobs.top_logprobs == pytest.approx(again.top_logprobs, abs=1e-4)


def test_shutdown_is_safe_twice_and_after_a_failed_start(tiny_checkpoint: Checkpoints) -> None:
    model = str(tiny_checkpoint("llama"))
    config = EngineConfig.from_kwargs(model=model, device="cpu", max_model_len=1000)
    failed = inline_executor(config, lambda phase, progress: None)
    with pytest.raises(ValueError, match="max_model_len"):
        failed.start()
    for executor in (failed, make_executor(Path(model))):
        executor.shutdown()
        executor.shutdown()


def test_what_began_for_a_gpu_is_ended_where_there_is_none(
    tiny_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Precompiler] = []
    monkeypatch.setattr(driver, "SIGNS", ("/",))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(driver, "wake", lambda: None)
    begin = Precompiler.begin

    def note(precompiler: Precompiler) -> None:
        begin(precompiler)
        assert precompiler._program is not None
        begun.append(precompiler)

    monkeypatch.setattr(Precompiler, "begin", note)
    monkeypatch.setattr(startup, "choose_device", lambda device: torch.device("cpu"))
    executor = make_executor(tiny_checkpoint("llama"), device="auto")
    assert begun == [executor._precompiler]
    assert begun[0]._program is None
    executor.shutdown()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: invalid argument"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory"),
        ValueError("something else"),
    ],
)
def test_an_error_is_the_steps_own_while_the_device_answers(
    executor: Worker, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the error's text quotes: the device is asked, and a CPU always answers."""

    def broken(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(type(executor._runner._model), "forward", broken)
        with pytest.raises(Exception) as caught:
            executor.submit(make_plan(0, [(1, 0, 3)], new_rows=[new_row(1, PROMPTS[0])]))
    assert not isinstance(caught.value, DeviceLostError)
    assert len(generate(executor, new_row(1, PROMPTS[0]), chunk=64, num_outputs=4)) == 4


def test_a_device_that_no_longer_answers_is_lost(
    executor: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a step's own error")

    monkeypatch.setattr(type(executor._runner._model), "forward", broken)
    monkeypatch.setattr(failures, "loss_of", lambda device: DeviceLostError("it is gone"))
    with pytest.raises(DeviceLostError, match="it is gone"):
        executor.submit(make_plan(0, [(1, 0, 3)], new_rows=[new_row(1, PROMPTS[0])]))
