"""Prometheus metrics under vLLM's names, with the prefix `nanovllm:`.

The core's own counters come from its `CoreStatus`, so they are equal from every frontend. What HTTP
clients saw is measured in `serving.py`, and summed over all processes of `--frontends` by
prometheus_client's multiprocess mode (`PROMETHEUS_MULTIPROC_DIR`, set before this is imported).
"""

import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from operator import attrgetter

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
    multiprocess,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from nanovllm.protocol.messages import CoreStatus, Welcome

LABELS = ("model_name", "engine")
TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
COUNT_BUCKETS = tuple(float(base * 10**power) for power in range(6) for base in (1, 2, 5))
N_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)
# Field of `CoreStatus` → (metric, what it is)
CORE_GAUGES = {
    "num_running": ("num_requests_running", "Sequences in the running batch."),
    "num_waiting": ("num_requests_waiting", "Sequences waiting to be scheduled."),
    "num_clients": ("num_clients", "Frontends attached to the core."),
}
CORE_COUNTERS = {
    "num_preemptions": ("num_preemptions", "Sequences preempted."),
    "num_prompt_tokens": ("prompt_tokens", "Prompt tokens computed."),
    "num_generation_tokens": ("generation_tokens", "Tokens generated."),
    "num_forced_tokens": ("forced_tokens", "Of those, tokens that a grammar left no choice about."),
    "prefix_cache_queries": ("prefix_cache_queries", "Tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("prefix_cache_hits", "Tokens found in the prefix cache."),
    "step": ("engine_steps", "Forward passes."),
}
MAX_REMEMBERED = 256  # sets of labels
StatusSource = Callable[[], tuple[Welcome, list[CoreStatus | None]] | None]


class ServerMetrics:
    """All metrics of one server process; `status` gives the latest word of each core, if there is
    one."""

    def __init__(self, status: StatusSource) -> None:
        self._registry = CollectorRegistry()
        self._status = status

        # What gives the one for a set of labels remembers it: looking it up takes longer than
        # counting.
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Callable[..., Histogram]:
            made = Histogram(
                f"nanovllm:{name}", text, LABELS, buckets=buckets, registry=self._registry
            )
            return lru_cache(MAX_REMEMBERED)(made.labels)

        def counter(name: str, text: str, *labels: str) -> Callable[..., Counter]:
            made = Counter(f"nanovllm:{name}", text, labels, registry=self._registry)
            return lru_cache(MAX_REMEMBERED)(made.labels)

        self.ttft = histogram("time_to_first_token_seconds", "Time to first token.", TTFT_BUCKETS)
        self.inter_token = histogram(
            "inter_token_latency_seconds", "Time between tokens of a stream.", TOKEN_BUCKETS
        )
        self.per_token = histogram(
            "request_time_per_output_token_seconds", "Mean time per further token.", TOKEN_BUCKETS
        )
        self.latency = histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", REQUEST_BUCKETS
        )
        self.queue_time = histogram(
            "request_queue_time_seconds", "Time waiting in the core.", REQUEST_BUCKETS
        )
        self.prompt_tokens = histogram(
            "request_prompt_tokens", "Prompt tokens per request.", COUNT_BUCKETS
        )
        self.generation_tokens = histogram(
            "request_generation_tokens", "Generated tokens per request.", COUNT_BUCKETS
        )
        self.params_n = histogram("request_params_n", "The n of requests.", N_BUCKETS)
        self.params_max_tokens = histogram(
            "request_params_max_tokens", "The max_tokens of requests.", COUNT_BUCKETS
        )
        self.success = counter("request_success", "Finished requests.", *LABELS, "finished_reason")
        self.cached = counter("prompt_tokens_cached", "Prompt tokens reused from cache.", *LABELS)
        self.http = counter("http_requests", "HTTP answers.", "method", "path", "status")
        self.by_key = counter("api_key_requests", "HTTP requests by the name of their key.", "key")

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        registry = self._registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        core = CollectorRegistry()
        core.register(CoreCollector(self._status))
        return generate_latest(core) + generate_latest(registry)


class CoreCollector:
    """The core's counters, read when scraped."""

    def __init__(self, status: StatusSource) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        known = self._status()
        if known is None:
            return
        welcome, statuses = known
        engines = {
            (welcome.served_model_name, str(index)): status
            for index, status in enumerate(statuses)
            if status is not None
        }

        def gauge(name: str, text: str, value: Callable[[CoreStatus], float]) -> Metric:
            family = GaugeMetricFamily(f"nanovllm:{name}", text, labels=LABELS)
            for labels, status in engines.items():
                family.add_metric(labels, value(status))
            return family

        for field, (name, text) in CORE_GAUGES.items():
            yield gauge(name, text, attrgetter(field))
        text = "KV blocks in use; 1 is all of them."
        yield gauge("kv_cache_usage_perc", text, _share_used)
        yield gauge("engine_step_seconds", "The last step.", lambda one: one.last_step_ms / 1e3)
        for field, (name, text) in CORE_COUNTERS.items():
            counter = CounterMetricFamily(f"nanovllm:{name}", text, labels=LABELS)
            for labels, status in engines.items():
                counter.add_metric(labels, getattr(status, field))
            yield counter
        info = GaugeMetricFamily(
            "nanovllm:cache_config_info",
            "Facts of the KV cache.",
            labels=(*LABELS, "block_size", "num_gpu_blocks"),
        )
        for labels, status in engines.items():
            info.add_metric([*labels, str(welcome.block_size), str(status.num_blocks)], 1)
        yield info


def _share_used(status: CoreStatus) -> float:
    return (status.num_blocks - status.num_free_blocks) / max(1, status.num_blocks)
