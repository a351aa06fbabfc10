"""The order in which test processes get their tests (`conftest.py`)."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import LONG, TESTS, dealt


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
def test_every_process_begins_with_long_tests(num_processes: int) -> None:
    sizes = {f"core/test_{index}.py": 10 + index for index in range(20)}
    sizes |= {f"{place}.py": 1 + index % 3 for index, place in enumerate(LONG)}
    items: list[Any] = [
        SimpleNamespace(path=TESTS / place, number=number)
        for place, size in sizes.items()
        for number in range(size)
    ]
    order = dealt(items, num_processes)
    assert sorted(map(id, order)) == sorted(map(id, items))
    for num_left in range(num_processes, 0, -1):
        size = len(order) // num_left  # as xdist divides what is left
        assert str(order[0].path.relative_to(TESTS)).startswith(LONG)
        order = order[size:]
