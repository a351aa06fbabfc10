"""Figures of a load test, from what clients report."""

from array import array

import pytest

from nanovllm.bench.client import ClientReport, RequestReport, count_gaps
from nanovllm.bench.load import ClientsLoad
from nanovllm.bench.report import (
    CoreFigures,
    add_counts,
    describe,
    jain,
    spread,
    spread_of_counts,
    summarize,
)


def test_jain() -> None:
    assert jain([2.0, 2.0, 2.0]) == 1.0
    assert jain([1.0, 0.0, 0.0, 0.0]) == 0.25
    assert jain([]) == 1.0


def test_quantiles_are_values_that_occurred() -> None:
    found = spread([i / 1000 for i in range(100, 0, -1)])
    assert found == pytest.approx({"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0})
    assert spread([]) == {} == spread_of_counts([])


def test_histograms_add_up_and_are_right_to_two_percent() -> None:
    gaps = [i / 1000 for i in range(1, 101)]
    halves = [count_gaps(array("d", gaps[::2])), count_gaps(array("d", gaps[1::2]))]
    counts = add_counts(halves)
    assert sum(counts) == 100 and counts == count_gaps(array("d", gaps))
    assert spread_of_counts(counts) == pytest.approx(spread(gaps), rel=0.02)
    assert count_gaps(array("d")) == [] == add_counts([[], []])
    assert count_gaps(array("d", [0.0])) == [1], "too short to tell"


def report(client: int, *, num_in_time: int, error: str | None = None) -> ClientReport:
    requests = [RequestReport(0.0, 10, 20, 0.1, 0.5), RequestReport(1.0, 10, 20, 0.3, 0.9)]
    if error is not None:
        requests[1] = RequestReport(1.0, 10, error=error)
    return ClientReport(client, requests, count_gaps(array("d", [0.01] * 38)), num_in_time, 1.5)


def test_a_report_tells_each_client_and_all_together() -> None:
    reports = [report(0, num_in_time=40), report(1, num_in_time=10, error="EngineDeadError: gone")]
    core = CoreFigures(
        cpu_share=0.5, peak_memory_mib=100.0, memory_growth_mib=3.0, num_steps=7, num_preemptions=1
    )
    found = summarize(ClientsLoad(clients=2), reports, 2.0, core)
    assert (found.overall.num_requests, found.overall.num_errors) == (4, 1)
    assert found.overall.tokens_per_s == 30.0 and found.client_cpu_s == 3.0
    assert found.overall.ttft_ms["max"] == pytest.approx(300)
    assert found.clients[1].e2e_ms["max"] == pytest.approx(500)
    assert found.fairness == jain([1.0, 0.5])
    text = describe(found)
    assert "2 clients, 4 requests/s for 10 s: 4 requests, 1 errors" in text
    assert "error: EngineDeadError: gone" in text
    assert "50% of a CPU, peak memory 100 MiB" in text


def test_nothing_at_all_can_be_described() -> None:
    found = summarize(ClientsLoad(), [ClientReport(0, [], [], 0, 0.0)], 1.0, CoreFigures())
    assert "0 requests" in describe(found) and found.fairness == 1.0
