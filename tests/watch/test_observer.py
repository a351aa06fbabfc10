"""What viewers are shown of a core: every step, chunk, block, wait and end, and at what price."""

from typing import Any

import pytest

from nanovllm.config import EngineConfig
from nanovllm.core.engine_core import EngineCore
from nanovllm.protocol.messages import AddRequest, Call, CallResult, Outputs
from nanovllm.protocol.watch import BlockContents, Observation, Observe, SequenceView, ShowBlock
from nanovllm.sampling_params import SamplingParams
from nanovllm.watch import observer as observer_module
from nanovllm.watch.observer import Observer
from nanovllm.watch.step_log import MAX_STEPS
from tests.core.fake_executor import FakeExecutor
from tests.core.serving import RawClient, add, serving

VIEWER, OTHER = 7, 8


def make_core(
    *,
    num_blocks: int = 50,
    max_model_len: int = 256,
    windows: tuple[int | None, ...] = (None,),
    **settings: Any,
) -> EngineCore:
    config = EngineConfig.from_kwargs(**settings)
    executor = FakeExecutor(
        config, num_blocks=num_blocks, max_model_len=max_model_len, windows=windows
    )
    return EngineCore(config, executor, executor.start())


def request(number: int, num_prompt: int, max_tokens: int, **fields: Any) -> AddRequest:
    params = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True, n=fields.pop("n", 1))
    prompt = fields.pop("prompt", [number + 1] * num_prompt)
    return AddRequest(number, prompt, params, **fields)


def run(core: EngineCore) -> None:
    while core.busy:
        core.step()


def look(observer: Observer, *, fresh: bool = False) -> Observation:
    return observer.observe(VIEWER, fresh=fresh)


def by_uid(seen: Observation) -> dict[int, SequenceView]:
    return {view.uid: view for view in seen.sequences}


def test_a_core_writes_nothing_down_until_somebody_looks_and_after_nobody_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = make_core()
    observer = Observer(core)
    core.add(0, request(0, 5, 50))
    core.step()
    assert observer.log is None
    look(observer)
    core.step()
    assert observer.log is not None
    monkeypatch.setattr(observer.log, "watched_until", 0.0)
    core.step()
    assert observer.log is None
    assert look(observer).fresh, "what was missed meanwhile must not look like nothing happened"


def test_every_step_is_shown_once_with_its_chunks_and_decodes() -> None:
    core = make_core(max_num_batched_tokens=32, max_inflight_steps=1)
    observer = Observer(core)
    first = look(observer)
    assert (first.fresh, first.steps, first.layout.max_num_batched_tokens) == (True, [], 32)
    core.add(0, request(0, 70, 3))
    for _ in range(3):
        core.step()
    core.add(0, request(1, 5, 2))
    run(core)
    seen = look(observer)
    assert not seen.fresh and seen.num_lost_steps == 0
    chunks = [[(one.uid, one.start, one.num_tokens) for one in step.chunks] for step in seen.steps]
    assert chunks == [[(0, 0, 32)], [(0, 32, 32)], [(0, 64, 6)], [(1, 0, 5)], []]
    assert [step.num_decodes for step in seen.steps] == [0, 0, 0, 1, 2]
    assert [step.budget for step in seen.steps] == [32] * 5
    assert [seen.batches[step.batch] for step in seen.steps] == [[0], [0], [0], [0, 1], [0, 1]]
    assert [step.step for step in seen.steps] == list(range(5))
    for before, after in zip(seen.steps, seen.steps[1:], strict=False):
        assert before.started_at <= before.ended_at <= after.started_at <= after.ended_at
    assert [(end.uid, end.reason, end.num_tokens) for end in seen.ended] == [
        (0, "length", 73),
        (1, "length", 7),
    ]
    assert all(end.ttft_ms is not None and end.ttft_ms > 0 for end in seen.ended)
    again = look(observer)
    assert (again.steps, again.ended, again.batches) == ([], [], {})


def test_steps_on_their_way_are_shown_when_they_are_back() -> None:
    core = make_core(max_inflight_steps=3)
    observer = Observer(core)
    look(observer)
    core.add(0, request(0, 4, 20))
    num_seen = 0
    while core.busy:
        core.step()
        seen = look(observer)
        num_seen += len(seen.steps)
        # A batch is named once and then known.
        assert all(step.batch == 1 for step in seen.steps)
        assert seen.batches == ({1: [0]} if num_seen == len(seen.steps) == 1 else {})
    assert num_seen == 20


def test_blocks_are_shown_as_they_are_added_and_shared() -> None:
    core = make_core(block_size=4, max_num_batched_tokens=64)
    observer = Observer(core)
    prompt = list(range(1, 10))  # two full blocks and a tail
    core.add(0, request(0, 0, 30, prompt=prompt))
    core.step()
    core.add(0, request(1, 0, 30, prompt=prompt))
    core.step()
    tables: dict[int, list[int]] = {}
    for _ in range(12):
        core.step()
        seen = look(observer)
        counts = [0] * seen.layout.num_cells
        for view in seen.sequences:
            table = tables.setdefault(view.uid, [])
            assert view.num_shown == len(table)
            table += view.block_ids
            for block_id in table:
                counts[block_id - 1] += 1
        assert list(seen.ref_counts) == counts
        assert seen.counters.num_free_blocks == counts.count(0)
    assert tables[0][:2] == tables[1][:2] and max(counts) == 2
    assert by_uid(seen)[1].num_cached_tokens == 8
    run(core)
    seen = look(observer)
    assert not any(seen.ref_counts) and sum(seen.has_key) > 2, "cached, but free"
    assert seen.sequences == []


def test_blocks_behind_a_window_are_shown_as_free() -> None:
    core = make_core(block_size=4, max_num_batched_tokens=16, windows=(None, 6))
    observer = Observer(core)
    core.add(0, request(0, 20, 30))
    table: list[int] = []
    for _ in range(20):
        core.step()
        for view in look(observer).sequences:
            table[view.num_shown :] = view.block_ids
        held = [block_id for block_id in core.scheduler.running[0].block_ids if block_id]
        assert table == held and len(held) < 2 * (len(core.scheduler.running[0].token_ids) // 4)
    index = core.scheduler.running[0].block_ids.index(held[-1]) // 2
    assert observer.show_block(held[-1]).index == index


def test_a_table_longer_than_an_answer_comes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer_module, "MAX_BLOCK_IDS", 3)
    core = make_core(block_size=4)
    observer = Observer(core)
    core.add(0, request(0, 30, 5))
    core.step()
    table: list[int] = []
    for _ in range(4):
        (view,) = look(observer).sequences
        assert view.num_shown == len(table) and len(view.block_ids) <= 3
        table += view.block_ids
    assert table == core.scheduler.running[0].block_ids


def test_preemptions_are_shown_with_the_step_that_made_them() -> None:
    core = make_core(num_blocks=9, block_size=4, enable_prefix_caching=False)
    observer = Observer(core)
    look(observer)
    for number in range(2):
        core.add(0, request(number, 8, 12))
    before: dict[int, SequenceView] = {}
    preempted: list[int] = []
    while core.busy:
        core.step()
        seen = look(observer)
        for step in seen.steps:
            preempted += step.preempted
        for uid, view in by_uid(seen).items():
            if uid in before and view.num_preemptions != before[uid].num_preemptions:
                assert view.num_shown == 0, "it holds other blocks now"
                assert view.state == "waiting" and view.num_computed == 0
        before = by_uid(seen)
    assert preempted == [1] * seen.counters.num_preemptions and preempted


@pytest.mark.parametrize(
    ("settings", "fields", "cause"),
    [
        ({"max_num_seqs": 1}, {}, "seats"),
        ({"max_num_batched_tokens": 8}, {}, "budget"),
        ({}, {"num_prompt": 150}, "kv"),
    ],
)
def test_why_a_sequence_waits(settings: Any, fields: Any, cause: str) -> None:
    core = make_core(num_blocks=12, **settings)
    observer = Observer(core)
    core.add(0, request(0, 60, 20))
    core.add(0, request(1, fields.get("num_prompt", 60), 20))
    core.step()
    views = by_uid(look(observer))
    assert (views[0].state, views[0].cause) == ("running", "")
    assert (views[1].state, views[1].cause) == ("waiting", cause)
    assert views[1].started_at == views[1].ttft_s == 0


def test_siblings_wait_for_the_prompt_and_paused_clients_for_themselves() -> None:
    core = make_core(max_num_batched_tokens=16)
    observer = Observer(core)
    core.add(0, request(0, 40, 20, n=3))
    core.step()
    states = [(view.state, view.cause) for view in look(observer).sequences]
    assert states == [("running", ""), ("waiting", "sibling"), ("waiting", "sibling")]
    for _ in range(6):
        core.step()
    core.pause(0)
    core.add(0, request(5, 4, 2))
    states = [(view.state, view.cause) for view in look(observer).sequences]
    assert states == [("paused", "client")] * 4
    core.resume(0)
    core.step()
    assert {view.state for view in look(observer).sequences} == {"running"}


def test_ends_of_every_kind_are_shown() -> None:
    core = make_core()
    observer = Observer(core)
    look(observer)
    for number in range(4):
        core.add(0, request(number, 4, 2 if number == 0 else 50, deadline_ms=1e6))
    core.step()
    core.abort(0, [1])
    core.fail(0, 2, "some cause")
    core.expire(1e12)
    run(core)
    assert {(end.uid, end.reason) for end in look(observer).ended} == {
        (0, "timeout"),
        (1, "abort"),
        (2, "error"),
        (3, "timeout"),
    }


def test_watchers_do_not_take_each_others_news() -> None:
    core = make_core()
    observer = Observer(core)
    look(observer)
    observer.observe(OTHER, fresh=False)
    core.add(0, request(0, 4, 5))
    run(core)
    mine, others = look(observer), observer.observe(OTHER, fresh=False)
    assert mine.steps == others.steps and len(mine.steps) == 5
    assert mine.batches == others.batches and mine.ended == others.ended
    assert look(observer, fresh=True).fresh


def test_steps_beyond_the_ring_are_counted_as_lost() -> None:
    core = make_core(max_inflight_steps=1, max_model_len=700, num_blocks=100)
    observer = Observer(core)
    look(observer)
    core.add(0, request(0, 4, MAX_STEPS + 40))
    run(core)
    seen = look(observer)
    assert (len(seen.steps), seen.num_lost_steps) == (MAX_STEPS, 40)
    assert seen.steps[-1].step == MAX_STEPS + 39
    assert seen.batches == {seen.steps[0].batch: [0]}


def test_a_large_cache_is_shown_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer_module, "MAX_CELLS", 40)
    core = make_core(num_blocks=201, block_size=4)
    observer = Observer(core)
    core.add(0, request(0, 250, 4))
    core.step()
    seen = look(observer)
    layout = seen.layout
    assert (layout.num_blocks, layout.num_dense, layout.stride) == (200, 20, 9)
    assert len(seen.ref_counts) == len(seen.has_key) == layout.num_cells == 40
    shown = [*range(1, 21), *range(21, 201, 9)]
    held = set(core.scheduler.running[0].block_ids)
    assert list(seen.ref_counts) == [int(block_id in held) for block_id in shown]


def test_what_looking_costs_decides_how_soon_to_look_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    observer = Observer(make_core())
    monkeypatch.setattr(observer_module, "COST_SHARE", 1e9)
    assert look(observer).interval_s == observer_module.MIN_INTERVAL_S
    monkeypatch.setattr(observer_module, "COST_SHARE", 1e-9)
    assert look(observer).interval_s == observer_module.MAX_INTERVAL_S


def test_a_block_shows_its_tokens_key_and_holders() -> None:
    core = make_core(block_size=8)
    observer = Observer(core)
    prompt = list(range(1, 20))
    for number in range(2):
        core.add(0, request(number, 0, 40, prompt=prompt, cache_salt="abcde"))
        core.step()
        core.step()
    first, second, tail = core.scheduler.running[0].block_ids[:3]
    root, child, rest = map(observer.show_block, (first, second, tail))
    assert (root.token_ids, root.holders, root.index) == (prompt[:8], [0, 1], 0)
    assert root.parent_key == "" and len(root.key) == 32
    assert (child.token_ids, child.parent_key, child.index) == (prompt[8:16], root.key, 1)
    assert (rest.token_ids[:3], rest.key, rest.holders) == ([17, 18, 19], "", [0])
    run(core)
    assert observer.show_block(second) == BlockContents(
        second, 0, child.key, root.key, None, [], prompt[8:16]
    )
    core.reset_prefix_cache()
    assert observer.show_block(second).token_ids == []
    for unknown in (0, -1, 50):
        with pytest.raises(ValueError, match=r"is not in \[1, 49\]"):
            observer.show_block(unknown)


def test_a_step_beside_decodes_shows_its_smaller_budget() -> None:
    core = make_core(max_num_batched_tokens=32, mixed_prefill_tokens=8, max_inflight_steps=1)
    observer = Observer(core)
    look(observer)
    for number in range(4):
        core.add(0, request(number, 4, 20))
    core.step()
    core.add(0, request(4, 30, 2))
    core.step()
    core.step()
    assert [step.budget for step in look(observer).steps] == [32, 4 + 8, 4 + 8]
    run(core)


def test_over_the_socket(tmp_path: Any) -> None:
    address = f"ipc://{tmp_path}/core.sock"
    with serving(address):
        client = RawClient(address)
        client.greet()
        client.send(Call(0, Observe()))
        first = client.receive(CallResult).result
        assert isinstance(first, Observation) and first.fresh
        client.send(add(0))
        while not client.receive(Outputs).finished:
            pass
        client.send(Call(1, Observe()))
        seen = client.receive(CallResult).result
        assert isinstance(seen, Observation) and not seen.fresh
        assert [step.num_decodes for step in seen.steps] == [0, 1, 1, 1]
        client.send(Call(2, ShowBlock(100_000)))
        assert "block_id 100000" in str(client.receive(CallResult).error)
        client.send(Call(3, ShowBlock(1)))
        assert isinstance(client.receive(CallResult).result, BlockContents)
        client.close()
