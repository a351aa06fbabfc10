"""Caps on the queue, deadlines, fair shares, and what a finished request tells of its waiting."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm.config import EngineConfig, ServiceConfig
from nanovllm.core import clients, waiting
from nanovllm.core.admission import Admission, Deadlines, OverloadedError, check_request
from nanovllm.core.clients import finished_message
from nanovllm.core.engine_core import EngineCore
from nanovllm.core.sequence import Sequence
from nanovllm.core.waiting import KV, WaitClock, WaitingQueue
from nanovllm.limits import MAX_DEADLINE_MS
from nanovllm.protocol.messages import Abort, AddRequest, CoreStatus, Finished, Outputs, Overloaded
from nanovllm.sampling_params import SamplingParams
from tests.core.fake_executor import FakeExecutor
from tests.core.serving import PacedExecutor, RawClient, add, collect, serving


def make_core(*, num_blocks: int = 500, **settings: Any) -> EngineCore:
    config = EngineConfig.from_kwargs(**settings)
    executor = FakeExecutor(config, num_blocks=num_blocks, max_model_len=256)
    return EngineCore(config, executor, executor.start())


def request(number: int, num_prompt: int = 3, num_outputs: int = 4, **options: Any) -> AddRequest:
    params = SamplingParams(max_tokens=num_outputs, ignore_eos=True, n=options.pop("n", 1))
    return AddRequest(number, list(range(1, num_prompt + 1)), params, **options)


def run(core: EngineCore) -> list[Sequence]:
    """To the end; those that ended, in order."""
    ended: list[Sequence] = []
    while core.busy:
        outputs = core.step()
        ended += outputs.finished if outputs is not None else []
    return ended


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/core.sock"


# ---- caps


def test_an_empty_queue_takes_anything_and_a_full_one_says_when_to_come_back() -> None:
    core = make_core(max_queued_requests=3, max_num_seqs=2)
    core.add(0, request(0, n=4))  # more than the cap: but it would never be less crowded
    with pytest.raises(OverloadedError) as refusal:
        core.add(0, request(10))
    assert 0.1 <= refusal.value.retry_after_s <= 60
    assert core.status(epoch="", num_clients=0).num_overloaded == 1
    core.step()
    core.step()
    core.add(0, request(10))
    assert len(run(core)) == 5


def test_the_cap_on_tokens_counts_every_output_and_started_ones_no_more() -> None:
    core = make_core(max_queued_tokens=50, max_num_seqs=1)
    core.add(0, request(0, 40))
    core.step()
    core.add(0, request(1, 20, n=2))
    with pytest.raises(OverloadedError):
        core.add(0, request(5, 20))
    core.add(0, request(6, 10))
    status = core.status(epoch="", num_clients=0)
    assert (status.num_queued, status.num_queued_tokens) == (3, 50)
    core.abort(0, [1])
    core.add(0, request(7, 20))
    run(core)
    assert core.status(epoch="", num_clients=0).num_queued_tokens == 0


def test_what_was_under_way_elsewhere_is_never_refused() -> None:
    core = make_core(max_queued_requests=1, max_num_seqs=1)
    core.add(0, request(0))
    core.add(0, request(1, output_token_ids=[7, 8]))
    assert len(run(core)) == 2


def test_a_refusal_is_typed_and_others_are_served(address: str) -> None:
    executor = PacedExecutor(EngineConfig(), step_s=0.1)  # 40 s for what has the seat
    with serving(address, executor, max_queued_requests=2, max_num_seqs=1):
        client = RawClient(address)
        client.greet()
        client.send(add(0, max_tokens=400))
        client.receive(Outputs)  # it has its seat, and the queue is empty
        for number in range(1, 8):
            client.send(add(number))
        refused = [client.receive(Overloaded) for _ in range(5)]
        assert [one.number for one in refused] == [3, 4, 5, 6, 7]
        assert all(one.retry_after_s > 0 and not one.draining for one in refused)
        client.send(Abort([0]))
        executor.step_s = 0.0
        assert collect(client, 1, 2)[1][2].reason == "length"
        client.close()


# ---- deadlines


def test_expired_waiters_never_start_and_expired_runners_end() -> None:
    core = make_core(max_num_seqs=1)
    core.add(0, request(0, num_outputs=200, deadline_ms=600_000))
    core.add(0, request(1, deadline_ms=300_000))
    core.add(0, request(2, ttft_deadline_ms=300_000))
    core.add(0, request(3, ttft_deadline_ms=10**8))
    core.step()
    assert core.next_deadline is not None
    expired = core.expire(time.monotonic() + 301)
    assert [one.number for one in expired] == [1, 2]
    assert all(one.finish_reason == "timeout" and not one.started_at for one in expired)
    (runner,) = core.expire(time.monotonic() + 601)
    assert runner.number == 0 and runner.first_token_at and runner.finish_reason == "timeout"
    assert [one.number for one in run(core)] == [3]
    status = core.status(epoch="", num_clients=0)
    assert status.num_timeouts == 3 and status.num_free_blocks == status.num_blocks


def test_a_first_token_in_time_meets_its_deadline() -> None:
    core = make_core()
    core.add(0, request(0, num_outputs=50, ttft_deadline_ms=20_000))
    core.step()
    assert core.expire(time.monotonic() + 21) == [] and core.next_deadline == math.inf


@pytest.mark.parametrize("name", ["deadline_ms", "ttft_deadline_ms"])
def test_a_deadline_that_is_none_is_refused(name: str) -> None:
    for value in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=name):
            make_core().add(0, request(0, **{name: value}))


@pytest.fixture
def slow_client(address: str) -> Iterator[RawClient]:
    with serving(address, PacedExecutor(EngineConfig(), step_s=0.005), max_num_seqs=1):
        client = RawClient(address)
        client.greet()
        yield client
        client.close()


def test_a_client_hears_of_timeouts(slow_client: RawClient) -> None:
    message = add(0, max_tokens=500)
    late = AddRequest(0, message.prompt_token_ids, message.params, deadline_ms=60)
    slow_client.send(late)
    token_ids, finished = collect(slow_client, 0)
    assert finished[0].reason == "timeout" and len(token_ids[0]) < 40


# ---- fair shares


def admission_order(policy: str, **options: Any) -> list[int]:
    """A flood of 20 from client 0, then 3 of client 1, one seat: clients as they finish."""
    core = make_core(max_num_seqs=1, scheduling_policy=policy)
    for number in range(20):
        core.add(0, request(number, 8, **options))
    for number in range(3):
        core.add(1, request(number, 8))
    return [sequence.client_id for sequence in run(core)]


def test_a_flood_does_not_starve_a_light_tenant() -> None:
    assert admission_order("fcfs")[:20] == [0] * 20
    # Served in turns, since all cost the same.
    assert sorted(admission_order("fair")[:6]) == [0, 0, 0, 1, 1, 1]


def test_a_tenant_may_span_clients_or_be_part_of_one() -> None:
    core = make_core(max_num_seqs=1)
    for number in range(10):
        core.add(0, request(number, tenant="heavy"))
        core.add(1, request(number, tenant="heavy"))
    core.add(0, request(50, tenant="light"))
    assert 50 in [sequence.number for sequence in run(core)][:3]


def test_shares_are_of_tokens_not_of_requests() -> None:
    core = make_core(max_num_seqs=1)
    for number in range(10):
        core.add(0, request(number, 60, 40))
    for number in range(40):
        core.add(1, request(number, 6, 4))
    ended = run(core)
    early = [one for one in ended[:20] if one.client_id == 0]
    assert 1 <= len(early) <= 3  # about one in ten


def test_idleness_earns_no_credit() -> None:
    core = make_core(max_num_seqs=1)
    for number in range(20):
        core.add(0, request(number, 30, 30))
    for _ in range(200):
        core.step()
    for number in range(8):
        core.add(1, request(number, 30, 30))
    clients = [one.client_id for one in run(core)]
    assert clients[:8].count(1) <= 5  # it came late, and does not catch up at the other's cost


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    core = make_core(max_num_seqs=2)
    for number in range(12):
        core.add(0, request(number))
    assert [one.number for one in run(core)] == list(range(12))


# ---- why


def why_of(sequence: Sequence) -> Any:
    why = finished_message(sequence).why
    assert why is not None
    return why


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"max_num_seqs": 1}, "seats_ms"),
        ({"num_blocks": 6}, "kv_ms"),
        ({"max_num_batched_tokens": 2}, "budget_ms"),
    ],
)
def test_the_reason_for_waiting_is_told(
    settings: dict[str, Any], cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0  # by a clock that goes on with each step, and by nothing else
    monkeypatch.setattr(time, "monotonic", lambda: now)
    core = make_core(enable_prefix_caching=False, **settings)
    core.add(0, request(0, 40, 8))
    core.add(0, request(1, 40, 8))
    while core.busy:
        now += 0.002
        outputs = core.step()
        for sequence in outputs.finished if outputs is not None else []:
            last = sequence
    why = why_of(last)
    others = {"seats_ms", "kv_ms", "budget_ms"} - {cause}
    assert getattr(why, cause) > 10
    assert all(getattr(why, other) < 0.3 * getattr(why, cause) for other in others), why
    assert why.queued_ms >= getattr(why, cause) * 0.9


def test_preemption_and_times_are_told() -> None:
    core = make_core(num_blocks=10, enable_prefix_caching=False)
    core.add(0, request(0, 40, 80))
    core.add(0, request(1, 40, 80))
    ended = run(core)
    victim = next(one for one in ended if one.num_preemptions)
    why = why_of(victim)
    assert why.num_preemptions >= 1 and why.num_recomputed_tokens >= 40
    assert 0 < why.queued_ms <= why.ttft_ms and why.inter_token_ms > 0
    status = core.status(epoch="", num_clients=0)
    assert status.num_recomputed_tokens >= why.num_recomputed_tokens


def test_of_a_request_that_is_resumed_only_what_is_made_here_counts() -> None:
    core = make_core()
    for number, num_outputs in enumerate((4, 5)):
        core.add(0, request(number, 3, num_outputs, output_token_ids=[7, 8, 9]))
    one, two = sorted(run(core), key=lambda sequence: sequence.number)
    assert len(one.token_ids) == 7 and why_of(one).inter_token_ms is None, "there is one token"
    why = clients.why_of(two, two.first_token_at + 1.0)
    assert why.inter_token_ms == pytest.approx(1000), "there are two"


def test_it_is_told_to_the_client(address: str) -> None:
    with serving(address):
        client = RawClient(address)
        client.greet()
        client.send(add(0, max_tokens=1))
        client.send(add(1, max_tokens=9))
        ends: dict[int, Finished] = collect(client, 0, 1)[1]
        one, nine = ends[0].why, ends[1].why
        assert one is not None and nine is not None
        assert one.inter_token_ms is None and one.ttft_ms is not None
        assert nine.inter_token_ms is not None and nine.inter_token_ms > 0
        assert client.receive(CoreStatus).num_queued == 0
        client.close()


# ---- what is bounded


def test_a_deadline_far_away_keeps_nothing_of_what_has_ended() -> None:
    core = make_core()
    ended = []
    for number in range(300):
        core.add(0, request(number, num_outputs=1, deadline_ms=1e15, ttft_deadline_ms=1e15))
        if number % 2:
            ended += run(core)
        else:
            ended += core.abort(0, [number])
    assert len(ended) == 300 and core.next_deadline == math.inf
    # The list, the loop and the call hold each; a deadline would add three.
    assert max(sys.getrefcount(one) for one in ended) <= 4


def test_deadlines_are_capped_at_a_day() -> None:
    core = make_core()
    core.add(0, request(0, deadline_ms=1e15))
    assert core.next_deadline - time.monotonic() <= MAX_DEADLINE_MS / 1e3


def test_by_default_the_queue_is_finite() -> None:
    core = make_core()
    with pytest.raises(OverloadedError):
        for number in range(0, 10_000, 100):
            core.add(0, request(number, n=100, num_outputs=1))
    assert core.status(epoch="", num_clients=0).num_queued <= 8192


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"bad_words_token_ids": [[1]] * 2049}, "bad_words_token_ids holds 2049 words"),
        ({"bad_words_token_ids": [[1]] * 2000 + [[1] * 200]}, "times the longest"),
        ({"cache_salt": "x" * 1025}, "cache_salt holds 1025 characters"),
        ({"tenant": "x" * 1025}, "tenant holds 1025 characters"),
    ],
)
def test_a_request_has_limits_of_its_own(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make_core().add(0, request(0, **options))


def test_n_copies_of_a_long_prompt_are_too_much() -> None:
    config = EngineConfig()
    executor = FakeExecutor(config, num_blocks=500, max_model_len=100_000)
    core = EngineCore(config, executor, executor.start())
    with pytest.raises(ValueError, match="tokens times n"):
        core.add(0, request(0, 20_000, n=1000))


def test_an_abort_overtakes_its_request_and_both_are_answered(address: str) -> None:
    executor = PacedExecutor(EngineConfig(), step_s=0.1)  # 40 s for the first
    with serving(address, executor, max_num_seqs=1):
        client = RawClient(address)
        client.greet()
        for number in range(40):
            client.send(add(number, max_tokens=400))
        client.send(Abort(list(range(40))))
        client.send(add(100, max_tokens=2))
        token_ids, finished = collect(client, *range(40), 100)
        assert sum(map(len, token_ids.values())) < 800  # of 16000
        assert {finished[number].reason for number in range(40)} == {"abort"}
        assert finished[100].reason == "length"
        client.close()


def test_a_refusal_says_when_by_the_rate_at_which_sequences_start() -> None:
    """Ten that start in ten seconds are one a second, as are three one after the other."""
    request_of_3 = request(1, n=3)
    for starts in ([(10, 110.0)], [(1, 101.0), (1, 102.0), (1, 103.0)]):
        admission = Admission(ServiceConfig(max_queued_requests=1))
        admission.note_starts(1, 100.0)
        for num_started, at in starts:
            admission.note_starts(num_started, at)
        with pytest.raises(OverloadedError) as refusal:
            admission.check(request_of_3, num_queued=1, num_queued_tokens=1)
        assert refusal.value.retry_after_s == pytest.approx(3.0)


def test_the_cap_on_tokens_counts_the_outputs_of_a_new_request() -> None:
    core = make_core(max_queued_tokens=50, max_num_seqs=1)
    core.add(0, request(0, 40))
    core.step()
    core.add(0, request(1, 5))
    with pytest.raises(OverloadedError):
        core.add(0, request(2, 20, n=3))
    core.add(0, request(2, 15, n=3))


def test_who_waits_stays_known_however_many_tenants_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has been served is not forgotten, or it would be served once more."""
    monkeypatch.setattr("nanovllm.core.waiting.MAX_TENANTS", 4)
    core = make_core(max_num_seqs=1)
    for number in range(3):
        core.add(0, request(number, 30, 30))
    for _ in range(20):
        core.step()
    served = core.scheduler.waiting.tenant("client 0").served
    assert served > 0
    for number in range(20):
        core.add(number + 1, request(0, 3, 1))
    assert core.scheduler.waiting.tenant("client 0").served >= served
    assert len(core.scheduler.waiting.tenants) <= 4 + 20


def test_a_tenant_that_comes_when_nobody_waits_begins_where_the_last_one_was() -> None:
    queue = WaitingQueue(by_tenant=True)
    old, new = (Sequence(n, 0, [1], SamplingParams()) for n in range(2))
    for number, one in enumerate((old, new)):
        one.tenant, one.order = queue.tenant(f"client {number}"), (0, number)
    queue.push(old)
    old.tenant.served = 100.0
    queue.remove(old)
    queue.push(new)
    assert new.tenant.served == 100.0


def test_outputs_count_as_soon_as_there_are_two_tenants() -> None:
    queue = WaitingQueue(by_tenant=True)
    one = Sequence(0, 0, [1], SamplingParams())
    one.tenant = queue.tenant("a")
    queue.charge_for_outputs([one])
    assert one.tenant.served == 0.0, "there is nobody to be compared with"
    queue.tenant("b")
    queue.charge_for_outputs([one, one])
    assert one.tenant.served == 2 * waiting.OUTPUT_WEIGHT


def test_a_queue_keeps_order_and_little_of_those_who_have_left() -> None:
    queue = WaitingQueue(by_tenant=True)
    sequences = [Sequence(0, number, [1], SamplingParams()) for number in range(200)]
    for number, one in enumerate(sequences):
        one.tenant, one.order = queue.tenant("a"), (0, number)
        queue.push(one)
    tenant = queue.tenant("a")
    for one in [*sequences[:30], *sequences[60:170]]:  # not in the order in which they would run
        queue.discard(one)
    assert len(tenant.waiting) <= 2 * 60 + 64
    order = []
    while (head := queue.head()) is not None:
        order.append(head)
        queue.remove(head)
    assert order == sequences[30:60] + sequences[170:]
    assert not tenant.waiting and not queue.contenders and len(queue) == tenant.num_waiting == 0


def test_a_sequence_is_told_what_held_it_up_and_nothing_from_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: 110.0))
    clock = WaitClock()
    clock.hold(KV, 100.0)
    late = Sequence(0, 0, [1], SamplingParams())
    late.waited_s = (1.0, 2.0, 4.0)  # before it was preempted
    late.wait_mark = clock.read(107.0)
    assert late.wait_mark == (0.0, 0.0, 7.0)
    assert clock.waited(late) == (1.0, 2.0, 7.0) and clock.cause == "kv"


def asking(number: int = 0, num_prompt: int = 3, **options: Any) -> AddRequest:
    names = ("output_token_ids", "bad_words_token_ids", "cache_salt", "tenant")
    rest = {name: options.pop(name) for name in names if name in options}
    return AddRequest(number, [1] * num_prompt, SamplingParams(**options), **rest)


@pytest.mark.parametrize(
    ("make", "most", "complaint"),
    [
        (lambda size: asking(size), 2**53, "number must be in"),
        (lambda size: asking(cache_salt="x" * size), 1024, "cache_salt holds"),
        (lambda size: asking(tenant="x" * size), 1024, "tenant holds"),
        (lambda size: asking(bad_words_token_ids=[[1]] * size), 2048, "holds 2049 words"),
        (
            lambda size: asking(bad_words_token_ids=[[1]] * 1023 + [[1] * size]),
            256,
            "times the longest",
        ),
        (lambda size: asking(num_prompt=size), 16_383, "leaves no room for output"),
        (
            lambda size: asking(num_prompt=10_000, output_token_ids=[1] * size, max_tokens=None),
            6_383,
            "leaves no room for output",
        ),
        (lambda size: asking(num_prompt=size, n=16_384), 1024, "tokens times n"),
        (
            lambda size: asking(output_token_ids=[1] * size, max_tokens=8),
            7,
            "were generated already",
        ),
    ],
)
def test_what_is_allowed_at_most_is_allowed(
    make: Callable[[int], AddRequest], most: int, complaint: str
) -> None:
    info = FakeExecutor(EngineConfig(), num_blocks=500, max_model_len=16_384).start()
    check_request(make(most), info)
    with pytest.raises(ValueError, match=complaint):
        check_request(make(most + 1), info)


def test_the_first_number_and_the_last_id_are_allowed_and_those_beside_them_are_not() -> None:
    info = FakeExecutor(EngineConfig(), num_blocks=500, max_model_len=64).start()
    last = info.vocab_size - 1
    check_request(asking(0, bad_words_token_ids=[[0, last]], output_token_ids=[last]), info)
    for wrong in (
        asking(-1),
        asking(0, bad_words_token_ids=[[last + 1]]),
        asking(0, output_token_ids=[last + 1]),
        asking(0, output_token_ids=[-1]),
    ):
        with pytest.raises(ValueError):
            check_request(wrong, info)


def test_the_mean_time_between_starts_follows_them_slowly_and_answers_have_bounds() -> None:
    admission = Admission(ServiceConfig(max_queued_requests=2, max_queued_tokens=30))
    admission.note_starts(1, 100.0)

    def refused_for(n: int) -> float:
        with pytest.raises(OverloadedError) as refusal:
            admission.check(request(0, 10, n=n), num_queued=1, num_queued_tokens=15)
        return refusal.value.retry_after_s

    assert refused_for(2) == pytest.approx(2.0), "at first a second each is assumed"
    admission.note_starts(1, 106.0)
    assert refused_for(2) == pytest.approx(4.0), "a gap of 6 s counts a fifth: 1 + (6 - 1) / 5"
    assert refused_for(100) == 60.0
    for _ in range(100):
        admission.note_starts(1000, 106.0)
    assert refused_for(2) == pytest.approx(0.1)
    assert admission.num_overloaded == 4
    admission.check(request(0, 15, n=1), num_queued=1, num_queued_tokens=15)  # just as much as fits
    with pytest.raises(OverloadedError):
        admission.check(request(0, 16, n=1), num_queued=1, num_queued_tokens=15)


def test_what_is_due_now_has_expired_and_the_first_due_comes_first() -> None:
    deadlines = Deadlines()
    sequences = []
    for number, (limit_ms, ttft_ms) in enumerate([(5000, None), (None, 2000), (9000, 3000)]):
        message = request(number, deadline_ms=limit_ms, ttft_deadline_ms=ttft_ms)
        sequence = Sequence(0, number, message.prompt_token_ids, message.params)
        sequence.queued_at = 100.0
        deadlines.add(sequence, message)
        sequences.append(sequence)
    assert deadlines.next_due == 102.0
    assert deadlines.pop_expired(101.9) == []
    assert deadlines.pop_expired(102.0) == [sequences[1]]
    sequences[2].first_token_at = 102.5  # so that only its end is due
    assert deadlines.pop_expired(105.0) == [sequences[0]]
    assert deadlines.next_due == 109.0
    deadlines.remove(sequences[2])
    assert deadlines.next_due is None and deadlines.pop_expired(200.0) == []


def test_the_wait_of_one_that_comes_later_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    queue = WaitingQueue(by_tenant=False)
    first, later = (sequence_of(queue, "", number) for number in range(2))
    queue.push(first)
    queue.hold_up(KV)
    now = 105.0
    queue.push(later)
    now = 107.0
    for sequence in (first, later):
        queue.remove(sequence)
    assert (first.waited_s, later.waited_s) == ((0.0, 0.0, 7.0), (0.0, 0.0, 2.0))


def sequence_of(queue: WaitingQueue, tenant: str, number: int) -> Sequence:
    sequence = Sequence(0, number, [1, 2], SamplingParams())
    sequence.order, sequence.tenant = (0, number), queue.tenant(tenant)
    return sequence


def test_of_many_tenants_those_who_wait_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MAX_TENANTS", 4)
    queue = WaitingQueue(by_tenant=True)
    queue.push(sequence_of(queue, "a", 0))
    for name in ("b", "c"):
        queue.tenant(name)
    assert set(queue.tenants) == {"", "a", "b", "c"}, "as many as may be known"
    a = queue.tenant("a")
    queue.tenant("d")
    assert set(queue.tenants) == {"", "a", "d"} and queue.tenant("a") is a


def test_a_queue_that_is_left_by_others_than_its_head_stays_small() -> None:
    queue = WaitingQueue(by_tenant=False)
    sequences = [sequence_of(queue, "", number) for number in range(2000)]
    for sequence in sequences:
        queue.push(sequence)
    for sequence in sequences[1:-2]:
        queue.remove(sequence)
    assert len(queue.tenant("").waiting) <= 2 * 3 + 64
    assert [queue.head(), len(queue)] == [sequences[0], 3]
    queue.remove(sequences[0])
    assert queue.head() is sequences[-2]
    queue.discard(sequences[-2])
    queue.discard(sequences[-2])
    assert queue.head() is sequences[-1] and list(queue) == [sequences[-1]]
