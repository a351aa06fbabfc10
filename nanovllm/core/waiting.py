"""The queue of sequences that wait to run, and what they wait for. Owned by `Scheduler`.

With several tenants the one served least comes first (VTC: Sheng et al., "Fairness in Serving Large
Language Models", OSDI 2024), each in its own order of arrival; with one, or without sharing, it is
order alone. A sequence is in the queue at most once; removal is lazy and costs O(1).
"""

import heapq
import time
from collections.abc import Iterator
from itertools import islice

from nanovllm.core.sequence import Sequence, Tenant
from nanovllm.protocol.watch import WaitCause

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0  # the paper's: an output token costs about twice as much
MAX_TENANTS = 4096  # remembered; beyond, those that wait for nothing are forgotten
SEATS, BUDGET, KV = range(3)
CAUSES: tuple[WaitCause, ...] = ("seats", "budget", "kv")


class WaitClock:
    """For how long admission has been held up by each cause: `SEATS`, `BUDGET`, `KV`.

    One clock for all: a sequence's own waits are the difference of two readings.
    """

    def __init__(self) -> None:
        self._seconds = [0.0, 0.0, 0.0]
        self.held_by: int | None = None
        self._since = 0.0

    def hold(self, cause: int | None, now: float) -> None:
        """From now on `cause` holds up whoever waits; None: nothing does."""
        if self.held_by is not None:
            self._seconds[self.held_by] += now - self._since
        self.held_by = cause
        self._since = now

    @property
    def cause(self) -> WaitCause:
        """What holds up whoever waits, in a word."""
        return "" if self.held_by is None else CAUSES[self.held_by]

    def read(self, now: float) -> tuple[float, float, float]:
        """Seconds held up so far, by cause."""
        self.hold(self.held_by, now)
        seats, budget, kv = self._seconds
        return seats, budget, kv

    def waited(self, sequence: Sequence) -> tuple[float, float, float]:
        """What has held up a sequence that waits, now and before, by cause."""
        now = self.read(time.monotonic())
        seats, budget, kv = (
            before + read - mark
            for before, read, mark in zip(sequence.waited_s, now, sequence.wait_mark, strict=True)
        )
        return seats, budget, kv


class WaitingQueue:
    """Sequences by tenant, if `by_tenant`, and within a tenant by `Sequence.order`."""

    def __init__(self, *, by_tenant: bool) -> None:
        self._by_tenant = by_tenant
        self.tenants: dict[str, Tenant] = {}
        self.contenders: dict[Tenant, None] = {}  # those with somebody waiting
        self._live: dict[tuple[int, int], Sequence] = {}  # heaps may hold dead entries besides
        self.parked: dict[int, dict[Sequence, None]] = {}  # by client, in no order
        self._clock = WaitClock()
        self.floor = 0.0  # what the tenant chosen last had been served
        self.tenant("")

    def __len__(self) -> int:
        return len(self._live)

    def __bool__(self) -> bool:
        return bool(self._live)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(list(self._live.values()))

    @property
    def num_parked(self) -> int:
        return sum(map(len, self.parked.values()))

    @property
    def cause(self) -> WaitCause:
        """What keeps the head from running."""
        return self._clock.cause

    def some(self, most: int) -> list[Sequence]:
        """At most so many of those who wait, in the order in which they came to wait."""
        return list(islice(self._live.values(), most))

    def latest(self, most: int) -> list[Sequence]:
        """At most so many of those who wait, the latest first."""
        return list(islice(reversed(self._live.values()), most))

    def some_parked(self, most: int) -> list[Sequence]:
        """At most so many of those whose client does not read."""
        return list(islice((one for parked in self.parked.values() for one in parked), most))

    def tenant(self, name: str) -> Tenant:
        """Whom a sequence is to be charged to; all are one without sharing."""
        name = name if self._by_tenant else ""
        tenant = self.tenants.get(name)
        if tenant is None:
            if len(self.tenants) >= MAX_TENANTS:
                self.tenants = {t.name: t for t in [self.tenants[""], *self.contenders]}
            tenant = self.tenants[name] = Tenant(name)
        return tenant

    def charge_for_prompt(self, sequence: Sequence) -> None:
        """It starts now; what it finds computed costs its tenant nothing."""
        num_uncached = sequence.num_prompt_tokens - sequence.num_computed
        sequence.tenant.served += PROMPT_WEIGHT * num_uncached

    def charge_for_outputs(self, sequences: list[Sequence]) -> None:
        """Each has got a token. With one tenant (besides the nameless) nobody counts."""
        if len(self.tenants) > 2:
            for sequence in sequences:
                sequence.tenant.served += OUTPUT_WEIGHT

    def push(self, sequence: Sequence) -> None:
        """Queue; a tenant that comes back starts level with those who have waited meanwhile."""
        parked = self.parked.get(sequence.client_id)
        if parked is not None:
            parked[sequence] = None
            return
        sequence.wait_mark = self._clock.read(time.monotonic())
        tenant = sequence.tenant
        if tenant.num_waiting == 0:
            floor = min(map(_served, self.contenders), default=self.floor)
            tenant.served = max(tenant.served, floor)
            self.contenders[tenant] = None
        tenant.num_waiting += 1
        self._live[sequence.order] = sequence
        heapq.heappush(tenant.waiting, (sequence.order, sequence))

    def head(self) -> Sequence | None:
        """Who is to run next."""
        if not self._live:
            return None
        contenders = self.contenders
        tenant = min(contenders, key=_served) if len(contenders) > 1 else next(iter(contenders))
        waiting = tenant.waiting
        while waiting[0][0] not in self._live:
            heapq.heappop(waiting)
        return waiting[0][1]

    def remove(self, sequence: Sequence) -> None:
        """Take out whoever is in the queue; its heap entry stays behind, dead."""
        del self._live[sequence.order]
        sequence.waited_s = self._clock.waited(sequence)
        tenant = sequence.tenant
        self.floor = tenant.served
        tenant.num_waiting -= 1
        if tenant.num_waiting == 0:
            del self.contenders[tenant]
            tenant.waiting.clear()
        elif len(tenant.waiting) > 2 * tenant.num_waiting + 64:
            tenant.waiting = [entry for entry in tenant.waiting if entry[0] in self._live]
            heapq.heapify(tenant.waiting)

    def discard(self, sequence: Sequence) -> None:
        """`remove`, or unpark for good, or do nothing."""
        if sequence.order in self._live:
            self.remove(sequence)
        else:
            self.parked.get(sequence.client_id, {}).pop(sequence, None)

    def hold_up(self, cause: int | None) -> None:
        """What keeps the head from running, from now on."""
        if cause != self._clock.held_by:
            self._clock.hold(cause, time.monotonic())

    # ---- clients that do not read

    def park(self, client_id: int) -> None:
        """Set this client's sequences aside, also those still to be pushed, until `unpark`."""
        parked = [one for one in self._live.values() if one.client_id == client_id]
        for sequence in parked:
            self.remove(sequence)
        self.parked[client_id] = dict.fromkeys(parked)

    def unpark(self, client_id: int) -> None:
        """Queue them again, where they were: order is by arrival."""
        for sequence in self.parked.pop(client_id):
            self.push(sequence)


def _served(tenant: Tenant) -> float:
    return tenant.served
