"""What one request adds to the metrics, by a clock of the test's own."""

from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanovllm.frontend.outputs import CompletionOutput, RequestMetrics, RequestOutput
from nanovllm.frontend.server import serving
from nanovllm.frontend.server.metrics import ServerMetrics
from nanovllm.frontend.server.serving import RequestTimes
from nanovllm.protocol.messages import CoreStatus, FinishReason
from nanovllm.sampling_params import SamplingParams
from tests.frontend.fake_core import STATUS, WELCOME


def output(*reasons: FinishReason | None, **known: float) -> RequestOutput:
    """Of a prompt of 3 tokens, 2 of them from the cache, and outputs with these ends."""
    completions = [CompletionOutput(i, "x", [1], finish_reason=r) for i, r in enumerate(reasons)]
    finished = all(reason is not None for reason in reasons)
    times = RequestMetrics(arrival_time=1000.0, num_generation_tokens=10, **known)  # type: ignore[arg-type]
    return RequestOutput("id", None, [1, 2, 3], completions, finished, times, num_cached_tokens=2)


def samples(metrics: ServerMetrics) -> dict[str, tuple[float, float] | float]:
    """Of histograms the number and the sum, of counters the value; what is 0 is left out."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for name, labels, value, *_ in family.samples:
            if not name.endswith(("_bucket", "_created")):
                assert labels.get("model_name", "m") == "m" and labels.get("engine", "0") == "0"
                reason = labels.get("finished_reason", "")
                found[name.removeprefix("nanovllm:") + reason] = value
    sums = {name.removesuffix("_sum") for name in found if name.endswith("_sum")}
    counters = {n: v for n, v in found.items() if n.rpartition("_")[0] not in sums and v}
    pairs = {name: (found[f"{name}_count"], found[f"{name}_sum"]) for name in sums}
    return counters | {name: pair for name, pair in pairs.items() if pair != (0, 0)}


END = {"first_token_time": 1000.5, "finished_time": 1002.5, "queued_ms": 250.0}
OF_ANY_KIND: dict[str, tuple[float, float] | float] = {
    "e2e_request_latency_seconds": (1, 3.0),
    "request_queue_time_seconds": (1, 0.25),
    "request_time_per_output_token_seconds": (1, 2.0 / 4),
    "request_prompt_tokens": (1, 3),
    "request_generation_tokens": (1, 10),
    "request_params_n": (1, 2),
    "request_params_max_tokens": (1, 7),
    "prompt_tokens_cached_total": 2,
    "request_success_totalstop": 1,
    "request_success_totallength": 1,
}


@pytest.mark.parametrize("streams", [False, True])
def test_a_request_is_measured(monkeypatch: pytest.MonkeyPatch, streams: bool) -> None:
    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr(serving, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    metrics = ServerMetrics(lambda: None)
    params = SamplingParams(n=2, max_tokens=7, output_kind="delta" if streams else "final_only")
    times = RequestTimes(metrics, "m")
    assert samples(metrics) == {}
    if streams:
        for clock.now in (50.75, 51.0):
            times.on_output(output(None, None), params)
    clock.now = 53.0
    times.on_output(output("stop", "length", **END), params)
    first_s = {"time_to_first_token_seconds": (1, 0.75 if streams else 0.5)}
    between_s = {"inter_token_latency_seconds": (2, 2.25)} if streams else {}
    assert samples(metrics) == OF_ANY_KIND | first_s | between_s


def test_what_is_not_known_is_not_measured() -> None:
    metrics = ServerMetrics(lambda: None)
    times = RequestTimes(metrics, "m")
    ended = output("abort", first_token_time=1000.5)  # a queue is left without a word of it
    times.on_output(ended, SamplingParams(max_tokens=None))
    found = samples(metrics)
    assert found["request_success_totalabort"] == 1
    assert not found.keys() & {"request_queue_time_seconds", "request_params_max_tokens"}
    assert not found.keys() & {"time_to_first_token_seconds", "inter_token_latency_seconds"}


@pytest.mark.parametrize(("num_tokens", "per_token"), [(1, None), (2, 2.0), (5, 0.5)])
def test_time_per_token_is_of_the_later_ones(num_tokens: int, per_token: float | None) -> None:
    metrics = ServerMetrics(lambda: None)
    ended = output("stop", **END)
    ended.metrics.num_generation_tokens = num_tokens
    RequestTimes(metrics, "m").on_output(ended, SamplingParams())
    found = samples(metrics).get("request_time_per_output_token_seconds")
    assert found == (None if per_token is None else (1, per_token))


def test_the_core_is_read_when_it_is_scraped() -> None:
    """Each replica by its number; one that is away tells nothing."""
    first = msgspec.structs.replace(
        STATUS, num_blocks=8, num_free_blocks=2, last_step_ms=250.0, num_running=3
    )
    last = msgspec.structs.replace(STATUS, num_blocks=0, num_free_blocks=0, last_step_ms=1.0)
    statuses: list[CoreStatus | None] = [first, None, last]
    text = ServerMetrics(lambda: (WELCOME, statuses)).exposition().decode()
    found = {
        (sample.name.removeprefix("nanovllm:"), sample.labels["engine"]): sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "engine" in sample.labels and sample.labels.get("model_name") == "fake"
    }
    assert {engine for _, engine in found} == {"0", "2"}
    for engine, share, step_s, num_running in (("0", 0.75, 0.25, 3), ("2", 0.0, 0.001, 0)):
        assert found["kv_cache_usage_perc", engine].value == share
        assert found["engine_step_seconds", engine].value == step_s
        assert found["num_requests_running", engine].value == num_running
    facts = found["cache_config_info", "0"]
    assert facts.value == 1 and facts.labels["num_gpu_blocks"] == "8"
    assert facts.labels["block_size"] == str(WELCOME.block_size)


def test_processes_that_share_a_directory_are_scraped_as_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What this process alone has counted is not told beside it."""
    metrics = ServerMetrics(lambda: None)
    RequestTimes(metrics, "m").on_output(output("stop", **END), SamplingParams())
    assert samples(metrics)["request_params_n"] == (1, 1)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert metrics.exposition() == b""
