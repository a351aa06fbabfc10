"""What a damaged or hostile file runs its readers into, made into the error of a bad file.

Readers take a model's numbers and names as they stand, and check what they need. What arithmetic
and lookups then find wrong, a text for a size or a size of 0, is the file's fault.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NONSENSE = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError)


@contextmanager
def blaming(what: str | Path) -> Iterator[None]:
    """`ValueError` naming the file for what makes no sense in it."""
    try:
        yield
    except NONSENSE as error:
        raise ValueError(
            f"model: {what} is damaged: a value in it makes no sense ({error}): fetch it again"
        ) from error
