"""Attached clients: who they are, which requests of theirs wait, and what waits to be sent to them.

`CoreServer` owns the one table, the one `Intake` and the one `Delivery`. Invariant: what waits for
a client that does not read is bounded, outputs by pausing its requests, answers by detaching it.
"""

import time
from collections import deque
from collections.abc import Iterator

import msgspec

from nanovllm.core.sequence import Sequence, StepOutputs
from nanovllm.core.socket import Endpoint, Sent
from nanovllm.protocol.messages import (
    AddRequest,
    Finished,
    FromCore,
    Outputs,
    PromptLogprobs,
    RequestFailed,
    Started,
    Why,
)
from nanovllm.protocol.plan import PositionLogprobs, TokenLogprobs

MAX_ANSWERS = 1000  # waiting for one client that sends and does not read
MAX_REQUESTS = 256  # received and not begun; beyond, messages stay in the socket


class Client:
    """A connected frontend. Outputs are lists that can be concatenated, so those it does not read
    are merged into one message; other answers queue up behind it."""

    __slots__ = (
        "answers",
        "client_id",
        "identity",
        "key",
        "last_heard",
        "num_logprobs",
        "num_unsent",
        "outputs",
        "unsent",
    )

    def __init__(self, client_id: int, identity: bytes, now: float, key: str | None) -> None:
        self.client_id = client_id
        self.identity = identity
        self.key = key  # with which its connection was opened, if one is asked for
        self.last_heard = now
        self.outputs = Outputs()
        self.num_logprobs = 0  # in `outputs`
        self.unsent: bytes | None = None  # outputs before `outputs`, encoded
        self.num_unsent = 0  # in it, as `backlog` counts
        self.answers: deque[FromCore] = deque()

    @property
    def has_outputs(self) -> bool:
        """Whether `outputs` holds anything."""
        mine = self.outputs
        return bool(mine.numbers or mine.finished or mine.started or mine.prompt_logprobs)

    @property
    def has_mail(self) -> bool:
        """Whether anything waits to be sent."""
        return self.unsent is not None or bool(self.answers) or self.has_outputs

    @property
    def num_merged(self) -> int:
        """Tokens and alternatives in `outputs`."""
        return len(self.outputs.token_ids) + self.num_logprobs

    @property
    def backlog(self) -> int:
        """What it has not read, in tokens and alternatives, beyond what its socket holds."""
        return self.num_unsent + self.num_merged

    @property
    def asks_too_much(self) -> bool:
        """Whether it goes on sending without ever reading an answer."""
        return len(self.answers) > MAX_ANSWERS

    def add_logprobs(self, logprobs: TokenLogprobs) -> None:
        """Of the next token to be added."""
        self.outputs.logprobs[len(self.outputs.numbers)] = logprobs
        self.num_logprobs += 1 + len(logprobs.top_ids)

    def add_prompt_logprobs(self, sequence: Sequence, logprobs: PositionLogprobs) -> None:
        self.outputs.prompt_logprobs.append(PromptLogprobs(sequence.number, logprobs))
        self.num_logprobs += logprobs.num_logprobs

    def take_outputs(self) -> Outputs:
        """All outputs, which are the caller's from here on."""
        outputs, self.outputs = self.outputs, Outputs()
        self.num_logprobs = 0
        return outputs


class ClientTable:
    """Clients by identity (the socket's name for them) and by id; at most `max_clients`."""

    def __init__(self, *, max_clients: int, lease_s: float) -> None:
        self._max_clients = max_clients
        self._lease_s = lease_s
        self._by_identity: dict[bytes, Client] = {}
        self._by_id: dict[int, Client] = {}
        self._num_ever = 0
        self.num_expired = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Client]:
        """Of a copy: clients may be removed meanwhile."""
        return iter(list(self._by_id.values()))

    @property
    def is_full(self) -> bool:
        return len(self._by_id) >= self._max_clients

    def find(self, identity: bytes) -> Client | None:
        return self._by_identity.get(identity)

    def with_id(self, client_id: int) -> Client | None:
        return self._by_id.get(client_id)

    def attach(self, identity: bytes, now: float, key: str | None = None) -> Client:
        """A new client; ids are never used twice."""
        client = Client(self._num_ever, identity, now, key)
        self._num_ever += 1
        self._by_identity[identity] = self._by_id[client.client_id] = client
        return client

    def collect(self, outputs: StepOutputs) -> None:
        """Sort what a step brought into the clients' pending messages, but for ends.

        A client may have gone between the step and its result.
        """
        clients, token_ids, logprobs = self._by_id.get, outputs.token_ids, outputs.logprobs
        for sequence in outputs.started:
            if client := clients(sequence.client_id):
                client.outputs.started.append(started_message(sequence))
        for sequence, some in outputs.prompt_logprobs:
            if client := clients(sequence.client_id):
                client.add_prompt_logprobs(sequence, some)
        for index, sequence in enumerate(outputs.sequences):
            if client := clients(sequence.client_id):
                if logprobs and index in logprobs:
                    client.add_logprobs(logprobs[index])
                pending = client.outputs
                pending.numbers.append(sequence.number)
                pending.token_ids.append(token_ids[index])

    def remove(self, client: Client) -> None:
        """Forget it; once or more often."""
        if self._by_id.pop(client.client_id, None) is not None:
            del self._by_identity[client.identity]

    def pop_expired(self, now: float) -> list[Client]:
        """Forget the clients whose lease has run out; returns them."""
        expired = [one for one in self if now - one.last_heard > self._lease_s]
        for client in expired:
            self.remove(client)
        self.num_expired += len(expired)
        return expired

    def extend_leases(self, seconds: float) -> None:
        """For so long this process did not listen: that is not counted as the clients' silence."""
        for client in self:
            client.last_heard += seconds


class Intake:
    """Requests that have been received and are not yet in the core, in order of arrival.

    What a turn has received is sorted before any of it is begun, so an abort overtakes the request
    that it is about, and who has left has nothing begun.
    """

    def __init__(self, clients: ClientTable) -> None:
        self._clients = clients
        self._requests: deque[tuple[Client, AddRequest]] = deque()

    def __bool__(self) -> bool:
        return bool(self._requests)

    @property
    def is_full(self) -> bool:
        return len(self._requests) >= MAX_REQUESTS

    def add(self, client: Client, request: AddRequest) -> None:
        self._requests.append((client, request))

    def next(self) -> tuple[Client, AddRequest] | None:
        """The next to begin, whose sender is still there; it is the caller's from here on."""
        while self._requests:
            client, request = self._requests.popleft()
            if self._clients.find(client.identity) is client:
                return client, request
        return None

    def take(self, client: Client, numbers: set[int]) -> list[AddRequest]:
        """Those requests of a client that own any of these numbers; they are the caller's."""
        if not self._requests:
            return []
        taken: list[AddRequest] = []
        kept: deque[tuple[Client, AddRequest]] = deque()
        for entry in self._requests:
            sender, request = entry
            owned = range(request.number, request.number + request.params.n)
            if sender is client and not numbers.isdisjoint(owned):
                taken.append(request)
            else:
                kept.append(entry)
        self._requests = kept
        return taken


class Delivery:
    """Gets messages to clients over the endpoint, each encoded once. Nothing blocks: what a
    client's queue does not take stays with the `Client`, the oldest part as a finished frame, the
    rest as outputs still being merged.

    `failures` are (client id, number, cause) of outputs that could not be encoded.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._encoder = msgspec.msgpack.Encoder()
        self.failures: list[tuple[int, int, str]] = []

    def post(self, identity: bytes, message: FromCore) -> Sent:
        """Send, or forget about it: for what a client can do without, and for strangers."""
        return self._endpoint.send(identity, self._encoder.encode(message))

    def deliver(self, client: Client) -> Sent:
        """Send all that waits for a client: outputs first, then answers, each in order."""
        if client.unsent is None and client.has_outputs:
            client.num_unsent = client.num_merged
            client.unsent = self._encode(client, client.take_outputs())
        if client.unsent is not None:
            sent = self._endpoint.send(client.identity, client.unsent)
            if sent != "sent":
                return sent
            client.unsent, client.num_unsent = None, 0
            if client.has_outputs:
                return self.deliver(client)
        while client.answers:
            sent = self.post(client.identity, client.answers[0])
            if sent != "sent":
                return sent
            client.answers.popleft()
        return "sent"

    def _encode(self, client: Client, outputs: Outputs) -> bytes:
        """All of `outputs`, or, if something in them cannot be encoded, all but those requests."""
        try:
            return self._encoder.encode(outputs)
        except Exception:
            return self._encode_good_ones(client, outputs)

    def _encode_good_ones(self, client: Client, outputs: Outputs) -> bytes:
        numbers = {one.number for one in outputs.started + outputs.prompt_logprobs}
        numbers |= {*outputs.numbers, *(one.number for one in outputs.finished)}
        for number in sorted(numbers):
            try:
                self._encoder.encode(select(outputs, {number}))
            except Exception as error:
                numbers.remove(number)
                cause = f"its output cannot be encoded: {type(error).__name__}: {error}"
                client.answers.append(RequestFailed(number, cause))
                self.failures.append((client.client_id, number, cause))
        return self._encoder.encode(select(outputs, numbers))


def select(outputs: Outputs, numbers: set[int]) -> Outputs:
    """The part of a message that is about `numbers`."""
    chosen = Outputs(
        started=[one for one in outputs.started if one.number in numbers],
        prompt_logprobs=[one for one in outputs.prompt_logprobs if one.number in numbers],
        finished=[one for one in outputs.finished if one.number in numbers],
    )
    for index, number in enumerate(outputs.numbers):
        if number in numbers:
            if index in outputs.logprobs:
                chosen.logprobs[len(chosen.numbers)] = outputs.logprobs[index]
            chosen.numbers.append(number)
            chosen.token_ids.append(outputs.token_ids[index])
    return chosen


def started_message(sequence: Sequence) -> Started:
    """A sequence has run for the first time."""
    queued_ms = (sequence.started_at - sequence.queued_at) * 1e3
    return Started(sequence.number, sequence.num_cached_tokens, queued_ms)


def finished_message(sequence: Sequence) -> Finished:
    """A sequence has just ended, and not by failing."""
    assert sequence.finish_reason is not None
    return Finished(
        sequence.number,
        sequence.finish_reason,
        sequence.stop_reason,
        sequence.num_preemptions,
        sequence.last_is_text,
        why_of(sequence, time.monotonic()),
    )


def why_of(sequence: Sequence, now: float) -> Why:
    """Of a sequence that ends. `now` stands for the time of the last token."""
    first_at = sequence.first_token_at
    num_later = len(sequence.token_ids) - sequence.num_first_known - 1
    seats, budget, kv = sequence.waited_s
    return Why(
        queued_ms=((sequence.started_at or now) - sequence.queued_at) * 1e3,
        seats_ms=seats * 1e3,
        budget_ms=budget * 1e3,
        kv_ms=kv * 1e3,
        num_cached_tokens=sequence.num_cached_tokens,
        num_preemptions=sequence.num_preemptions,
        num_recomputed_tokens=sequence.num_recomputed_tokens,
        ttft_ms=(first_at - sequence.queued_at) * 1e3 if first_at else None,
        inter_token_ms=(now - first_at) * 1e3 / num_later if first_at and num_later else None,
        num_forced_tokens=sequence.num_forced_tokens,
    )
