"""The engine loop: depth, seeds, aborts, and what a request may not ask."""

from typing import Any

import pytest

from nanovllm.config import EngineConfig
from nanovllm.core.engine_core import EngineCore
from nanovllm.protocol import AddRequest
from nanovllm.sampling_params import SamplingParams
from tests.core.fake_executor import FakeExecutor, reference


def make_core(**settings: Any) -> EngineCore:
    config = EngineConfig.from_kwargs(**settings)
    executor = FakeExecutor(config, num_blocks=50, max_model_len=128)
    return EngineCore(config, executor, executor.start())


def drain(core: EngineCore) -> dict[int, list[int]]:
    token_ids: dict[int, list[int]] = {}
    while core.busy:
        outputs = core.step()
        if outputs is not None:
            for sequence, token_id in zip(outputs.sequences, outputs.token_ids, strict=True):
                token_ids.setdefault(sequence.number, []).append(token_id)
    return token_ids


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_so_many_steps_are_submitted_before_a_result_is_taken(depth: int) -> None:
    core = make_core(max_inflight_steps=depth)
    core.add(0, AddRequest(0, [5], SamplingParams(max_tokens=10, ignore_eos=True)))
    idle = 0
    while core.step() is None:
        idle += 1
    assert idle == depth - 1


def test_output_tokens_given_are_continued_as_if_generated_here() -> None:
    params = SamplingParams(max_tokens=10, seed=3, ignore_eos=True)
    whole = reference([5, 6], 3, 10, frozenset())
    core = make_core()
    core.add(0, AddRequest(0, [5, 6], params, output_token_ids=whole[:4]))
    assert drain(core)[0] == whole[4:]


def test_unseeded_requests_differ_and_follow_the_engine_seed() -> None:
    def outputs(seed: int) -> list[list[int]]:
        core = make_core(seed=seed)
        for number in range(2):
            core.add(0, AddRequest(number, [5], SamplingParams(max_tokens=6, ignore_eos=True)))
        token_ids = drain(core)
        return [token_ids[0], token_ids[1]]

    assert outputs(1) == outputs(1) != outputs(2)
    assert outputs(1)[0] != outputs(1)[1]


def test_a_number_in_use_is_refused_and_one_that_ended_is_free() -> None:
    core = make_core()
    request = AddRequest(0, [5], SamplingParams(max_tokens=2))
    core.add(0, request)
    with pytest.raises(ValueError, match="number 0 is in use"):
        core.add(0, request)
    core.add(1, request)
    drain(core)
    core.add(0, request)
    assert core.abort(0, [0])[0].finish_reason == "abort"
    assert not core.busy and core.abort(0, [0]) == []


def test_a_refused_request_queues_nothing() -> None:
    core = make_core()
    core.add(0, AddRequest(1, [5], SamplingParams()))
    with pytest.raises(ValueError, match="number 1 is in use"):
        core.add(0, AddRequest(0, [5], SamplingParams(n=3)))
    assert core.status(epoch="", num_clients=0).num_waiting == 1
