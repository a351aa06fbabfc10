"""The connection to a core across restarts: one `CoreLife` for each process or connection.

Owned by `Session`, which is told of the core's return and of its final death. An owned core is
started again, within a budget of restarts; another's is waited for at its address. While the core
is away nothing is sent: whoever listens sends what is still wanted when it is back.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import Protocol, TypeVar

from nanovllm.config import SupervisionConfig
from nanovllm.frontend import core_life
from nanovllm.frontend.core_life import (
    CALL_TIMEOUT_S,
    CONNECT_TIMEOUT_S,
    CoreLife,
    ProgressCallback,
)
from nanovllm.frontend.core_process import CoreHandle
from nanovllm.frontend.errors import DetachedError, EngineDeadError
from nanovllm.frontend.link import Link
from nanovllm.keys import ClientKeys
from nanovllm.protocol.messages import (
    Answer,
    CoreStatus,
    Operation,
    Welcome,
)

WINDOW_S = 60.0  # `max_core_restarts` counts within it
FIRST_DELAY_S = 0.05  # before the second restart of a window; doubles with each one more
RETRY_MAX_S = 1.0  # between attempts to reach a core that somebody else starts

T = TypeVar("T")
DIED_AGAIN = (EngineDeadError, ValueError)  # what a greeting ends with if the core does
logger = logging.getLogger(__name__)


class Requests(core_life.Requests, Protocol):
    """Told, besides, when the core dies and when it is back."""

    def on_core_lost(self, error: EngineDeadError) -> Collection[str]:
        """A life of the core is over, and there will be another. Returns the lives, by epoch, that
        requests of this client have ended."""

    def on_core_back(self) -> None:
        """A new life, which knows nothing of the one before."""

    def on_core_dead(self, error: EngineDeadError) -> None:
        """For good. Once; nothing comes afterwards."""


class RestartBudget:
    """At most `most` restarts within `WINDOW_S`; the first at once, later ones after a delay."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: deque[tuple[float, str]] = deque()  # when, and after which life of the core

    def take(self, now: float, epoch: str = "") -> float | None:
        """Seconds to wait before one more restart; None if there may be no more."""
        while self._taken and now - self._taken[0][0] > WINDOW_S:
            self._taken.popleft()
        num_recent = len(self._taken)
        if num_recent >= self._most:
            return None
        self._taken.append((now, epoch))
        return FIRST_DELAY_S * 2 ** (num_recent - 1) if num_recent else 0.0

    def give_back(self, epochs: Collection[str]) -> None:
        """These lives were ended by requests that will not be sent again."""
        self._taken = deque(one for one in self._taken if one[1] not in epochs)


class Supervisor:
    """`handle` is given if the core is owned; it is then restarted, and ended by the caller."""

    def __init__(
        self,
        requests: Requests,
        config: SupervisionConfig,
        address: str,
        *,
        handle: CoreHandle | None = None,
        keys: ClientKeys | None = None,
    ) -> None:
        self.address = address
        self.handle = handle
        self._keys = keys
        self.welcome: Welcome | None = None  # of the present life, or the last
        self._requests = requests
        self._config = config
        self._budget = RestartBudget(config.max_core_restarts)
        self._life: CoreLife | None = None
        self.epoch = ""  # names the present life, or the last
        self.link: Link | None = None  # to the present life, if it is welcomed and not known dead
        self._error: EngineDeadError | None = None
        self._up_or_dead, self._dead = asyncio.Event(), asyncio.Event()
        self._reviving: asyncio.Task[None] | None = None

    @property
    def is_dead(self) -> bool:
        """For good, or closed."""
        return self._error is not None

    @property
    def is_stalled(self) -> bool:
        """Nothing has been heard of the core for longer than it ever should be silent."""
        assert self._life is not None
        return self.link is None or self._life.is_stalled

    async def connect(
        self,
        *,
        timeout_s: float = CONNECT_TIMEOUT_S,
        on_progress: ProgressCallback | None = None,
    ) -> Welcome:
        """The first greeting; a core that dies before it is ready is not started again.

        Raises what `CoreLife.connect` raises.
        """
        try:
            return await self._greet(timeout_s=timeout_s, on_progress=on_progress)
        except BaseException as error:
            self._die(EngineDeadError(f"the engine did not start: {error}"))
            raise

    async def call(self, operation: Operation) -> Answer | None:
        """As `CoreLife.call`; asks again if the core dies over it."""
        return await self._ask(lambda life: life.call(operation))

    async def status(self) -> CoreStatus:
        """The latest of the core's present life; waits for the next life if it is away."""
        return await self._ask(lambda life: life.status())

    @property
    def latest_status(self) -> CoreStatus | None:
        """What the core has said last; None while it is away."""
        return None if self.link is None or self._life is None else self._life.latest_status

    async def until_dead(self) -> EngineDeadError:
        """Wait for the death that is for good; returns its cause."""
        await self._dead.wait()
        assert self._error is not None
        return self._error.again()

    async def close(self) -> None:
        """Say goodbye. The process of an owned core is left to the caller."""
        self._die(EngineDeadError("the engine has been closed"))
        if self._reviving is not None:
            self._reviving.cancel()
            await asyncio.gather(self._reviving, return_exceptions=True)
        if self._life is not None:
            await self._life.close()

    # ---- from one life to the next

    def _on_death(self, error: EngineDeadError) -> None:
        """`CoreLife`: this life of the core is over."""
        if self.link is None or self._error is not None:
            return  # still greeting, or closed: whoever waits for it is told
        assert self._life is not None
        self.link = None
        self._up_or_dead.clear()
        if self._config.on_core_death == "fail":
            self._die(error)
            return
        explained = set(self._life.explained_epochs)
        if not isinstance(error, DetachedError):
            explained.update(self._requests.on_core_lost(error))
        self._budget.give_back(explained)
        self._reviving = asyncio.create_task(self._revive(error, explained))

    async def _revive(self, error: EngineDeadError, explained: Collection[str]) -> None:
        died_at, before = time.monotonic(), self.welcome
        try:
            lives = self.handle is None or isinstance(error, DetachedError)
            await (self._reattach(error) if lives else self._restart(error, explained))
            _check_same_model(before, self.welcome)
        except EngineDeadError as final:
            self._die(final)
        except Exception as failure:
            self._die(EngineDeadError(f"{error}; starting it again failed: {failure!r}"))
        else:
            logger.warning("the core is back after %.2f s", time.monotonic() - died_at)
            self._requests.on_core_back()

    async def _restart(self, error: EngineDeadError, explained: Collection[str]) -> None:
        """Start the owned core again until it is ready. `EngineDeadError`: too often, not counting
        the deaths that are explained."""
        assert self.handle is not None
        epoch = self.epoch
        while True:
            delay_s = 0.0 if epoch in explained else self._budget.take(time.monotonic(), epoch)
            epoch = ""  # until the next one is welcomed
            if delay_s is None:
                raise self._too_often(error)
            logger.warning("%s; starting it again in %.2f s", error, delay_s)
            await asyncio.to_thread(self.handle.end)
            await asyncio.sleep(delay_s)
            self.handle.restart()
            try:
                return await self._greet_again()
            except DIED_AGAIN as again:
                error = EngineDeadError(str(again), getattr(again, "details", ""))

    async def _reattach(self, error: EngineDeadError) -> None:
        """Reach whoever comes to the address next. `EngineDeadError`: nobody, or we have been let
        go too often. How often a core may die is for whoever starts it to say."""
        if isinstance(error, DetachedError) and self._budget.take(time.monotonic()) is None:
            raise self._too_often(error)
        timeout_s = self._config.core_return_timeout_s
        logger.warning("%s; waiting up to %g s for it to come back", error, timeout_s)
        deadline, delay_s = time.monotonic() + timeout_s, FIRST_DELAY_S
        while (remaining_s := deadline - time.monotonic()) > 0:
            try:
                return await self._greet_again(timeout_s=remaining_s)
            except DIED_AGAIN:  # the old core answered, and was about to end
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, RETRY_MAX_S)
        raise EngineDeadError(
            f"{error}; no core came back to {self.address} within {timeout_s:g} s", error.details
        )

    async def _greet_again(self, *, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        assert self._life is not None
        await self._life.close()
        await self._greet(timeout_s=timeout_s)

    async def _greet(
        self, *, timeout_s: float, on_progress: ProgressCallback | None = None
    ) -> Welcome:
        process = None if self.handle is None else self.handle.process
        self._life = CoreLife(
            self.address,
            self._requests,
            self._on_death,
            process=process,
            on_progress=on_progress,
            keys=self._keys,
        )
        self.welcome = await self._life.connect(timeout_s=timeout_s)
        self.epoch, self.link = self.welcome.epoch, self._life.link
        self._up_or_dead.set()
        return self.welcome

    async def _ask(self, question: Callable[[CoreLife], Awaitable[T]]) -> T:
        while True:
            try:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    await self._up_or_dead.wait()
            except TimeoutError:
                raise TimeoutError(f"the core was away for {CALL_TIMEOUT_S:g} s") from None
            self.check_alive()
            assert self._life is not None
            with suppress(EngineDeadError):  # for good, or until its next life: see above
                return await question(self._life)

    def _too_often(self, error: EngineDeadError) -> EngineDeadError:
        most = self._config.max_core_restarts
        return EngineDeadError(
            f"the core died {most + 1} times within {WINDOW_S:g} s (max_core_restarts is {most}), "
            f"at last of this: {error}",
            error.details,
        )

    def _die(self, error: EngineDeadError) -> None:
        """The first cause stands."""
        if self._error is not None:
            return
        self.link = None
        self._error = error
        self._up_or_dead.set()
        self._dead.set()
        self._requests.on_core_dead(error)

    def check_alive(self) -> None:
        """Raises `EngineDeadError` if the core is dead for good."""
        if self._error is not None:
            raise self._error.again()


def _check_same_model(before: Welcome | None, after: Welcome | None) -> None:
    """Tokens of one model must not be continued by another."""
    assert before is not None and after is not None
    for name in ("architecture", "vocab_size", "num_parameters", "max_model_len"):
        was, now = getattr(before.worker, name), getattr(after.worker, name)
        if was != now or before.model != after.model:
            raise EngineDeadError(
                f"the core came back with another model: {after.model} ({name} {now}) instead of "
                f"{before.model} ({was})"
            )
