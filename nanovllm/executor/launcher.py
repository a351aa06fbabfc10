"""The seam of launchers: what starts the ranks of a group, and what the group knows of each rank.

`group` asks `make_launcher` for the one that the configuration names, and does not know which it
has. A launcher is one file: `rank_process` for this host, `ray_launcher` for a Ray cluster.
"""

from collections.abc import Iterator
from importlib import import_module
from typing import NamedTuple, Protocol

from nanovllm.config import EngineConfig
from nanovllm.executor.channel import Channel
from nanovllm.protocol.plan import ProgressCallback

LAUNCHERS = {
    "mp": "nanovllm.executor.rank_process:ProcessLauncher",
    "ray": "nanovllm.executor.ray_launcher:RayLauncher",
}


class Death(NamedTuple):
    """How a rank has ended. from_outside: by a signal that no program causes itself, or together
    with its host; what the rank was doing is not to blame then."""

    cause: str
    from_outside: bool = False


class StartedRank(Protocol):
    """A rank as its group sees it; `str` names it in messages."""

    @property
    def rank(self) -> int:
        """Its number."""

    @property
    def host(self) -> str:
        """An address of its host that the hosts of all ranks can reach."""

    @property
    def channel(self) -> Channel:
        """The way to it. It closes when the rank ends, however that happens."""

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has stopped it, as far as is known. Does not wait."""

    def cause_of_death(self) -> Death:
        """Its channel has been closed. Takes a second at most."""

    def kill(self) -> None:
        """Have it ended by force. Does not wait."""

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, within that time."""

    def end(self, timeout_s: float) -> None:
        """Kill it, unless it ends by itself in that time, and close its channel."""


class Launcher(Protocol):
    """Starts the ranks of one group, once."""

    def start(self) -> Iterator[StartedRank]:
        """The ranks in the order of their numbers, each as soon as it has been started.

        Raises `ValueError` if what the configuration asks for is not there, and `DeviceLostError`
        if a rank dies before it can be handed out.
        """

    def close(self) -> None:
        """Let go of what the ranks have used; they have ended. Safe to call twice."""


def make_launcher(config: EngineConfig, on_progress: ProgressCallback) -> Launcher:
    """The one that the configuration asks for. `ValueError`: what it needs is not installed."""
    backend = config.parallel.launcher
    module, _, name = LAUNCHERS[backend].partition(":")
    try:
        loaded = import_module(module)
    except ModuleNotFoundError as error:
        if error.name != backend:
            raise
        raise ValueError(
            f"distributed_executor_backend: {backend!r} needs a package that is not installed: "
            f"pip install 'nanovllm[{backend}]'"
        ) from None
    launcher: Launcher = getattr(loaded, name)(config, on_progress)
    return launcher
