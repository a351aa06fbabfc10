"""OpenTelemetry: one span per request to the engine, under vLLM's names (GenAI conventions).

Imported only with `--otlp-traces-endpoint`, so that the packages are optional and nothing is spent
without. A client's W3C trace context (`traceparent`) becomes the span's parent. Spans leave in the
background: a collector that is slow or gone delays nobody.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from nanovllm.frontend.outputs import RequestOutput
from nanovllm.frontend.request import Request
from nanovllm.sampling_params import SamplingParams

SPAN_NAME = "llm_request"
PROTOCOL_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
SERVICE_VARIABLE = "OTEL_SERVICE_NAME"
EXPORT_TIMEOUT_S = 5
CLOSE_TIMEOUT_S = 5.0


class Tracing:
    """Makes the spans of one server process. provider: where they go."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("nanovllm")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str) -> "Tracing":
        """Send spans to an OTLP collector there."""
        name = os.environ.get(SERVICE_VARIABLE, "nanovllm")
        provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
        provider.add_span_processor(BatchSpanProcessor(_exporter(endpoint)))
        return cls(provider)

    def begin(
        self, request_id: str, model: str, params: SamplingParams, headers: Mapping[str, str]
    ) -> "RequestSpan":
        """A request arrives. headers: the client's, which may hold the context of its trace."""
        attributes: dict[str, Any] = {
            "gen_ai.request.id": request_id,
            "gen_ai.request.n": params.n,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.response.model": model,
        }
        if params.max_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = params.max_tokens
        span = self._tracer.start_span(
            SPAN_NAME,
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            attributes=attributes,
        )
        return RequestSpan(span)

    def traced(
        self,
        outputs: AsyncIterable[RequestOutput],
        request: Request,
        model: str,
        headers: Mapping[str, str],
    ) -> "TracedOutputs":
        """The outputs of a request that arrives now. model, headers: see `begin`."""
        span = self.begin(request.request_id, model, request.params, headers)
        return TracedOutputs(outputs, span)

    async def close(self) -> None:
        """Send what waits, but do not wait for a collector that does not answer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await asyncio.to_thread(self._provider.shutdown)


class RequestSpan:
    """From a request's arrival to its end."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def end(self, last: RequestOutput | None, error: BaseException | None) -> None:
        """last: its latest output; error: what ended it early, which is also a client that left."""
        if last is not None:
            self._span.set_attributes(_attributes_of(last))
        if isinstance(error, Exception):
            self._span.record_exception(error)
            self._span.set_status(Status(StatusCode.ERROR, str(error)))
        elif error is not None:
            self._span.set_status(Status(StatusCode.ERROR, "aborted: the client has left"))
        self._span.end()


@dataclass(slots=True)
class TracedOutputs:
    """Outputs of a request, passed on as they come; the span ends as they do."""

    outputs: AsyncIterable[RequestOutput]
    span: RequestSpan

    async def __aiter__(self) -> AsyncGenerator[RequestOutput, None]:
        last: RequestOutput | None = None
        error: BaseException | None = None
        try:
            async for last in self.outputs:
                yield last
        except BaseException as caught:
            error = caught
            raise
        finally:
            self.span.end(last, error)


def _attributes_of(output: RequestOutput) -> dict[str, Any]:
    """Latencies in seconds, as vLLM gives them; those of the model are of the whole request."""
    metrics = output.metrics
    found: dict[str, Any] = {
        "gen_ai.usage.prompt_tokens": len(output.prompt_token_ids),
        "gen_ai.usage.completion_tokens": metrics.num_generation_tokens,
    }
    arrived, first, finished = (
        metrics.arrival_time,
        metrics.first_token_time,
        metrics.finished_time,
    )
    queued_s = None if metrics.queued_ms is None else metrics.queued_ms / 1e3
    if queued_s is not None:
        found["gen_ai.latency.time_in_queue"] = queued_s
    if first is not None:
        found["gen_ai.latency.time_to_first_token"] = first - arrived
        if queued_s is not None:
            found["gen_ai.latency.time_in_model_prefill"] = max(0.0, first - arrived - queued_s)
    if finished is not None:
        found["gen_ai.latency.e2e"] = finished - arrived
        if first is not None:
            found["gen_ai.latency.time_in_model_decode"] = finished - first
        if queued_s is not None:
            inference_s = max(0.0, finished - arrived - queued_s)
            found["gen_ai.latency.time_in_model_inference"] = inference_s
    return found


def _exporter(endpoint: str) -> SpanExporter:
    """By gRPC, or as the environment says."""
    if os.environ.get(PROTOCOL_VARIABLE, "grpc") == "grpc":
        return GrpcExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
    return HttpExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
