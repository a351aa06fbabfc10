"""The core's socket: attach at any time, typed answers, and nothing lost for anyone else."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from nanovllm.config import EngineConfig
from nanovllm.core import server as server_module
from nanovllm.core.grammar import GrammarCompiler
from nanovllm.core.patience import SLOW_CPU
from nanovllm.core.server import CoreServer
from nanovllm.keys import CoreKeys, make_keys
from nanovllm.protocol.messages import (
    Abort,
    AddRequest,
    Call,
    CallResult,
    CoreFailed,
    CoreStatus,
    Goodbye,
    Hello,
    Loading,
    Outputs,
    Pulse,
    RequestFailed,
    ResetPrefixCache,
)
from nanovllm.protocol.plan import DeviceLostError, StepPlan, WorkerInfo
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams
from tests.core.fake_executor import FakeExecutor, FakeHandle, reference
from tests.core.serving import PacedExecutor, RawClient, add, collect, serving, status_where
from tests.core.vocabulary import decode, make_compiler, tokenizer_json
from tests.waiting import WAIT_S

PROMPT = [5, 6, 7]
NO_STOP: frozenset[int] = frozenset()


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/core.sock"


@pytest.fixture
def client(address: str) -> Iterator[RawClient]:
    with serving(address):
        client = RawClient(address)
        yield client
        client.close()


@pytest.fixture
def slow_client(address: str) -> Iterator[RawClient]:
    """Of a core that needs 40 s for 400 tokens."""
    with serving(address, PacedExecutor(EngineConfig(), step_s=0.1)):
        client = RawClient(address)
        yield client
        client.close()


def test_hello_is_answered_with_the_facts(client: RawClient) -> None:
    welcome = client.greet()
    assert welcome.worker.max_model_len == 512 and welcome.model == "smollm2"


def test_a_request_streams_its_tokens_and_ends(client: RawClient) -> None:
    client.greet()
    client.send(add())
    token_ids, finished = collect(client, 0)
    assert token_ids[0] == reference(PROMPT, 1, 4, NO_STOP)
    assert finished[0].reason == "length"


def test_n_outputs_are_numbered_consecutively(client: RawClient) -> None:
    client.greet()
    client.send(add(10, n=3))
    token_ids, _ = collect(client, 10, 11, 12)
    assert [token_ids[10 + i] for i in range(3)] == [
        reference(PROMPT, 1 + i, 4, NO_STOP) for i in range(3)
    ]


def test_clients_attach_at_any_time_and_their_numbers_do_not_collide(address: str) -> None:
    with serving(address):
        first, second = RawClient(address), RawClient(address)
        assert first.greet().client_id != (first.send(add(seed=1)), second.greet().client_id)[1]
        second.send(add(seed=2))
        assert collect(first, 0)[0][0] == reference(PROMPT, 1, 4, NO_STOP)
        assert collect(second, 0)[0][0] == reference(PROMPT, 2, 4, NO_STOP)
        first.close()
        second.close()


@pytest.mark.parametrize(
    "frames", [[b""], [b"\xc1garbage"], [b"\x81\xa4type\xa4Nope"], [b"one", b"two"], [b"\x80"]]
)
def test_a_bad_frame_costs_its_sender_an_error_only(client: RawClient, frames: list[bytes]) -> None:
    client.greet()
    client.send_frames(*frames)
    failure = client.receive(RequestFailed)
    assert failure.number == -1 and "bad frame" in failure.message
    client.send(add())
    assert collect(client, 0)[1][0].reason == "length"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (AddRequest(1, [], SamplingParams()), "prompt_token_ids"),
        (AddRequest(1, [5] * 512, SamplingParams()), "max_model_len"),
        (AddRequest(1, [1000], SamplingParams()), "token ids"),
        (AddRequest(1, [5], SamplingParams(logit_bias={1000: 1.0})), "logit_bias"),
        (AddRequest(1, [5], SamplingParams(allowed_token_ids=[1000])), "allowed_token_ids"),
        (AddRequest(1, [5], SamplingParams(), bad_words_token_ids=[[1000]]), "bad_words"),
        (AddRequest(1, [5], SamplingParams(), bad_words_token_ids=[[]]), "bad_words"),
        (AddRequest(1, [5], SamplingParams(max_tokens=1), output_token_ids=[6]), "max_tokens"),
    ],
)
def test_a_bad_request_fails_alone(client: RawClient, request_: AddRequest, field: str) -> None:
    client.greet()
    client.send(add(0, max_tokens=50))
    client.send(request_)
    failure = client.receive(RequestFailed)
    assert failure.number == 1 and field in failure.message
    client.send(add(2))
    assert collect(client, 2)[1][2].reason == "length"


def test_bad_sampling_values_do_not_decode(client: RawClient) -> None:
    client.greet()
    client.send_frames(
        b"\x84\xa4type\xaaAddRequest\xa6number\x01\xb0prompt_token_ids\x91\x05"
        b"\xa6params\x81\xabtemperature\xcb\xbf\xf0\x00\x00\x00\x00\x00\x00"
    )
    assert "temperature" in client.receive(RequestFailed).message


def test_abort_ends_a_request_and_only_it(slow_client: RawClient) -> None:
    client = slow_client
    client.greet()
    client.send(add(0, max_tokens=400))
    client.send(add(1, max_tokens=4))
    client.receive(Outputs)
    client.send(Abort([0, 77]))
    _, finished = collect(client, 0, 1)
    assert finished[0].reason == "abort" and finished[1].reason == "length"


def test_goodbye_aborts_everything_of_that_client(address: str) -> None:
    with serving(address):
        leaver, stayer = RawClient(address), RawClient(address)
        leaver.greet()
        stayer.greet()
        leaver.send(add(max_tokens=400))
        leaver.receive(Outputs)
        leaver.send(Goodbye())
        assert status_where(stayer, num_clients=1, num_running=0).num_free_blocks == 199
        leaver.close()
        stayer.close()


def test_a_vanished_client_is_noticed(address: str) -> None:
    with serving(address):
        vanishing, stayer = RawClient(address), RawClient(address)
        vanishing.greet()
        stayer.greet()
        vanishing.send(add(max_tokens=None))
        vanishing.receive(Outputs)
        vanishing.close()
        assert status_where(stayer, num_clients=1, num_running=0).num_free_blocks == 199
        stayer.close()


def test_status_comes_every_second_unasked(client: RawClient) -> None:
    client.greet()
    client.send(add())
    collect(client, 0)
    client.receive(CoreStatus)
    status = client.receive(CoreStatus)
    assert (status.num_generation_tokens, status.num_prompt_tokens) == (4, 3)


def test_pulses_come_several_times_a_second_idle_or_busy(client: RawClient) -> None:
    client.greet()
    for request in (add(0, max_tokens=1), add(1, max_tokens=500)):
        client.send(request)
        for _ in range(4):
            client.receive(Pulse)
    status = client.receive(CoreStatus)
    assert 0 < status.messaging_cpu_s < status.loop_cpu_s


def test_calls_are_answered(client: RawClient) -> None:
    client.greet()
    client.send(Call(7, ResetPrefixCache()))
    answer = client.receive(CallResult)
    assert (answer.call_id, answer.result, answer.error) == (7, True, None)


def test_stopping_tells_clients_what_ended(address: str) -> None:
    with serving(address, PacedExecutor(EngineConfig(), step_s=0.1)) as server:
        client = RawClient(address)
        client.greet()
        client.send(add(max_tokens=None))
        client.receive(Outputs)
        server.stop()
        _, finished = collect(client, 0)
        assert finished[0].reason == "abort"
        client.close()


class SlowStart(FakeExecutor):
    """Loads until told to go on, reporting progress like a real one."""

    server: CoreServer

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, num_blocks=20, max_model_len=64)
        self.go_on = threading.Event()

    def start(self) -> WorkerInfo:
        while not self.go_on.wait(0.02):
            self.server.on_progress("weights", 0.5)
        return super().start()


def test_clients_that_come_while_loading_see_progress_then_welcome(address: str) -> None:
    executor = SlowStart(EngineConfig())
    server = CoreServer(EngineConfig(), address)
    executor.server = server
    thread = threading.Thread(target=server.run, args=(lambda: executor,))
    thread.start()
    client = RawClient(address)
    client.send(Hello())
    while client.receive(Loading) != Loading("weights", 0.5):
        pass
    client.send(add())
    assert "loading" in client.receive(RequestFailed).message
    executor.go_on.set()
    client.greet()
    server.stop()
    thread.join(WAIT_S)
    client.close()


@pytest.mark.parametrize(
    ("is_asked", "has_tokenizer"), [(True, True), (False, True), (True, False)]
)
def test_the_vocabulary_is_loaded_before_the_core_is_ready(
    address: str, is_asked: bool, has_tokenizer: bool
) -> None:
    """Asked to; a core that has none is ready all the same, and says so to who needs it."""
    calls: list[str] = []

    def load() -> str:
        calls.append("load")
        if not has_tokenizer:
            raise ValueError("no tokenizer here")
        return tokenizer_json()

    with serving(address, make_compiler=partial(GrammarCompiler, load), grammar_preload=is_asked):
        client = RawClient(address)
        client.greet()
        assert len(calls) == is_asked
        client.send(add(structured_outputs=StructuredOutputsParams(regex="ab")))
        if has_tokenizer:
            assert decode(tuple(collect(client, 0)[0][0])) == "ab"
        else:
            assert "no tokenizer here" in client.receive(RequestFailed).message
        client.close()
    assert len(calls) == 1 + (not has_tokenizer)


class FailingStart(SlowStart):
    error: Exception

    def start(self) -> WorkerInfo:
        super().start()
        raise self.error


class LosingDevice(FakeExecutor):
    from_outside = False

    def submit(self, plan: object) -> object:  # type: ignore[override]
        raise DeviceLostError("the device is gone", from_outside=self.from_outside)


@pytest.mark.parametrize(
    ("error", "usage"), [(ValueError("dtype: x"), True), (OSError("x"), False)]
)
def test_a_failed_start_is_told_with_its_cause(address: str, error: Exception, usage: bool) -> None:
    executor = FailingStart(EngineConfig())
    executor.error = error
    failure = failure_of(address, executor, type(error))
    assert failure.usage is usage and str(error) in failure.message
    assert "Traceback" in failure.details


def losing_its_device(
    server: CoreServer, make_executor: Callable[[], FakeExecutor]
) -> threading.Thread:
    """One in which the server runs, and must end for want of its device."""

    def run() -> None:
        with pytest.raises(DeviceLostError):
            server.run(make_executor)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_who_greets_a_core_that_has_failed_already_is_told_why(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a rank is killed before the process that starts the core has connected."""
    monkeypatch.setattr(server_module, "GREETING_S", WAIT_S)
    server, failing = CoreServer(EngineConfig(), address), threading.Event()

    def make_executor() -> FakeExecutor:
        failing.set()
        raise DeviceLostError("rank 0 was killed", from_outside=True)

    thread = losing_its_device(server, make_executor)
    assert failing.wait(WAIT_S)
    time.sleep(0.1)  # without the wait the core would be gone by then
    client = RawClient(address)
    client.send(Hello())
    assert client.receive(CoreFailed).message == "rank 0 was killed"
    thread.join(WAIT_S)
    client.close()


@pytest.mark.parametrize("from_outside", [False, True])
def test_a_lost_device_ends_the_core_and_is_told_with_its_cause(
    address: str, from_outside: bool
) -> None:
    executor = LosingDevice(EngineConfig(), num_blocks=20, max_model_len=64)
    executor.from_outside = from_outside
    failure = failure_of(address, executor, DeviceLostError, request=add())
    assert failure.message == "the device is gone" and not failure.usage
    assert failure.from_outside is from_outside


class LosingIdleDevice(FakeExecutor):
    def check(self) -> None:
        raise DeviceLostError("the device is gone", from_outside=True)


def test_an_idle_core_ends_without_a_request_that_would_miss_the_device(address: str) -> None:
    executor = LosingIdleDevice(EngineConfig(), num_blocks=20, max_model_len=64)
    failure = failure_of(address, executor, DeviceLostError)
    assert failure.message == "the device is gone" and failure.from_outside


class LosingDeviceLater(LosingDevice):
    """When a test says so: what it has sent by then waits in the core's socket."""

    def __init__(self) -> None:
        super().__init__(EngineConfig(), num_blocks=20, max_model_len=64)
        self.is_asked, self.may_fail = threading.Event(), threading.Event()

    def submit(self, plan: object) -> object:  # type: ignore[override]
        self.is_asked.set()
        assert self.may_fail.wait(WAIT_S)
        return super().submit(plan)


@pytest.mark.parametrize(
    ("waiting", "answer"), [(add(1), RequestFailed), (Call(7, ResetPrefixCache()), CallResult)]
)
def test_what_waits_when_the_device_is_lost_gets_no_answer_of_its_own(
    address: str, waiting: AddRequest | Call, answer: type[RequestFailed | CallResult]
) -> None:
    """Its client sends it to the next core, as it does with what was running."""
    executor = LosingDeviceLater()
    server = CoreServer(EngineConfig(), address)

    thread = losing_its_device(server, lambda: executor)
    client = RawClient(address)
    client.greet()
    client.send(add(0))
    assert executor.is_asked.wait(WAIT_S)
    client.send(waiting)
    time.sleep(0.05)  # for it to arrive
    executor.may_fail.set()
    assert isinstance(client.receive_any(answer, CoreFailed), CoreFailed)
    with pytest.raises(TimeoutError):
        client.receive(answer, timeout_s=0.05)
    thread.join(WAIT_S)
    client.close()


class LosingDeviceSlowly(FakeExecutor):
    """At the second step; the first takes longer than a request of 1 ms has."""

    def submit(self, plan: StepPlan) -> FakeHandle:
        if plan.step:
            raise DeviceLostError("the device is gone")
        time.sleep(0.01)
        return super().submit(plan)


def test_what_has_ended_before_a_failure_is_told_before_it(address: str) -> None:
    """In the same turn of the loop: a request whose time was over is not sent to the next core."""
    executor = LosingDeviceSlowly(EngineConfig(), num_blocks=20, max_model_len=64)
    server = CoreServer(EngineConfig(), address)

    thread = losing_its_device(server, lambda: executor)
    client = RawClient(address)
    client.greet()
    client.send(msgspec.structs.replace(add(0), deadline_ms=1.0))
    client.send(add(1))
    told: dict[int, str] = {}
    while isinstance(message := client.receive_any(Outputs, CoreFailed), Outputs):
        told |= {one.number: one.reason for one in message.finished}
    assert told == {0: "timeout"}
    thread.join(WAIT_S)
    client.close()


def failure_of(
    address: str, executor: FakeExecutor, kind: type[Exception], request: AddRequest | None = None
) -> CoreFailed:
    """Run a server that is to die of `kind`, and return what its client is told."""
    server = CoreServer(EngineConfig(), address)
    if isinstance(executor, SlowStart):
        executor.server = server
    raised: list[BaseException] = []

    def run() -> None:
        try:
            server.run(lambda: executor)
        except kind as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    client = RawClient(address)
    client.send(Hello())
    if isinstance(executor, SlowStart):  # it fails when the client is known
        while client.receive(Loading) != Loading("weights", 0.5):
            pass
        executor.go_on.set()
    if request is not None:
        client.greet()
        client.send(request)
    failure = client.receive(CoreFailed)
    thread.join(WAIT_S)
    client.close()
    assert [type(error) for error in raised] == [kind]
    return failure


def test_an_address_in_use_is_refused(address: str) -> None:
    with serving(address), pytest.raises(ValueError, match="in use"):
        CoreServer(EngineConfig(), address)


def test_a_socket_file_left_behind_is_no_obstacle(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(f"{tmp_path}/core.sock")
    CoreServer(EngineConfig(), f"ipc://{tmp_path}/core.sock").close()


def test_bad_addresses_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="not a socket"):
        CoreServer(EngineConfig(), f"ipc://{tmp_path}/file")
    with pytest.raises(ValueError, match="does not exist"):
        CoreServer(EngineConfig(), f"ipc://{tmp_path}/nowhere/core.sock")
    with pytest.raises(ValueError, match="ipc:// or tcp://"):
        CoreServer(EngineConfig(), "udp://127.0.0.1:1")
    make_keys(tmp_path / "keys", [])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match="cannot be bound"):
            CoreServer(EngineConfig(), f"tcp://127.0.0.1:{port}", keys=CoreKeys(tmp_path / "keys"))


def test_a_grammar_is_compiled_while_the_core_sleeps_and_a_bad_one_is_told(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else runs, and nothing is ever due: the thread that compiles has to wake the loop."""
    for interval in ("PULSE_INTERVAL_S", "IDLE_BEFORE_WARM_UP_S"):
        monkeypatch.setattr(server_module, interval, 3600.0)
    with serving(address, make_compiler=lambda info: make_compiler()):
        client = RawClient(address)
        client.greet()
        client.send(add(0, structured_outputs=StructuredOutputsParams(regex="[a-z]{4}")))
        token_ids, finished = collect(client, 0)
        assert len(decode(tuple(token_ids[0]))) == 4
        assert finished[0].reason == "stop" and finished[0].last_is_text
        client.send(add(1, n=2, structured_outputs=StructuredOutputsParams(regex="(a")))
        failures = [client.receive(RequestFailed) for _ in range(2)]
        assert [failure.number for failure in failures] == [1, 2]
        assert failures[0].cause == "grammar" and "structured_outputs.regex" in failures[0].message
        client.close()


def test_without_a_tokenizer_structured_outputs_are_refused(client: RawClient) -> None:
    client.greet()
    client.send(add(3, structured_outputs=StructuredOutputsParams(json_object=True)))
    failure = client.receive(RequestFailed)
    assert failure.number == 3 and "skip_tokenizer_init" in failure.message


class WarmingUp(FakeExecutor):
    """Has three warm-up steps to do, and notes what was done when."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, num_blocks=200, max_model_len=512)
        self.done: list[str] = []

    def warm_up(self) -> bool:
        self.done.append("warm-up")
        return self.done.count("warm-up") < 3

    def submit(self, plan: StepPlan) -> FakeHandle:
        self.done.append("step")
        return super().submit(plan)


def test_an_idle_core_warms_up_until_there_is_no_more(address: str) -> None:
    executor = WarmingUp(EngineConfig())
    with serving(address, executor):
        client = RawClient(address)
        client.greet()
        client.send(add(0))
        collect(client, 0)
        deadline = time.monotonic() + WAIT_S
        while executor.done.count("warm-up") < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        client.send(add(1))
        collect(client, 1)
        client.close()
    assert executor.done.count("warm-up") == 3
    assert executor.done[-1] == "step", "the second request's, after all warm-up steps"


def test_the_core_itself_refuses_what_its_model_cannot_hold(client: RawClient) -> None:
    """A client need not have looked at the length that it was told."""
    limit = client.greet().worker.max_model_len
    for number, length in enumerate((limit + 1, limit)):
        client.send(msgspec.structs.replace(add(number), prompt_token_ids=[1] * length))
        failure = client.receive(RequestFailed)
        assert (failure.number, failure.cause) == (number, "request")
        assert "max_model_len" in failure.message
    client.send(msgspec.structs.replace(add(2), prompt_token_ids=[1] * (limit - 1)))
    token_ids, finished = collect(client, 2)
    assert len(token_ids[2]) == 1 and finished[2].reason == "length"


def test_an_idle_core_is_woken_by_what_arrives_and_needs_no_clock(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a frame, by a grammar that has been compiled, and, at the end, by who stops it."""
    for name in ("PULSE_INTERVAL_S", "IDLE_BEFORE_WARM_UP_S"):
        monkeypatch.setattr(server_module, name, 1e5)
    with serving(address, make_compiler=lambda info: make_compiler()):
        client = RawClient(address)
        client.greet()
        client.send(add())
        assert len(collect(client, 0)[0][0]) == 4
        wanted = StructuredOutputsParams(regex="[a-z]{6}")
        client.send(add(1, max_tokens=20, ignore_eos=False, structured_outputs=wanted))
        assert len(decode(tuple(collect(client, 1)[0][1]))) == 6
        client.close()


class Huge(FakeExecutor):
    """Of a model whose prompts take a slow processor minutes. Its steps wait to be let go."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, num_blocks=200, max_model_len=512)
        self.may_go = threading.Event()

    def start(self) -> WorkerInfo:
        return msgspec.structs.replace(super().start(), device="cpu", num_parameters=10**12)

    def submit(self, plan: StepPlan) -> FakeHandle:
        assert self.may_go.wait(WAIT_S)
        return super().submit(plan)


def test_clients_are_told_before_a_step_that_may_take_long(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the prompt, after which steps are small; no pulse is due by itself."""
    for name in ("PULSE_INTERVAL_S", "IDLE_BEFORE_WARM_UP_S"):
        monkeypatch.setattr(server_module, name, 1e5)
    executor = Huge(EngineConfig())
    with serving(address, executor):
        client = RawClient(address)
        client.greet()
        client.send(msgspec.structs.replace(add(), prompt_token_ids=[1] * 100))
        assert client.receive(Pulse).patience_s == pytest.approx(100 * 10**12 / SLOW_CPU)
        executor.may_go.set()
        collect(client, 0)
        client.close()
