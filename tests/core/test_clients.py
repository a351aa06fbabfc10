"""Clients that vanish, do not read, ask too much, or come back."""

import math
import time
from pathlib import Path

import psutil
import pytest

from nanovllm.config import EngineConfig
from nanovllm.core import server as server_module
from nanovllm.core.clients import (
    MAX_ANSWERS,
    MAX_REQUESTS,
    Client,
    ClientTable,
    Intake,
    select,
)
from nanovllm.core.sequence import Sequence, StepOutputs
from nanovllm.core.server import CoreServer
from nanovllm.protocol.messages import (
    Abort,
    CoreFailed,
    CoreStatus,
    Detached,
    Finished,
    Heartbeat,
    Hello,
    Outputs,
    PromptLogprobs,
    Pulse,
    RequestFailed,
    Started,
    Welcome,
)
from nanovllm.protocol.plan import PositionLogprobs, TokenLogprobs
from nanovllm.sampling_params import SamplingParams
from tests.core.fake_executor import FakeExecutor, reference
from tests.core.serving import (
    PROMPT,
    PacedExecutor,
    RawClient,
    add,
    collect,
    serving,
    status_where,
)
from tests.waiting import WAIT_S

NO_STOP: frozenset[int] = frozenset()
LEASE_S = 4 * WAIT_S


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/core.sock"


class LightExecutor(FakeExecutor):
    """Looks at the last slot of a context only, which is a digest of all: for long outputs."""

    def __init__(self) -> None:
        super().__init__(EngineConfig(), num_blocks=4000, max_model_len=3000)

    def _attend(self, row: int, end: int, *, windows_only: bool = False) -> bytes:
        state = self._slots[self._slot(row, end - 1, 0)]
        assert state is not None
        return state


class Clock:
    """The core's, which a test puts on by most of a lease: by more than anybody takes to speak."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self.thread_time = time.thread_time

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s

    def pass_most_of_a_lease(self, server: CoreServer, *speaking: RawClient) -> None:
        """These say something first, and are heard."""
        spoken_at = self.monotonic()
        while sum(one.last_heard > spoken_at for one in server._clients) < len(speaking):
            assert self.monotonic() < spoken_at + WAIT_S
            for client in speaking:
                client.send(Heartbeat())
            time.sleep(0.05)
        self.ahead_s += 0.7 * LEASE_S


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(server_module, "time", clock)
    monkeypatch.setattr(server_module, "LATE_S", math.inf)  # it is the clients that are late
    return clock


def test_silence_beyond_the_lease_aborts_and_frees(address: str, clock: Clock) -> None:
    """Steps are slow, so that the request runs still, and so that less is sent before the lease
    ends than the queue of a client holds: what finds it full is not sent again."""
    executor = PacedExecutor(EngineConfig(), step_s=0.1)
    with serving(address, executor, client_lease_s=LEASE_S) as server:
        stayer, silent = RawClient(address), RawClient(address)
        stayer.greet()
        silent.greet()
        silent.send(add(max_tokens=None))
        silent.receive(Outputs)
        for _ in range(2):
            clock.pass_most_of_a_lease(server, stayer)
        status = status_where(stayer, num_clients=1, num_running=0, num_expired_clients=1)
        assert status.num_free_blocks == status.num_blocks
        assert "lease" in silent.receive(Detached).reason
        silent.send(Heartbeat())
        assert "Hello" in silent.receive(Detached).reason
        silent.greet()
        executor.step_s = 0.0
        silent.send(add(1))
        assert collect(silent, 1)[1][1].reason == "length"
        stayer.close()
        silent.close()


def test_heartbeats_renew_the_lease(address: str, clock: Clock) -> None:
    executor = PacedExecutor(EngineConfig(), step_s=0.1)
    with serving(address, executor, client_lease_s=LEASE_S) as server:
        quiet = RawClient(address)
        quiet.greet()
        quiet.send(add(max_tokens=400))
        for _ in range(3):  # twice as long as the lease
            clock.pass_most_of_a_lease(server, quiet)
        executor.step_s = 0.0
        token_ids, finished = collect(quiet, 0)
        assert finished[0].reason == "length"
        assert token_ids[0] == reference(PROMPT, 1, 400, NO_STOP)
        quiet.close()


def test_strangers_get_nothing_done_and_take_no_place(address: str) -> None:
    with serving(address, max_clients=2):
        stranger, first, second, third = (RawClient(address) for _ in range(4))
        stranger.send(add())
        assert "Hello" in stranger.receive(Detached).reason
        stranger.send_frames(b"junk")
        assert stranger.receive(RequestFailed).number == -1
        first.greet()
        second.greet()
        third.send(Hello())
        assert "max_clients" in third.receive(CoreFailed).message
        assert status_where(first, num_clients=2).num_running == 0
        for client in (stranger, first, second, third):
            client.close()


def test_another_protocol_version_is_told_so(address: str) -> None:
    with serving(address):
        client = RawClient(address)
        client.send(Hello(protocol_version=99))
        failure = client.receive(CoreFailed)
        assert failure.usage and "99" in failure.message
        client.close()


def test_a_client_that_does_not_read_pauses_and_loses_nothing(address: str) -> None:
    """Its requests stop at the cap, others go on, and once it reads it gets every token."""
    with serving(address, LightExecutor(), client_buffer_tokens=300):
        deaf, other = RawClient(address, receive_high_water_mark=1), RawClient(address)
        deaf.greet()
        other.greet()
        for number in range(16):
            deaf.send(add(number, max_tokens=2500, seed=number))
        status_where(other, num_paused=16, num_running=0)
        before = other.receive(CoreStatus)
        memory = psutil.Process().memory_info().rss
        other.send(add(0, max_tokens=300))
        assert collect(other, 0)[1][0].reason == "length"
        after = other.receive(CoreStatus)
        assert after.num_generation_tokens - before.num_generation_tokens == 300
        assert psutil.Process().memory_info().rss - memory < 16 * 2**20
        token_ids, finished = collect(deaf, *range(16))
        for number in range(16):
            assert token_ids[number] == reference(PROMPT, number, 2500, NO_STOP)
        assert {end.reason for end in finished.values()} == {"length"}
        other.close()
        deaf.close()


def test_paused_requests_make_room_when_others_need_it(address: str) -> None:
    """All seats and blocks are held by a client that does not read."""
    with serving(address, LightExecutor(), client_buffer_tokens=100, max_num_seqs=2):
        deaf, other = RawClient(address, receive_high_water_mark=1), RawClient(address)
        deaf.greet()
        other.greet()
        for number in range(3):
            deaf.send(add(number, max_tokens=2500, seed=number))
        status_where(other, num_paused=3)
        other.send(add(0, max_tokens=2500))
        assert collect(other, 0)[1][0].reason == "length"
        token_ids, _ = collect(deaf, 0, 1, 2)
        assert token_ids[1] == reference(PROMPT, 1, 2500, NO_STOP)
        status = status_where(other, num_paused=0, num_running=0)
        assert status.num_preemptions > 0 and status.num_free_blocks == status.num_blocks
        other.close()
        deaf.close()


def test_a_paused_client_can_abort_and_leave(address: str) -> None:
    with serving(address, LightExecutor(), client_buffer_tokens=100):
        deaf, other = RawClient(address, receive_high_water_mark=1), RawClient(address)
        deaf.greet()
        other.greet()
        for number in range(2):
            deaf.send(add(number, max_tokens=2900))
        status_where(other, num_paused=2)
        deaf.send(Abort([0]))
        status_where(other, num_paused=1)
        deaf.close()
        status = status_where(other, num_paused=0, num_clients=1)
        assert status.num_free_blocks == status.num_blocks
        other.close()


def test_a_client_that_asks_and_never_reads_answers_is_let_go(address: str) -> None:
    with serving(address):
        rude, other = RawClient(address, receive_high_water_mark=1), RawClient(address)
        rude.greet()
        other.greet()
        for _ in range(20_000):
            rude.send_frames(b"junk" * 50)
        status_where(other, num_clients=1)
        other.send(add())
        assert collect(other, 0)[1][0].reason == "length"
        rude.close()
        other.close()


def test_hello_again_is_answered_again(address: str) -> None:
    with serving(address):
        client = RawClient(address)
        first = client.greet()
        client.send(add(max_tokens=3))
        client.send(Hello())
        assert client.receive(Welcome).client_id == first.client_id
        client.send(add(1))
        client.receive(Outputs)
        client.close()


def test_a_message_may_hold_log_probabilities_of_a_prompt_alone() -> None:
    """A prompt in pieces brings some before it brings a token."""
    clients = ClientTable(max_clients=1, lease_s=1.0)
    client = clients.attach(b"x", 0.0)
    sequence = Sequence(client.client_id, 3, [5, 6], SamplingParams(prompt_logprobs=1))
    told = PositionLogprobs.of([TokenLogprobs(6, -0.5, 1, [6], [-0.5])])
    clients.collect(StepOutputs(prompt_logprobs=[(sequence, told)]))
    assert client.has_mail and client.backlog == 2
    assert client.take_outputs() == Outputs(prompt_logprobs=[PromptLogprobs(3, told)])
    assert not client.has_mail and client.backlog == 0


def test_of_a_message_everything_about_some_requests_can_be_selected() -> None:
    told = [TokenLogprobs(token_id, -0.5, 1, [], []) for token_id in range(4)]
    packed = PositionLogprobs.of(told)
    ends = [Finished(number, "stop", None, 0) for number in (1, 2)]
    whole = Outputs(
        numbers=[2, 1, 2, 1],
        token_ids=[20, 10, 21, 11],
        logprobs=dict(enumerate(told)),
        started=[Started(1, 0, 0.0), Started(2, 0, 0.0)],
        prompt_logprobs=[PromptLogprobs(1, packed), PromptLogprobs(2, packed)],
        finished=ends,
    )
    assert select(whole, {2}) == Outputs(
        numbers=[2, 2],
        token_ids=[20, 21],
        logprobs={0: told[0], 1: told[2]},
        started=whole.started[1:],
        prompt_logprobs=whole.prompt_logprobs[1:],
        finished=ends[1:],
    )
    assert select(whole, {1, 2}) == whole and select(whole, set()) == Outputs()


def test_requests_that_have_not_begun_are_taken_back_by_their_own_client_alone() -> None:
    clients = ClientTable(max_clients=2, lease_s=1.0)
    one, other = clients.attach(b"one", 0.0), clients.attach(b"other", 0.0)
    intake = Intake(clients)
    asked = [(one, add(0, n=3)), (other, add(1)), (one, add(3)), (one, add(4))]
    for client, request in asked:
        intake.add(client, request)
    assert intake.take(one, {2, 4, 9}) == [asked[0][1], asked[3][1]]
    assert [intake.next(), intake.next(), intake.next()] == [asked[1], asked[2], None]


def test_what_a_client_has_not_read_is_counted_and_taken_once() -> None:
    client = Client(3, b"me", 100.0, None)
    assert not client.has_mail and client.backlog == 0
    logprobs = TokenLogprobs(1, -0.5, 1, [1, 2, 3], [-0.5, -1.0, -2.0])
    sequence = Sequence(3, 7, [1, 2], SamplingParams())
    client.add_logprobs(logprobs)
    client.outputs.numbers.append(7)
    client.outputs.token_ids.append(1)
    assert client.has_outputs and (client.num_merged, client.backlog) == (5, 5)
    client.add_prompt_logprobs(sequence, PositionLogprobs.of([logprobs]))
    shorter = TokenLogprobs(2, -0.5, 1, [], [])
    client.add_prompt_logprobs(sequence, PositionLogprobs.of([shorter]))
    assert (client.num_merged, client.outputs.logprobs) == (10, {0: logprobs})
    client.num_unsent, client.unsent = 2, b"frame"
    assert client.backlog == 12
    taken = client.take_outputs()
    assert taken.token_ids == [1] and not client.has_outputs and client.num_merged == 0
    assert client.has_mail and client.backlog == 2
    client.unsent = None
    assert not client.has_mail
    client.answers.extend([Pulse(0.0)] * MAX_ANSWERS)
    assert client.has_mail and not client.asks_too_much
    client.answers.append(Pulse(0.0))
    assert client.asks_too_much


def test_a_table_of_clients_never_names_two_alike() -> None:
    table = ClientTable(max_clients=2, lease_s=10.0)
    first, second = table.attach(b"a", 100.0), table.attach(b"b", 105.0, "key")
    assert [one.client_id for one in table] == [0, 1] and table.is_full and second.key == "key"
    assert table.find(b"b") is table.with_id(1) is second and table.find(b"c") is None
    assert table.pop_expired(110.0) == [], "just in time"
    table.extend_leases(1.0)
    assert table.pop_expired(111.0) == [] and table.pop_expired(111.5) == [first]
    assert (table.num_expired, len(table), table.is_full) == (1, 1, False)
    table.remove(first)
    assert table.find(b"a") is None and table.with_id(0) is None
    assert table.attach(b"a", 112.0).client_id == 2
    table.remove(first)
    assert len(table) == 2, "whose name has come to another is gone all the same"


def test_what_a_step_brought_is_sorted_by_client() -> None:
    table = ClientTable(max_clients=9, lease_s=10.0)
    here = table.attach(b"a", 0.0)
    gone = table.attach(b"b", 0.0)
    table.remove(gone)
    mine, theirs = (Sequence(client, 7, [1, 2], SamplingParams()) for client in (0, 1))
    logprobs = TokenLogprobs(6, -0.5, 1, [], [])
    step = StepOutputs(started=[theirs, mine], sequences=[theirs, mine, mine], token_ids=[5, 6, 8])
    step.logprobs[1] = logprobs
    packed = PositionLogprobs.of([logprobs])
    step.prompt_logprobs += [(theirs, packed), (mine, packed)]
    table.collect(step)
    outputs = here.take_outputs()
    assert (outputs.numbers, outputs.token_ids, outputs.logprobs) == ([7, 7], [6, 8], {0: logprobs})
    assert len(outputs.started) == len(outputs.prompt_logprobs) == 1
    assert not here.has_mail and not gone.has_mail


def test_requests_of_who_has_left_do_not_begin_and_there_are_not_too_many() -> None:
    table = ClientTable(max_clients=9, lease_s=10.0)
    first, second = table.attach(b"a", 0.0), table.attach(b"b", 0.0)
    intake = Intake(table)
    for number in range(MAX_REQUESTS - 1):
        intake.add(first if number % 2 else second, add(number))
    assert intake and not intake.is_full
    intake.add(first, add(-1))
    assert intake.is_full
    table.remove(second)
    begun = [intake.next() for _ in range(3)]
    assert [one[1].number for one in begun if one is not None] == [1, 3, 5]
    while intake.next() is not None:
        pass
    assert not intake and intake.next() is None
