"""In place of CUDA graphs, where there is no GPU: what was captured is called again."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class CalledGraph:
    def __init__(self, launch: Callable[[], object]) -> None:
        self._launch = launch
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        self._launch()


class CalledGraphs:
    """Of what returns nothing. captured: all there are, in order."""

    def __init__(self) -> None:
        self.captured: list[CalledGraph] = []

    def capture(self, launch: Callable[[], T]) -> tuple[CalledGraph, T]:
        self.captured.append(CalledGraph(launch))
        return self.captured[-1], None  # type: ignore[return-value]
