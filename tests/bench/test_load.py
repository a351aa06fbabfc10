"""Loads are decided in full before they run, the same for the same seed."""

import itertools
from pathlib import Path

import pytest

from nanovllm.bench.load import Arrival, ClientsLoad, plan, prompt_of


def test_poisson_arrivals() -> None:
    load = ClientsLoad(clients=4, rate=50.0, duration=20.0, input_len=100, output_len=10)
    shares = plan(load)
    assert shares == plan(load) != plan(ClientsLoad(clients=4, rate=50.0, load_seed=1))
    arrivals = sorted((one for share in shares for one in share), key=lambda one: one.at)
    assert 850 < len(arrivals) < 1150 and all(0 < one.at < 20 for one in arrivals)
    gaps = [after.at - before.at for before, after in itertools.pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert 0.85 < deviation / mean < 1.15, "exponential: as wide as it is long"
    assert all(200 < len(share) < 300 for share in shares)
    lengths = {one.input_len for one in arrivals}
    assert min(lengths) >= 50 and max(lengths) <= 150 and len(lengths) > 50
    shared = sum(one.num_shared > 0 for one in arrivals) / len(arrivals)
    assert 0.18 < shared < 0.32


def test_prompts_share_what_they_should_and_nothing_else() -> None:
    one, two = (prompt_of(Arrival(0.0, 40, 1, 16, seed), 1000) for seed in (1, 2))
    assert len(one) == len(two) == 40
    assert one[:16] == two[:16] and one[16:] != two[16:]
    assert all(3 <= token_id < 1000 for token_id in one + two)


def test_a_trace_says_when_and_for_whom(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"at": 1.5, "input_len": 7, "output_len": 3, "client": 1}\n\n'
        '{"at": 0.5, "input_len": 9, "output_len": 2, "num_shared": 4}\n'
    )
    first, second = plan(ClientsLoad(clients=2, trace=str(path)))
    assert [(one.at, one.input_len, one.output_len, one.num_shared) for one in first] == [
        (0.5, 9, 2, 4)
    ]
    assert [(one.at, one.input_len, one.output_len) for one in second] == [(1.5, 7, 3)]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "is empty"),
        ('{"at": 0}', "line 1 .*input_len"),
        ('{"at": 0, "input_len": 1, "output_len": 1}\nnonsense', "line 2"),
        ('{"at": 0, "input_len": 1, "output_len": 0}', "line 1 .*output_len"),
    ],
)
def test_what_is_no_trace(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"trace: .*{complaint}"):
        plan(ClientsLoad(trace=str(path)))


def test_a_trace_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="trace: nowhere cannot be read"):
        plan(ClientsLoad(trace="nowhere"))
