"""Requests that have been received and are not yet in the core: they come after everything else.

`CoreServer` owns the one `Intake`. What a turn has received is sorted before any of it is begun, so
an abort overtakes the request that it is about, and who has left has nothing begun.
"""

from collections import deque

from nanovllm.core.clients import Client, ClientTable
from nanovllm.protocol.messages import AddRequest

MAX_REQUESTS = 256  # then what else has been sent stays in the socket


class Intake:
    """In order of arrival, over all clients."""

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
