"""What the user of `nanovllm top` has chosen to see, by keys."""

from collections.abc import Callable

from nanovllm.watch.events import SequenceEvent

SORTS: dict[str, Callable[[SequenceEvent], int]] = {
    "prompt": lambda one: -one.num_prompt_tokens,
    "cached": lambda one: -one.num_cached_tokens,
    "computed": lambda one: -one.num_computed,
    "tokens": lambda one: one.num_prompt_tokens - one.num_tokens,
    "preempted": lambda one: -one.num_preemptions,
}
ARRIVAL = "arrival"
ALL = 1 << 30
LINES = {"down": 1, "j": 1, "up": -1, "k": -1}
PAGES = {"pagedown": 1, " ": 1, "pageup": -1, "home": -ALL, "g": -ALL, "end": ALL, "G": ALL}
QUIT = frozenset({"q", "Q", "c-c", "c-d"})


class View:
    """How sequences are sorted, which is the first that is shown, and whether they stand alone."""

    def __init__(self) -> None:
        self.sort = ARRIVAL  # or a name of `SORTS`, the largest first
        self.is_reversed = False
        self.is_alone = False
        self._first = 0
        self._page = 1  # as many as were shown last

    @property
    def keys(self) -> str:
        """What can be pressed."""
        full = "all" if self.is_alone else "requests only"
        return f"q quit   s sort ({self.sort})   r reverse   ↑↓ PgUp PgDn scroll   f {full}"

    def press(self, key: str) -> bool:
        """Take a key in, by prompt_toolkit's name for it. Returns False if it ends the program."""
        if key in QUIT:
            return False
        if key == "s":
            names = [ARRIVAL, *SORTS]
            self.sort = names[(names.index(self.sort) + 1) % len(names)]
        elif key == "r":
            self.is_reversed = not self.is_reversed
        elif key == "f":
            self.is_alone = not self.is_alone
        elif key in LINES:
            self._first += LINES[key]
        elif key in PAGES:
            self._first += PAGES[key] * self._page
        return True

    def ordered(self, sequences: list[SequenceEvent]) -> list[SequenceEvent]:
        """sequences: in order of arrival, those that run first."""
        if self.sort != ARRIVAL:
            sequences = sorted(sequences, key=SORTS[self.sort])
        return sequences[::-1] if self.is_reversed else sequences

    def scroll_within(self, num_sequences: int, page: int) -> int:
        """The index of the first that is shown, when `page` of so many have room."""
        self._page = page
        self._first = max(0, min(self._first, num_sequences - page))
        return self._first
