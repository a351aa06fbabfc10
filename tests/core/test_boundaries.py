"""What goes wrong with one request costs that request; what goes wrong with a step, the step."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm.config import EngineConfig
from nanovllm.core.block_manager import BlockManager
from nanovllm.core.sequence import Sequence
from nanovllm.core.socket import Endpoint
from nanovllm.protocol.messages import AddRequest, CoreStatus, Outputs, RequestFailed
from nanovllm.protocol.plan import StepPlan, StepResult, TokenLogprobs
from nanovllm.sampling_params import SamplingParams
from tests.core.fake_executor import FakeExecutor, FakeHandle, StepFailedError, reference
from tests.core.serving import RawClient, add, collect, serving, status_where

PROMPT = [5, 6, 7]


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/core.sock"


@pytest.fixture
def client(address: str) -> Iterator[RawClient]:
    with serving(address):
        client = RawClient(address)
        client.greet()
        yield client
        client.close()


def salted(salt: str, number: int, **params: object) -> AddRequest:
    settings = {"max_tokens": 4, "seed": 1, "ignore_eos": True, **params}
    return AddRequest(number, PROMPT, SamplingParams(**settings), cache_salt=salt)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["submit", "result"])
def test_a_failed_step_fails_its_requests_with_the_cause(address: str, where: str) -> None:
    config = EngineConfig()
    executor = FakeExecutor(
        config,
        num_blocks=200,
        max_model_len=512,
        fails=lambda plan: where if plan.step == 1 else "",
    )
    with serving(address, executor):
        client = RawClient(address)
        client.greet()
        client.send(add(0))
        failure = client.receive(RequestFailed)
        assert failure.number == 0 and "StepFailedError: step 1" in failure.message
        client.send(add(1))
        assert collect(client, 1)[0][1] == reference(PROMPT, 1, 4, frozenset())
        status = status_where(client, num_failed_steps=1, num_failed=1, num_running=0)
        assert status.num_free_blocks == status.num_blocks
        client.close()


class PickyExecutor(FakeExecutor):
    """Cannot sample for requests of seed 13 beyond their third output."""

    def _run(self, plan: StepPlan) -> StepResult | StepFailedError:
        result = super()._run(plan)
        assert isinstance(result, StepResult)
        for index, entry in enumerate(plan.sampling):
            row = self._rows[plan.rows[entry]]
            length = plan.num_computed[entry] + plan.num_scheduled[entry]
            if row.seed == 13 and length >= row.num_prompt_tokens + 3:
                result.failures[index] = "IndexError: no such word"
        return result


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_request_that_cannot_be_sampled_fails_alone(address: str, depth: int) -> None:
    config = EngineConfig.from_kwargs(max_inflight_steps=depth)
    executor = PickyExecutor(config, num_blocks=200, max_model_len=512)
    with serving(address, executor, max_inflight_steps=depth):
        client = RawClient(address)
        client.greet()
        for number, seed in enumerate([1, 13, 2]):
            client.send(add(number, seed=seed, max_tokens=40))
        got: dict[int, list[int]] = {0: [], 1: [], 2: []}
        num_ended = 0
        failure: RequestFailed | None = None
        while num_ended < 2 or failure is None:
            message = client.receive_any(Outputs, RequestFailed)
            if isinstance(message, RequestFailed):
                failure = message
                continue
            for number, token_id in zip(message.numbers, message.token_ids, strict=True):
                got[number].append(token_id)
            num_ended += len(message.finished)
        assert (failure.number, failure.message) == (1, "IndexError: no such word")
        assert len(got[1]) == 3, "what it had before is good"
        for number, seed in ((0, 1), (2, 2)):
            assert got[number] == reference(PROMPT, seed, 40, frozenset())
        status = status_where(client, num_failed=1, num_failed_steps=0, num_running=0)
        assert status.num_free_blocks == status.num_blocks
        client.close()


def test_a_core_whose_every_step_fails_answers_everyone_and_rests(address: str) -> None:
    config = EngineConfig()
    executor = FakeExecutor(config, num_blocks=200, max_model_len=512, fails=lambda plan: "submit")
    with serving(address, executor):
        client = RawClient(address)
        client.greet()
        for number in range(5):
            client.send(add(number, max_tokens=None))
        failed = {client.receive(RequestFailed).number for _ in range(5)}
        assert failed == set(range(5))
        first, second = client.receive(CoreStatus), client.receive(CoreStatus)
        assert second.num_failed_steps == first.num_failed_steps
        client.close()


def test_a_sequence_that_cannot_be_admitted_fails_alone(
    client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_prefix = BlockManager.cached_prefix

    def broken(self: BlockManager, sequence: Sequence) -> list[int]:
        if sequence.cache_salt == "bad":
            raise ZeroDivisionError("no such luck")
        return cached_prefix(self, sequence)

    monkeypatch.setattr(BlockManager, "cached_prefix", broken)
    client.send(salted("good", 0, max_tokens=40))
    client.send(salted("bad", 1))
    client.send(salted("good", 2, max_tokens=40))
    failure = client.receive(RequestFailed)
    assert failure == RequestFailed(1, "ZeroDivisionError: no such luck")
    client.send(salted("good", 3))
    assert collect(client, 3)[1][3].reason == "length"


def test_a_sequence_that_cannot_grow_fails_and_the_others_are_recomputed(
    client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow = BlockManager.grow

    def broken(self: BlockManager, sequence: Sequence, lacking: list[int], num_tokens: int) -> None:
        if sequence.cache_salt == "bad":
            raise ZeroDivisionError("no block")
        grow(self, sequence, lacking, num_tokens)

    monkeypatch.setattr(BlockManager, "grow", broken)
    client.send(salted("good", 0, max_tokens=100))
    client.send(salted("bad", 1, max_tokens=100))
    client.send(salted("good", 2, max_tokens=100))
    token_ids, finished = collect(client, 0, 2)
    assert token_ids[0] == token_ids[2] == reference(PROMPT, 1, 100, frozenset())
    assert {end.reason for end in finished.values()} == {"length"}
    status = status_where(client, num_failed=1, num_running=0)
    assert status.num_free_blocks == status.num_blocks


class OddLogprobs(FakeExecutor):
    """Brings something that cannot be encoded, for one row."""

    def submit(self, plan: StepPlan) -> FakeHandle:
        super().submit(plan)
        return OddHandle(self, plan)


class OddHandle(FakeHandle):
    def result(self) -> StepResult:
        result = super().result()
        odd = TokenLogprobs(object(), 0.0, 1, [], [])  # type: ignore[arg-type]
        wanted = {j: odd for j, entry in enumerate(self._plan.sampling) if entry == 1}
        return StepResult(result.step, result.token_ids, wanted)


def test_outputs_that_cannot_be_encoded_fail_their_request_alone(address: str) -> None:
    executor = OddLogprobs(EngineConfig(), num_blocks=200, max_model_len=512)
    with serving(address, executor):
        client = RawClient(address)
        client.greet()
        client.send(add(0, max_tokens=200))
        client.receive(Outputs)
        client.send(add(1, max_tokens=200))
        client.send(add(2, max_tokens=20))
        failure = client.receive(RequestFailed)
        assert failure.number in (1, 2) and "cannot be encoded" in failure.message
        client.send(add(3))
        assert 0 in client.receive(Outputs).numbers
        client.close()


def test_the_endpoint_says_who_is_gone(address: str) -> None:
    endpoint = Endpoint(address, max_frame_bytes=2**20)
    assert endpoint.send(b"nobody", b"x") == "gone"
    assert endpoint.receive() is None
    endpoint.close()
