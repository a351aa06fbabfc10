"""How an engine's state looks on a terminal, whatever its size."""

import math
import statistics
from collections.abc import Collection, Iterable

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from nanovllm.watch.events import Layout, SequenceEvent, StepEvent
from nanovllm.watch.top.state import State
from nanovllm.watch.top.view import View

COLOURS = (
    "cyan",
    "magenta",
    "yellow",
    "green",
    "blue",
    "bright_red",
    "bright_cyan",
    "bright_green",
)
EIGHTHS = " ▁▂▃▄▅▆▇█"
STEP_ROWS = 4
STEP_LINES = 1 + STEP_ROWS + 1  # with a title and a gap
FIGURE_LINES = 4
MIN_LISTED = 5  # the heading, three requests, and how many there are more
MIN_CACHE_LINES, MAX_CACHE_LINES = 3, 13  # with a title
NARROW = 70  # columns, below which the rarer figures of requests are left out
WAITS = {
    "": "next step",
    "seats": "waits for a seat",
    "budget": "waits for token budget",
    "kv": "waits for blocks",
    "sibling": "waits for its sibling",
    "results": "waits for its last tokens",
    "client": "its client does not read",
}


class Screen:
    """Figures and sequences, and as much of steps and cache as the height allows."""

    def __init__(self, state: State, view: View | None = None) -> None:
        self._state = state
        self._view = view  # None: nobody can press keys

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        state, width = self._state, options.max_width
        if state.layout is None or state.counters is None:
            yield Text("waiting for the engine …", style="dim")
            return
        height = options.height or max(options.size.height, 24)
        yield from _figures(state, state.layout)
        # Requests have their place in any window; then come steps, then the cache.
        left = height - FIGURE_LINES - (self._view is not None)
        cache: list[Text] = []
        has_steps = left >= MIN_LISTED + STEP_LINES and not (self._view and self._view.is_alone)
        if has_steps:
            room = left - MIN_LISTED - STEP_LINES - 1
            if room >= MIN_CACHE_LINES:
                most = min(room, MAX_CACHE_LINES) - 1
                cache = [*_cache(state, state.layout, width, most), Text()]
            yield from cache
            yield from _steps(state, state.layout, width)
            yield Text()
            left -= len(cache) + STEP_LINES
        yield from _sequences(state, self._view or View(), width, max(2, left))
        if self._view is not None:
            yield _line((self._view.keys, "dim"))


def colour_of(uid: int) -> str:
    """The same for one request everywhere."""
    return COLOURS[uid % len(COLOURS)]


def _figures(state: State, layout: Layout) -> Iterable[Text]:
    counters, hit_rate = state.counters, state.hit_rate
    assert counters is not None
    yield _line((layout.model, "bold"), (f" on {layout.device}", "dim"))
    values = {
        "tokens/s": f"{state.tokens_per_s:,.0f}",
        "first token": _median(state.ttfts_ms),
        "between tokens": _median(state.between_ms),
        "cache hits": "–" if hit_rate is None else f"{hit_rate:.0%}",
    }
    counts = {
        "running": counters.num_running,
        "waiting": counters.num_waiting,
        "preempted": counters.num_preemptions,
    }
    for named in (values, counts):
        parts = [((f"{name} ", "dim"), (f"{value}   ", "bold")) for name, value in named.items()]
        yield _line(*(part for pair in parts for part in pair))
    yield Text()


def _line(*parts: tuple[str, str]) -> Text:
    """One line, cut where the terminal ends."""
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def _median(values: Collection[float]) -> str:
    if not values:
        return "–"
    value = statistics.median(values)
    return f"{value / 1e3:.2f} s" if value >= 1e3 else f"{value:.1f} ms"


def _cache(state: State, layout: Layout, width: int, num_rows: int) -> Iterable[Text]:
    """A character per block; if there are too many, per run of blocks: its fullest."""
    assert state.counters is not None
    used = layout.num_blocks - state.counters.num_free_blocks
    run = -(-layout.num_cells // (width * num_rows))
    part = " (a sample)" if layout.stride > 1 else f" ({run} to a character)" if run > 1 else ""
    text = f"{used:,} of {layout.num_blocks:,} blocks in use{part}, {layout.block_size} tokens each"
    yield _line(("KV cache ", "bold"), (text, "dim"))
    line = Text()
    for first in range(0, layout.num_cells, run):
        cell = max(range(first, min(first + run, layout.num_cells)), key=state.cells.__getitem__)
        line.append(*_glyph(state, cell))
        if len(line) == width:
            yield line
            line = Text()
    if line:
        yield line


def _glyph(state: State, cell: int) -> tuple[str, str]:
    held, has_key = state.cells[cell] >> 1, state.cells[cell] & 1
    if not held:
        return ("░", "cyan dim") if has_key else ("·", "dim")
    uid = state.owners.get(state.block_of(cell))
    style = "white" if uid is None else colour_of(uid)
    if held > 1:
        return (str(held) if held < 10 else "+"), f"black on {style}"
    return ("█" if has_key else "▓"), style


def _steps(state: State, layout: Layout, width: int) -> Iterable[Text]:
    """Columns on a logarithmic scale: decodes below, chunks of prompts on top of them."""
    budget = layout.max_num_batched_tokens
    lost = f"; {state.num_lost_steps:,} were too many to show" if state.num_lost_steps else ""
    yield _line(
        ("Steps ", "bold"),
        (f"up to {budget:,} tokens (logarithmic): ", "dim"),
        ("decodes", "yellow"),
        (" and ", "dim"),
        ("chunks of prompts", "cyan"),
        (lost, "dim"),
    )
    shown = list(state.steps)[-width:]
    levels = [_levels(step, budget) for step in shown]
    for row in reversed(range(STEP_ROWS)):
        line = Text()
        for step, (decodes, whole) in zip(shown, levels, strict=True):
            filled = max(0, min(8, whole - 8 * row))
            is_decode = decodes > 8 * row and not (decodes < whole and decodes - 8 * row < 4)
            preempted = step.preempted and row == STEP_ROWS - 1
            style = "red" if preempted else "yellow" if is_decode else "cyan"
            line.append("▼" if preempted else EIGHTHS[filled], style)
        yield line


def _levels(step: StepEvent, budget: int) -> tuple[int, int]:
    """Heights in eighths of a row, of the decodes and of everything."""
    top = STEP_ROWS * 8
    whole = step.num_decodes + sum(chunk.num_tokens for chunk in step.chunks)

    def height(tokens: int) -> int:
        return math.ceil(top * math.log2(1 + tokens) / math.log2(1 + budget)) if tokens else 0

    return height(step.num_decodes), height(whole)


def _sequences(state: State, view: View, width: int, height: int) -> Iterable[Text | Table]:
    """A heading, as many requests from the view's first one on as there is room for, and how many
    there are before and after them."""
    every = view.ordered(state.copy_of_sequences())
    room = height - 1
    if len(every) > room or state.num_hidden:
        room = max(1, room - 1)
    first = view.scroll_within(len(every), room)
    shown = every[first : first + room]
    names: tuple[str, ...] = (
        "request",
        "state",
        "prompt",
        "cached",
        "computed",
        "tokens",
        "preempted",
    )
    if width < NARROW:
        names = ("request", "state", "prompt", "tokens")
    table = Table(box=None, pad_edge=False, expand=False, header_style="dim")
    for name in names:
        side: JustifyMethod = "left" if name in ("request", "state") else "right"
        mark = ("▲" if view.is_reversed else "▼") if name == view.sort else ""
        table.add_column(name + mark, justify=side, no_wrap=True)
    bar_width = min(40, width - 78)
    if bar_width >= 10:
        table.add_column("")
    longest = max((one.num_tokens for one in shown), default=1)
    for one in shown:
        doing = "prefill" if one.num_computed < one.num_prompt_tokens else "decode"
        cells: dict[str, str | Text] = {
            "request": Text(f"#{one.uid}", Style(color=colour_of(one.uid), bold=True)),
            "state": doing if one.state == "running" else WAITS[one.cause],
            "prompt": f"{one.num_prompt_tokens:,}",
            "cached": f"{one.num_cached_tokens:,}",
            "computed": f"{one.num_computed:,}",
            "tokens": f"{one.num_tokens - one.num_prompt_tokens:,}",
            "preempted": f"{one.num_preemptions:,}",
        }
        bar = [_bar(one, longest, bar_width)] if bar_width >= 10 else []
        table.add_row(*(cells[name] for name in names), *bar)
    if shown:
        yield table
    else:
        yield Text("nothing runs", style="dim")
    hidden = len(every) - len(shown) + state.num_hidden
    if hidden:
        before = f"{first:,} before these; " if first else ""
        yield Text(f"{before}and {hidden - first:,} more", style="dim")


def _bar(one: SequenceEvent, longest: int, width: int) -> Text:
    """What was cached, is computed, is still to do, and has been generated."""

    def columns(tokens: int) -> int:
        return round(width * max(0, tokens) / longest)

    cached = columns(min(one.num_cached_tokens, one.num_computed))
    computed = columns(min(one.num_computed, one.num_prompt_tokens)) - cached
    to_do = columns(one.num_prompt_tokens) - cached - computed
    made = columns(one.num_tokens) - cached - computed - to_do
    return Text.assemble(
        ("▒" * cached, "cyan dim"),
        ("█" * computed, "cyan"),
        ("░" * to_do, "dim"),
        ("█" * made, "yellow"),
    )
