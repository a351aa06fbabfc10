"""Large matrices some rows at a time, so that what is made on the way takes little memory."""

from collections.abc import Iterator

LOADED_VALUES = 2**22  # that are converted at a time as weights are loaded, some bytes of each


def pieces(
    num_rows: int, num_columns: int, *, most_values: int | None = None, unit: int = 1
) -> Iterator[slice]:
    """All rows, of at most so many values at a time, but at least `unit` rows, and a multiple of
    that. most_values: None, as many as are converted at a time."""
    most_values = most_values or LOADED_VALUES
    step = max(1, most_values // (unit * max(1, num_columns))) * unit
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def within(rows: slice, piece: slice) -> slice:
    """A piece of these rows, counted from the first of all."""
    return slice(rows.start + piece.start, rows.start + piece.stop)
