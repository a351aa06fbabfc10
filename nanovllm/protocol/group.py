"""Messages between the core of a group and its ranks: one model on several devices.

`executor.group` sends each to every rank, encoded once; `executor.rank` answers. The first rank
answers for all; the others only say when they are ready, and what went wrong.
"""

import msgspec

from nanovllm.protocol.plan import StepMasks, StepPlan, StepResult, WorkerInfo


class Connect(msgspec.Struct, frozen=True, tag=True):
    """Where the first rank's `Listening` store is: meet the others there."""

    port: int
    host: str = "127.0.0.1"


class Allocate(msgspec.Struct, frozen=True, tag=True):
    """Make a KV cache of so many blocks: what every rank has room for."""

    num_blocks: int


class Submit(msgspec.Struct, frozen=True, tag=True):
    """The first half of a step."""

    plan: StepPlan


class Sample(msgspec.Struct, frozen=True, tag=True):
    """The second half of the step submitted last."""

    step: int
    masks: StepMasks | None


class WarmUp(msgspec.Struct, frozen=True, tag=True):
    """Run one step of a kind that has not occurred yet."""


class Leave(msgspec.Struct, frozen=True, tag=True):
    """Free the device, and end."""


ToRank = Connect | Allocate | Submit | Sample | WarmUp | Leave


class Listening(msgspec.Struct, frozen=True, tag=True):
    """By the first rank: the others can `Connect` to this port of its host."""

    port: int


class Progress(msgspec.Struct, frozen=True, tag=True):
    """How far a phase of the start is, in [0, 1]."""

    phase: str
    share: float


class Started(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded; `info.num_blocks` fit on this rank's device."""

    info: WorkerInfo


class Allocated(msgspec.Struct, frozen=True, tag=True):
    """Plans may come."""


class Sampled(msgspec.Struct, frozen=True, tag=True):
    """A step has run."""

    result: StepResult


class Digest(msgspec.Struct, frozen=True, tag=True):
    """Of the ids that a step began with on a rank, and of those that it has sampled, if it is of
    the last stage; sent if ranks are to be compared."""

    step: int
    begun: int
    sampled: int | None


class WarmedUp(msgspec.Struct, frozen=True, tag=True):
    """Whether there is more to warm up."""

    has_more: bool


class RankFailed(msgspec.Struct, frozen=True, tag=True):
    """The rank ends of this. usage: the configuration is at fault."""

    message: str
    details: str
    usage: bool = False


FromRank = Listening | Progress | Started | Allocated | Sampled | Digest | WarmedUp | RankFailed
