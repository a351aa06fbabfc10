"""Several cores that run one model, as one: each request goes to one of them.

`AsyncLLM` holds one in the place of a `Session` where there are several cores. Who has seen the
beginning of a prompt has its KV, so it gets what begins alike, unless it has too much to do. What a
core had under way when it died goes on at another, from its last token; suspects of its death wait
for it to come back.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import msgspec

from nanovllm.config import SupervisionConfig
from nanovllm.frontend.core_life import CONNECT_TIMEOUT_S, ProgressCallback
from nanovllm.frontend.core_process import CoreHandle
from nanovllm.frontend.errors import EngineDeadError
from nanovllm.frontend.request import Request
from nanovllm.frontend.session import Session
from nanovllm.frontend.supervisor import Supervisor
from nanovllm.keys import ClientKeys
from nanovllm.protocol.messages import (
    Answer,
    CoreStatus,
    Operation,
    ResetPrefixCache,
    SetPace,
    Welcome,
)

CHUNK = 64  # tokens of a prompt that are looked up as one
MOST_CHUNKS = 256  # of a prompt: what lies behind is not looked at
MOST_KNOWN = 2**16  # beginnings that are remembered, the latest used ones
# A core is given what it has begun before, until it has so many more requests than another, and one
# more for each chunk that the other would have to compute again, up to a number of chunks.
MOST_MORE, MOST_MORE_SHARE, MOST_MORE_CHUNKS = 8, 0.25, 24
NEARLY_FULL = 0.05  # share of blocks that are free
SEPARATOR = ","  # of addresses
LONGEST = frozenset({"last_step_ms", "uptime_s"})  # fields of a status that are no sums


class Prefixes:
    """Which core began last with which tokens. What cores really hold is not asked."""

    def __init__(self) -> None:
        self._homes: OrderedDict[int, int] = OrderedDict()

    def find(self, token_ids: Sequence[int], salt: str | None) -> tuple[int, int]:
        """The core that has most of the beginning of a prompt, and how many chunks: -1, 0 if nobody
        has any."""
        found = -1, 0
        for count, key in enumerate(_keys(token_ids, salt), 1):
            home = self._homes.get(key)
            if home is None:
                break
            found = home, count
        return found

    def note(self, token_ids: Sequence[int], salt: str | None, home: int) -> None:
        """That core has it from now on."""
        for key in _keys(token_ids, salt):
            self._homes[key] = home
            self._homes.move_to_end(key)
        while len(self._homes) > MOST_KNOWN:
            self._homes.popitem(last=False)


def _keys(token_ids: Sequence[int], salt: str | None) -> Iterable[int]:
    """One for each beginning of whole chunks."""
    key = hash(salt)
    for end in range(CHUNK, min(len(token_ids), CHUNK * MOST_CHUNKS) + 1, CHUNK):
        key = hash((key, *token_ids[end - CHUNK : end]))
        yield key


class Lines:
    """The lines to all cores, as the line to one: what is true of all, or of any that is up."""

    def __init__(self, lines: list[Supervisor]) -> None:
        self.lines = lines
        self._merged: tuple[list[CoreStatus], CoreStatus] | None = None

    @property
    def address(self) -> str:
        """All addresses, as `AsyncLLM.connect` takes them."""
        return SEPARATOR.join(line.address for line in self.lines)

    @property
    def welcome(self) -> Welcome | None:
        """Of the first core that is not dead for good; None until all have answered."""
        if any(line.welcome is None for line in self.lines):
            return None
        return self._first.welcome

    @property
    def is_dead(self) -> bool:
        return all(line.is_dead for line in self.lines)

    @property
    def is_stalled(self) -> bool:
        return all(line.is_dead or line.is_stalled for line in self.lines)

    @property
    def _first(self) -> Supervisor:
        living = [line for line in self.lines if not line.is_dead]
        up = [line for line in living if line.link is not None]
        return [*up, *living, *self.lines][0]

    async def connect(
        self,
        *,
        timeout_s: float = CONNECT_TIMEOUT_S,
        on_progress: ProgressCallback | None = None,
    ) -> Welcome:
        """Greet all of them. on_progress: told of the first. Raises what `Supervisor.connect`
        raises, and `ValueError` if they run different models."""
        tellers = [on_progress, *[None] * (len(self.lines) - 1)]
        welcomes = await asyncio.gather(
            *(
                line.connect(timeout_s=timeout_s, on_progress=teller)
                for line, teller in zip(self.lines, tellers, strict=True)
            )
        )
        models = {(one.model, one.worker.vocab_size, one.worker.max_model_len) for one in welcomes}
        if len(models) > 1:
            raise ValueError(f"the cores at {self.address} run different models: {sorted(models)}")
        return welcomes[0]

    async def status(self) -> CoreStatus:
        """Sums over all cores that are up; waits for one if none is."""
        await self._first.status()
        parts = [status for line in self.lines if (status := line.latest_status) is not None]
        if self._merged is None or self._merged[0] != parts:
            self._merged = parts, merged(parts)
        return self._merged[1]

    async def call(self, operation: Operation) -> Answer | None:
        """Of the first core that is up; what changes cores is said to each."""
        if isinstance(operation, ResetPrefixCache | SetPace):
            up = [line for line in self.lines if line.link is not None]
            answers = await asyncio.gather(*(line.call(operation) for line in up))
            return all(answers)
        return await self._first.call(operation)

    async def close(self) -> None:
        await asyncio.gather(*(line.close() for line in self.lines))

    async def until_dead(self) -> EngineDeadError:
        """Until the last of them is dead for good; returns why that is."""
        errors = await asyncio.gather(*(line.until_dead() for line in self.lines))
        return errors[-1]


class Replicas:
    """Implements what `AsyncLLM` asks of a `Session`. handles: of owned cores, in the order of
    addresses; or none."""

    def __init__(
        self,
        config: SupervisionConfig,
        addresses: list[str],
        *,
        handles: Sequence[CoreHandle] = (),
        keys: ClientKeys | None = None,
    ) -> None:
        self.sessions = [
            Session(
                config,
                address,
                handle=handles[index] if handles else None,
                keys=keys,
                hand_over=self._hand_over,
            )
            for index, address in enumerate(addresses)
        ]
        self.line = Lines([session.line for session in self.sessions])
        self._prefixes = Prefixes()
        self._homes: dict[str, Session] = {}
        self._num_given = [0] * len(addresses)  # requests of each, ever

    def submit(self, request: Request) -> None:
        """Send it to the core that suits it best. `ValueError` if its id is in use."""
        session = self._homes.get(request.request_id)
        if session is None:
            session = self.sessions[self._choose(request)]
        session.submit(request)
        self._homes[request.request_id] = session

    def discard(self, request: Request) -> None:
        """Nobody waits for it any more."""
        session = self._homes.pop(request.request_id, None)
        if session is not None:
            session.discard(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End them early, wherever they are."""
        for request_id in request_ids:
            session = self._homes.get(request_id)
            if session is not None:
                session.abort([request_id])

    def request_id_of(self, number: int) -> str | None:
        """Whose output that is, at any of the cores."""
        found = (session.request_id_of(number) for session in self.sessions)
        return next((request_id for request_id in found if request_id is not None), None)

    def _choose(self, request: Request) -> int:
        """The core for a new request, by its place."""
        message = request.message
        able = [index for index, one in enumerate(self.sessions) if one.line.link is not None]
        if not able:  # it waits at one that will be back, or is told that none will
            return next((i for i, one in enumerate(self.sessions) if not one.line.is_dead), 0)
        loads = {index: (*load_of(self.sessions[index]), self._num_given[index]) for index in able}
        chosen = min(able, key=loads.__getitem__)
        known, chunks = self._prefixes.find(message.prompt_token_ids, message.cache_salt)
        if known in loads:
            least = loads[chosen][0]
            most_more = MOST_MORE + MOST_MORE_SHARE * least + min(chunks, MOST_MORE_CHUNKS)
            if loads[known][0] <= least + most_more:
                chosen = known
        self._prefixes.note(message.prompt_token_ids, message.cache_salt, chosen)
        self._num_given[chosen] += 1
        return chosen

    def _hand_over(self, request: Request) -> bool:
        """Let another core go on with it; False: none is up."""
        able = [one for one in self.sessions if one.line.link is not None]
        if not able:
            return False
        heir = min(able, key=load_of)
        self._homes[request.request_id] = heir
        heir.adopt(request)
        return True


def load_of(session: Session) -> tuple[int, int, bool]:
    """How much a core has to do: its requests, as far as is known; prompt tokens that wait; and
    whether its KV is nearly full."""
    status, mine = session.line.latest_status, session.num_requests
    if status is None:
        return mine, 0, False
    others = status.num_clients > 1
    num_requests = max(mine, status.num_running + status.num_waiting) if others else mine
    is_full = status.num_free_blocks < NEARLY_FULL * status.num_blocks
    return num_requests, status.num_queued_tokens, is_full


def merged(parts: list[CoreStatus]) -> CoreStatus:
    """Of several cores: counts are summed, and a stall is one of all."""
    values = [msgspec.structs.asdict(part) for part in parts]
    sums = {
        name: (max if name in LONGEST else sum)(one[name] for one in values)
        for name, first in values[0].items()
        if isinstance(first, int | float) and not isinstance(first, bool)
    }
    return CoreStatus(
        **{
            **values[0],
            **sums,
            "epoch": SEPARATOR.join(part.epoch for part in parts),
            "stalled_s": min(part.stalled_s for part in parts),
            "draining": all(part.draining for part in parts),
            "num_clients": max(part.num_clients for part in parts),
            "explained_epochs": [epoch for part in parts for epoch in part.explained_epochs],
        }
    )
