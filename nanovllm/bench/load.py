"""The load of `nanovllm bench clients`: who asks for how many tokens, and when.

Decided in full before it starts, so that a run can be repeated; `clients` hands each client its
share. Light to import: the command line derives its flags from `ClientsLoad`.
"""

import json
import random
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

AtLeast1 = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]


class ClientsLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What the clients do together. Lengths are in tokens, times in seconds."""

    clients: Annotated[AtLeast1, Meta(description="client processes")] = 8
    rate: Annotated[
        Positive, Meta(description="requests per second of all clients together, as they come")
    ] = 4.0
    duration: Annotated[Positive, Meta(description="for how many seconds requests come")] = 10.0
    streams: Annotated[
        AtLeast1 | None,
        Meta(description="instead of rate: as many streams per client, always, until duration"),
    ] = None
    trace: Annotated[
        str | None,
        Meta(description="instead of rate: a file of JSON lines {at, input_len, output_len}"),
    ] = None
    input_len: Annotated[AtLeast1, Meta(description="mean tokens per prompt")] = 128
    output_len: Annotated[AtLeast1, Meta(description="mean tokens per answer")] = 64
    length_spread: Annotated[
        Share, Meta(description="lengths are uniform in mean × [1 - this, 1 + this]")
    ] = 0.5
    shared_prefix: Annotated[
        Share, Meta(description="share of the requests that begin with the same tokens")
    ] = 0.25
    shared_prefix_len: Annotated[AtLeast1, Meta(description="how many tokens those share")] = 64
    load_seed: Annotated[int, Meta(description="another seed is another load")] = 0
    connect: Annotated[
        str | None, Meta(description="address of a running core; default: start one")
    ] = None
    output: Annotated[str | None, Meta(description="write all figures to this JSON file")] = None
    plot: Annotated[str | None, Meta(description="draw them into this PNG file")] = None


class Arrival(msgspec.Struct, frozen=True, array_like=True):
    """One request: `at` seconds after the start. num_shared: prompt tokens that others share."""

    at: float
    input_len: int
    output_len: int
    num_shared: int
    seed: int


class TraceLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a trace file. client: by default whose turn it is."""

    at: Annotated[float, Meta(ge=0)]
    input_len: AtLeast1
    output_len: AtLeast1
    num_shared: Annotated[int, Meta(ge=0)] = 0
    client: Annotated[int, Meta(ge=0)] | None = None


class ClientTask(msgspec.Struct, frozen=True):
    """What one client process is told."""

    address: str
    client: int
    arrivals: list[Arrival]
    load: ClientsLoad


def plan(load: ClientsLoad) -> list[list[Arrival]]:
    """Each client's arrivals, in order. Empty ones for a closed loop, which draws as it goes.

    Raises `ValueError` naming the field if a trace cannot be read.
    """
    shares: list[list[Arrival]] = [[] for _ in range(load.clients)]
    rng = random.Random(load.load_seed)
    if load.streams is not None:
        return shares
    if load.trace is not None:
        for index, line in enumerate(read_trace(load.trace)):
            client = index if line.client is None else line.client
            arrival = Arrival(
                line.at, line.input_len, line.output_len, line.num_shared, rng.getrandbits(63)
            )
            shares[client % load.clients].append(arrival)
        return shares
    at = rng.expovariate(load.rate)
    while at < load.duration:
        rng.choice(shares).append(draw(load, rng, at=at))
        at += rng.expovariate(load.rate)
    return shares


def draw(load: ClientsLoad, rng: random.Random, *, at: float) -> Arrival:
    """One request of random lengths."""

    def length(mean: int) -> int:
        return max(1, round(mean * rng.uniform(1 - load.length_spread, 1 + load.length_spread)))

    input_len, output_len = length(load.input_len), length(load.output_len)
    shared = rng.random() < load.shared_prefix
    num_shared = min(load.shared_prefix_len, input_len) if shared else 0
    return Arrival(at, input_len, output_len, num_shared, rng.getrandbits(63))


def read_trace(path: str) -> list[TraceLine]:
    """Raises `ValueError` naming the line that is none."""
    lines: list[TraceLine] = []
    try:
        content = Path(path).read_text("utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"trace: {path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(content, start=1):
        if line.strip():
            try:
                lines.append(msgspec.convert(json.loads(line), TraceLine))
            except (json.JSONDecodeError, msgspec.ValidationError) as error:
                raise ValueError(f"trace: line {number} of {path}: {error}") from None
    if not lines:
        raise ValueError(f"trace: {path} is empty")
    return sorted(lines, key=lambda line: line.at)


def prompt_of(arrival: Arrival, vocab_size: int, first_id: int = 3) -> list[int]:
    """The shared tokens are the same for everybody, the others nobody else's."""
    shared = random.Random(-1).choices(range(first_id, vocab_size), k=arrival.num_shared)
    rng = random.Random(arrival.seed)
    own = rng.choices(range(first_id, vocab_size), k=arrival.input_len - arrival.num_shared)
    return shared + own
