"""The whole state of the scheduling side as plain data, and back: what a recording begins with.

`recorder` takes one between two steps, `replay` restores it. Sequences are numbered, and refer to
each other by number. Times are left behind: no plan depends on them.
"""

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from nanovllm.core.block_manager import BlockManager, FreeList
from nanovllm.core.compilations import Waiting
from nanovllm.core.engine_core import EngineCore
from nanovllm.core.grammar import Matcher
from nanovllm.core.sequence import ScheduledStep, Sequence, Status
from nanovllm.protocol.plan import StepPlan
from nanovllm.sampling_params import SamplingParams

# What is copied as it is, or means something else elsewhere.
TIMES = {"queued_at", "started_at", "first_token_at", "waited_s", "wait_mark"}
REFERENCES = {"leader", "forks", "tenant", "status", "stop_ids", "order", "params", "matcher"}
PLAIN_SLOTS = sorted(set(Sequence.__slots__) - TIMES - REFERENCES)


class SequenceState(msgspec.Struct, array_like=True):
    """One sequence; `plain` are the values of `PLAIN_SLOTS`."""

    plain: list[Any]
    has_started: bool
    status: int
    order: tuple[int, int]
    params: SamplingParams
    stop_ids: list[int]
    tenant: str
    leader: int | None
    forks: list[int]
    is_constrained: bool  # what its grammar decides from here on stands in the recording


class StepState(msgspec.Struct, array_like=True):
    """A step in flight."""

    plan: StepPlan
    sequences: list[int]
    sampled: list[int]
    constrained: list[int]
    forced: frozenset[int]


class CompilingState(msgspec.Struct, array_like=True):
    """A request that waits for its grammar."""

    sequences: list[int]
    priority: int
    tenant: str


class BlockState(msgspec.Struct, array_like=True):
    """Of `BlockManager`."""

    hash_seed: int
    free: list[int]
    ref_counts: list[int]
    keys: list[bytes | None]
    messages: list[bytes]


class Snapshot(msgspec.Struct):
    """Lists of sequences are lists of indices into `sequences`."""

    sequences: list[SequenceState]
    live: list[int]
    inflight: list[StepState]
    is_unsampled: bool  # the last of them is between its halves
    paused_clients: list[int]
    random: tuple[int, list[int], float | None]
    running: list[int]
    paused: list[int]
    started: list[int]
    free_rows: list[int]
    num_arrived: int
    num_steps: int
    num_queued: int
    num_queued_tokens: int
    waiting: list[int]
    contenders: list[str]
    parked: dict[int, list[int]]
    tenants: dict[str, float]
    floor: float
    compiling: list[CompilingState]
    blocks: BlockState


def take_snapshot(core: EngineCore) -> Snapshot:
    """Between two steps; nothing of `core` is shared with it."""
    scheduler, waiting = core.scheduler, core.scheduler.waiting
    known = _known_sequences(core)
    index = {id(sequence): number for number, sequence in enumerate(known)}

    def indices(sequences: Iterable[Sequence]) -> list[int]:
        return [index[id(sequence)] for sequence in sequences]

    version, internal, gauss = core.seeds.getstate()
    snapshot = Snapshot(
        sequences=[_state_of(sequence, index) for sequence in known],
        live=indices(core.sequences.values()),
        inflight=[
            StepState(
                step.plan,
                indices(step.sequences),
                indices(step.sampled),
                step.constrained,
                step.forced,
            )
            for step, _ in core.inflight
        ],
        is_unsampled=core.unsampled is not None,
        paused_clients=sorted(core.paused_clients),
        random=(version, list(internal), gauss),
        running=indices(scheduler.running),
        paused=indices(scheduler.paused),
        started=indices(scheduler.newly_started),
        free_rows=scheduler.free_rows,
        num_arrived=scheduler.num_arrived,
        num_steps=scheduler.num_steps,
        num_queued=scheduler.num_queued,
        num_queued_tokens=scheduler.num_queued_tokens,
        waiting=indices(waiting),
        contenders=[tenant.name for tenant in waiting.contenders],
        parked={client: indices(some) for client, some in waiting.parked.items()},
        tenants={name: tenant.served for name, tenant in waiting.tenants.items()},
        floor=waiting.floor,
        compiling=[
            CompilingState(indices(group.sequences), group.priority, group.tenant)
            for group in core.grammars.waiting
        ],
        blocks=_blocks_of(core.blocks),
    )
    return msgspec.msgpack.decode(msgspec.msgpack.encode(snapshot), type=Snapshot)


def restore(
    core: EngineCore,
    snapshot: Snapshot,
    *,
    make_matcher: Callable[[Sequence], Matcher],
    wait: Callable[[Waiting], None],
) -> list[ScheduledStep]:
    """Give a fresh `core` that state; returns the steps in flight, for their results to come.

    make_matcher: for a sequence that is constrained. wait: takes who waits for a grammar.
    """
    scheduler, waiting = core.scheduler, core.scheduler.waiting
    for name, served in snapshot.tenants.items():
        waiting.tenant(name).served = served
    known = [_sequence_of(state) for state in snapshot.sequences]
    for sequence, state in zip(known, snapshot.sequences, strict=True):
        sequence.tenant = waiting.tenant(state.tenant)
        sequence.leader = None if state.leader is None else known[state.leader]
        sequence.forks = [known[number] for number in state.forks]
        sequence.matcher = make_matcher(sequence) if state.is_constrained else None
    for group in snapshot.compiling:
        wait(Waiting([known[n] for n in group.sequences], group.priority, group.tenant))
    core.sequences = {(known[n].client_id, known[n].number): known[n] for n in snapshot.live}
    core.paused_clients = set(snapshot.paused_clients)
    version, internal, gauss = snapshot.random
    core.seeds.setstate((version, tuple(internal), gauss))
    scheduler.running = [known[n] for n in snapshot.running]
    scheduler.paused = [known[n] for n in snapshot.paused]
    scheduler.newly_started = [known[n] for n in snapshot.started]
    for name in ("free_rows", "num_arrived", "num_steps"):
        setattr(scheduler, name, getattr(snapshot, name))
    scheduler.num_queued = snapshot.num_queued
    scheduler.num_queued_tokens = snapshot.num_queued_tokens
    for name in snapshot.contenders:  # in this order: it breaks ties
        waiting.contenders[waiting.tenant(name)] = None
    for n in snapshot.waiting:
        waiting.push(known[n])
    for name, served in snapshot.tenants.items():  # pushing has lifted some
        waiting.tenant(name).served = served
    waiting.parked = {
        client: dict.fromkeys(known[n] for n in some) for client, some in snapshot.parked.items()
    }
    waiting.floor = snapshot.floor
    _restore_blocks(core.blocks, snapshot.blocks)
    return [
        ScheduledStep(
            step.plan,
            [known[n] for n in step.sequences],
            [known[n] for n in step.sampled],
            step.constrained,
            step.forced,
        )
        for step in snapshot.inflight
    ]


def _known_sequences(core: EngineCore) -> list[Sequence]:
    """All that anything refers to, also those that have ended."""
    found: dict[Sequence, None] = dict.fromkeys(core.sequences.values())
    for step, _ in core.inflight:
        found |= dict.fromkeys(step.sequences)
    found |= dict.fromkeys(core.scheduler.newly_started)
    for sequence in list(found):
        while sequence.leader is not None and sequence.leader not in found:
            sequence = sequence.leader
            found[sequence] = None
    return list(found)


def _state_of(sequence: Sequence, index: dict[int, int]) -> SequenceState:
    return SequenceState(
        plain=[getattr(sequence, name) for name in PLAIN_SLOTS],
        has_started=bool(sequence.started_at),
        status=sequence.status.value,
        order=sequence.order,
        params=sequence.params,
        stop_ids=sorted(sequence.stop_ids),
        tenant=sequence.tenant.name,
        leader=None if sequence.leader is None else index[id(sequence.leader)],
        forks=[index[id(fork)] for fork in sequence.forks],
        is_constrained=sequence.matcher is not None,
    )


def _sequence_of(state: SequenceState) -> Sequence:
    sequence = Sequence(0, 0, [], state.params)
    for name, value in zip(PLAIN_SLOTS, state.plain, strict=True):
        setattr(sequence, name, value)
    sequence.started_at = float(state.has_started)
    sequence.status = Status(state.status)
    sequence.order = state.order
    sequence.stop_ids = frozenset(state.stop_ids)
    return sequence


def _blocks_of(blocks: BlockManager) -> BlockState:
    return BlockState(
        blocks.hash_seed,
        list(blocks.free_list),
        blocks.reference_counts,
        blocks.keys,
        blocks.messages,
    )


def _restore_blocks(blocks: BlockManager, state: BlockState) -> None:
    blocks.hash_seed = state.hash_seed
    blocks.free_list = FreeList(blocks.num_blocks)
    for block_id in range(1, blocks.num_blocks):
        blocks.free_list.remove(block_id)
    for block_id in state.free:
        blocks.free_list.append(block_id)
    blocks.reference_counts = state.ref_counts
    blocks.keys, blocks.messages = state.keys, state.messages
    blocks.block_of_key = {key: n for n, key in enumerate(state.keys) if key is not None}
