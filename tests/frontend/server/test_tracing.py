"""OpenTelemetry spans: their names and parents, and what there is without the packages."""

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from nanovllm.frontend.outputs import RequestMetrics, RequestOutput
from nanovllm.frontend.server import tracing as tracing_module
from nanovllm.frontend.server.serving import Serving
from nanovllm.frontend.server.settings import ServerSettings
from nanovllm.frontend.server.tracing import Tracing
from nanovllm.protocol.messages import Abort, AddRequest
from nanovllm.sampling_params import SamplingParams
from tests.e2e.processes import wait_until
from tests.frontend.attached import says
from tests.frontend.fake_core import silent
from tests.frontend.server.served import Served, message_of, served
from tests.waiting import WAIT_S

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
LATENCIES = {"time_to_first_token", "e2e", "time_in_model_decode"}


def traced(server: Served) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    server.serving.tracing = Tracing(provider)
    return exporter


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def the_one(spans: Sequence[ReadableSpan]) -> ReadableSpan:
    assert len(spans) == 1
    return spans[0]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_a_span_of_its_clients_trace(address: str, stream: bool) -> None:
    async with served(address, says("hel", "lo")) as server:
        exporter = traced(server)
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": stream, "top_p": 0.5}
        body |= {"max_tokens": 5, "temperature": 0.25, "request_id": "mine"}
        path = "/v1/chat/completions"
        response = await server.client.post(path, json=body, headers=TRACEPARENT)
        assert response.status_code == 200
        prompt_ids = server.core.wait_for(AddRequest).prompt_token_ids
    span = the_one(exporter.get_finished_spans())
    assert (span.name, span.kind) == ("llm_request", SpanKind.SERVER)
    assert span.context is not None and span.parent is not None
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert f"{span.parent.span_id:016x}" == PARENT_ID
    assert span.status.status_code is StatusCode.UNSET
    found = attributes_of(span)
    assert found["gen_ai.request.id"] == "chatcmpl-mine"
    assert found["gen_ai.request.max_tokens"] == 5 and found["gen_ai.request.n"] == 1
    assert found["gen_ai.request.temperature"] == 0.25 and found["gen_ai.request.top_p"] == 0.5
    assert found["gen_ai.response.model"] == server.serving.model_name
    assert found["gen_ai.usage.prompt_tokens"] == len(prompt_ids)
    assert found["gen_ai.usage.completion_tokens"] == 5
    assert all(found[f"gen_ai.latency.{name}"] >= 0 for name in LATENCIES)


def test_a_span_tells_how_long_each_part_of_a_request_took() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    times = RequestMetrics(1000.0, 1001.5, 1005.0, queued_ms=250.0, num_generation_tokens=7)
    last = RequestOutput("id", None, [1, 2, 3], [], True, times)
    Tracing(provider).begin("id", "m", SamplingParams(), {}).end(last, None)
    found = attributes_of(the_one(exporter.get_finished_spans()))
    assert {name: value for name, value in found.items() if ".latency." in name} == {
        "gen_ai.latency.time_in_queue": 0.25,
        "gen_ai.latency.time_to_first_token": 1.5,
        "gen_ai.latency.time_in_model_prefill": 1.25,
        "gen_ai.latency.time_in_model_decode": 3.5,
        "gen_ai.latency.time_in_model_inference": 4.75,
        "gen_ai.latency.e2e": 5.0,
    }


async def test_each_prompt_of_a_batch_has_a_span(address: str) -> None:
    async with served(address, says("x")) as server:
        exporter = traced(server)
        await server.complete(["a", "b", "c"])
    spans = exporter.get_finished_spans()
    assert len(spans) == 3 and all(span.parent is None for span in spans)
    assert len({attributes_of(span)["gen_ai.request.id"] for span in spans}) == 3


async def test_failures_and_leaving_show(address: str) -> None:
    async with served(address, says("x", end="error")) as server:
        exporter = traced(server)
        assert (await server.complete("a")).status_code == 500
        span = the_one(exporter.get_finished_spans())
        assert span.status.status_code is StatusCode.ERROR
        assert [event.name for event in span.events] == ["exception"]


async def test_a_client_that_leaves_ends_its_span(address: str) -> None:
    async with served(address, silent) as server:
        exporter = traced(server)
        asking = asyncio.create_task(server.complete("a"))
        await message_of(server.core, AddRequest)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await message_of(server.core, Abort)
        await asyncio.to_thread(
            wait_until,
            lambda: len(exporter.get_finished_spans()) == 1,
            timeout_s=WAIT_S,
            what="a span",
        )
    assert the_one(exporter.get_finished_spans()).status.description.startswith("aborted")  # type: ignore[union-attr]


async def test_nothing_is_loaded_unless_asked_for(address: str) -> None:
    async with served(address, says("x")) as server:
        assert server.serving.tracing is None
        assert (await server.complete("a")).status_code == 200


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf", None])
async def test_spans_go_to_the_collector(
    protocol: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By gRPC unless the environment says otherwise; what waits is sent at the end."""
    made: list[tuple[str, str, InMemorySpanExporter]] = []
    for kind in ("GrpcExporter", "HttpExporter"):

        def make(*, endpoint: str, timeout: float, kind: str = kind) -> InMemorySpanExporter:
            made.append((kind, endpoint, InMemorySpanExporter()))
            return made[-1][2]

        monkeypatch.setattr(tracing_module, kind, make)
    if protocol is not None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    tracing = Tracing.to("http://127.0.0.1:9/v1/traces")
    tracing.begin("id", "m", SamplingParams(), {}).end(None, None)
    await tracing.close()
    ((kind, endpoint, exporter),) = made
    assert kind == ("HttpExporter" if protocol == "http/protobuf" else "GrpcExporter")
    assert endpoint == "http://127.0.0.1:9/v1/traces"
    assert the_one(exporter.get_finished_spans()).name == "llm_request"


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_a_collector_that_is_not_there_is_not_waited_for(
    protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    tracing = Tracing.to("http://127.0.0.1:9/v1/traces")
    await tracing.close()  # nothing waits, so it is not noticed


def test_without_the_packages_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "nanovllm.frontend.server.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)

    async def never(on_progress: Any) -> Any:
        raise AssertionError

    with pytest.raises(ValueError, match=r"otlp_traces_endpoint.*pip install 'nanovllm\[otel\]'"):
        Serving(ServerSettings(otlp_traces_endpoint="http://127.0.0.1:4317"), never)
