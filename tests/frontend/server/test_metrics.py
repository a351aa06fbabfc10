"""What one request adds to the metrics, by a clock of the test's own."""

from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanovllm.frontend.outputs import CompletionOutput, RequestMetrics, RequestOutput
from nanovllm.frontend.server import metrics as module
from nanovllm.frontend.server.metrics import RequestTimes, ServerMetrics
from nanovllm.protocol.messages import FinishReason
from nanovllm.sampling_params import SamplingParams


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
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
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
