"""Every message survives the wire, and tags tell them apart."""

import msgspec
import pytest

from nanovllm.protocol import group, messages, plan, watch
from nanovllm.protocol.messages import (
    Abort,
    AddRequest,
    Call,
    CallResult,
    CoreFailed,
    CoreStatus,
    DeathsExplained,
    Detached,
    Finished,
    FromCore,
    Goodbye,
    Heartbeat,
    Hello,
    Loading,
    Outputs,
    Overloaded,
    PromptLogprobs,
    Pulse,
    RequestFailed,
    ResetPrefixCache,
    SetPace,
    Started,
    ToCore,
    TrialAccepted,
    TrialOffered,
    TrialOver,
    Welcome,
    Why,
)
from nanovllm.protocol.plan import (
    BlockAppend,
    KnownTokens,
    NewRow,
    PositionLogprobs,
    StepMasks,
    StepPlan,
    StepResult,
    TokenLogprobs,
    WorkerInfo,
)
from nanovllm.protocol.watch import (
    BlockContents,
    CacheLayout,
    Chunk,
    Counters,
    EndView,
    Observation,
    Observe,
    Pace,
    SequenceView,
    ShowBlock,
    StepView,
)
from nanovllm.sampling_params import SamplingParams

LOGPROBS = TokenLogprobs(5, -0.25, 1, [5, 6], [-0.25, -1.5])
PARAMS = SamplingParams(temperature=0, stop_token_ids=[2])
INFO = WorkerInfo(
    device="cpu",
    dtype="float32",
    attention_backend="torch",
    architecture="LlamaForCausalLM",
    num_blocks=10,
    max_model_len=64,
    vocab_size=100,
    eos_token_ids=[2],
)
TO_CORE = [
    Hello(),
    AddRequest(3, [1, 2], PARAMS, [4], [[5, 6]], priority=-1, cache_salt="s"),
    AddRequest(3, [1], PARAMS, tenant="t", deadline_ms=2.5, ttft_deadline_ms=1.0),
    Abort([1, 2]),
    Heartbeat(),
    Goodbye(),
    TrialAccepted(3),
    TrialOver(3),
    DeathsExplained(["epoch"]),
    Call(9, ResetPrefixCache()),
    Call(9, Observe(fresh=True)),
    Call(9, ShowBlock(7)),
    Call(9, SetPace(num_steps=1, interval_ms=2.5, for_s=9)),
]
OBSERVATION = Observation(
    fresh=True,
    now=1.5,
    interval_s=0.125,
    layout=CacheLayout(*range(7)),
    pace=Pace(True, False, 2.5),
    counters=Counters(*range(11)),
    ref_counts=b"\0\xff",
    has_key=b"\0\1",
    sequences=[SequenceView(1, 0, 5, "waiting", "kv", 0.5, 0.0, 0.0, 9, 9, 0, 0, 1, 0, [3, 4])],
    num_hidden=0,
    steps=[StepView(4, 1.0, 1.25, 512, 2, [Chunk(1, 0, 16)], 3, [2])],
    batches={3: [1, 2, 3]},
    num_lost_steps=0,
    ended=[EndView(2, 0, 5, "stop", 0.5, 1.25, 16, 20, 0, 1, 1.0, 0.0, 0.0, 1.0, 2.5, None)],
)
FROM_CORE = [
    Loading("weights", 0.5),
    Welcome(1, "epoch", "model", "name", 16, 256, INFO),
    Outputs(
        [1],
        [7],
        {0: LOGPROBS},
        [PromptLogprobs(1, PositionLogprobs.of([LOGPROBS]))],
        [Started(1, 16, 2.5)],
        [],
    ),
    Outputs(finished=[Finished(1, "stop", 2, 0)]),
    Outputs(finished=[Finished(1, "timeout", None, 0, why=Why(1, 2, 3, 4, 5, 6, 7, 8.5, None))]),
    Overloaded(1, 2.5, draining=True),
    TrialOffered(3),
    Detached("why"),
    RequestFailed(1, "why"),
    CoreStatus("epoch", *range(12)),
    Pulse(),
    CallResult(9, True),
    CallResult(9, OBSERVATION),
    CallResult(9, BlockContents(7, 1, "ab", "", 0, [1], [5, 6])),
    CoreFailed("why", "traceback", usage=True),
]
WORKER = [
    StepPlan(
        1,
        [NewRow(0, [1, 2], 2, [3], PARAMS, 7, [])],
        [BlockAppend(0, 1, 4)],
        [0],
        [0],
        [2],
        [0],
        [KnownTokens(1, 5, [6, 7])],
    ),
    StepMasks([0, 2], [9, 4], [4], memoryview(b"\x07\0\0\0")),
    StepResult(1, [5], {0: LOGPROBS}, {0: PositionLogprobs.of([LOGPROBS])}),
    INFO,
]

STEP_PLAN, MASKS, RESULT, _ = WORKER
TO_RANK = [
    group.Connect(4000),
    group.Allocate(9),
    group.Submit(STEP_PLAN),
    group.Sample(1, MASKS),
    group.Sample(1, None),
    group.WarmUp(),
    group.Leave(),
]
FROM_RANK = [
    group.Listening(4000),
    group.Progress("weights", 0.5),
    group.Started(INFO),
    group.Allocated(),
    group.Sampled(RESULT),
    group.Digest(1, 7, 8),
    group.WarmedUp(True),
    group.RankFailed("why", "traceback", usage=True),
]


@pytest.mark.parametrize("message", TO_RANK, ids=lambda m: type(m).__name__)
def test_messages_to_a_rank(message: group.ToRank) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=group.ToRank) == message


@pytest.mark.parametrize("message", FROM_RANK, ids=lambda m: type(m).__name__)
def test_messages_from_a_rank(message: group.FromRank) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=group.FromRank) == message


@pytest.mark.parametrize("message", TO_CORE, ids=lambda m: type(m).__name__)
def test_messages_to_the_core(message: ToCore) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=ToCore) == message


@pytest.mark.parametrize("message", FROM_CORE, ids=lambda m: type(m).__name__)
def test_messages_from_the_core(message: FromCore) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=FromCore) == message


@pytest.mark.parametrize("message", WORKER, ids=lambda m: type(m).__name__)
def test_messages_to_and_from_workers(message: msgspec.Struct) -> None:
    encoded = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(encoded, type=type(message)) == message


def test_no_message_is_left_out() -> None:
    tested = {type(message) for message in (*TO_CORE, *FROM_CORE, *WORKER)}
    nested = {
        SetPace,
        Pace,
        ResetPrefixCache,
        Observe,
        ShowBlock,
        Observation,
        BlockContents,
        CacheLayout,
        Chunk,
        Counters,
        EndView,
        SequenceView,
        StepView,
        TokenLogprobs,
        PositionLogprobs,
        PromptLogprobs,
        Started,
        Finished,
        Why,
        NewRow,
        BlockAppend,
        KnownTokens,
    }
    defined = {
        value
        for module in (messages, plan, watch)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, msgspec.Struct)
    }
    assert defined - {msgspec.Struct, SamplingParams} == tested | nested


def test_a_decode_step_s_output_is_small() -> None:
    step = Outputs(numbers=list(range(256)), token_ids=[50_000] * 256)
    assert len(msgspec.msgpack.encode(step)) < 8 * 256


@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_positions_are_packed_and_unpacked(num_top: int) -> None:
    positions = [
        TokenLogprobs(
            7 + i, -0.5 * i, 1 + i, list(range(num_top)), [-1.25 * j for j in range(num_top)]
        )
        for i in range(4)
    ]
    packed = msgspec.msgpack.decode(
        msgspec.msgpack.encode(PositionLogprobs.of(positions)), type=PositionLogprobs
    )
    assert [*packed] == positions and len(packed) == 4
    assert packed.num_logprobs == 4 * (1 + num_top)
    for count in range(6):
        assert [*packed.after(count)] == positions[count:]
        assert bool(packed.after(count)) == (count < 4)
