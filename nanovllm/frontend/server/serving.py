"""The engine as the endpoints see it: loading, ready, draining or dead, and its requests.

One per server process, made by `app.create_app`. Owns the `AsyncLLM` once it is there, the count of
requests under way, and the watch over the core's signs of life.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.core_life import ProgressCallback
from nanovllm.frontend.errors import EngineDeadError, RequestFailedError
from nanovllm.frontend.inputs import Prompt, RequestOptions
from nanovllm.frontend.outputs import RequestOutput
from nanovllm.frontend.request import Request
from nanovllm.frontend.server.api_errors import ApiError, from_constraint, from_finish, refused
from nanovllm.frontend.server.bodies import GenerationBody
from nanovllm.frontend.server.body_trial import BodyFacts, BodyTrials
from nanovllm.frontend.server.logprobs import TokenNames
from nanovllm.frontend.server.metrics import ServerMetrics
from nanovllm.frontend.server.replies import Health
from nanovllm.frontend.server.reply_format import ReplyFormat
from nanovllm.frontend.server.settings import ServerSettings
from nanovllm.protocol.messages import CoreStatus, Welcome
from nanovllm.sampling_params import SamplingParams
from nanovllm.watch.events import EngineView
from nanovllm.watch.feed import EngineFeed

if TYPE_CHECKING:
    from nanovllm.frontend.server.tracing import Tracing

RequestOutputs = AsyncIterable[RequestOutput]  # of one request
Opener = Callable[[ProgressCallback], Awaitable[AsyncLLM]]
State = Literal["loading", "ready", "draining", "dead"]
WATCH_INTERVAL_S = 0.25
STALLED_AFTER_S = 10.0  # one step of a long prompt on a CPU takes seconds, and the core is silent
ANSWERED = (None, "stop", "length")
logger = logging.getLogger(__name__)


class Options(NamedTuple):
    """What a request says beside its prompt and its sampling. headers: of HTTP. constrained_by: the
    field that says what the output must be, if there is one."""

    request_id: str
    how: RequestOptions
    headers: Mapping[str, str]
    constrained_by: str | None = None


class Serving:
    """Opens the engine in the background: until then, endpoints answer 503."""

    def __init__(self, settings: ServerSettings, open_llm: Opener) -> None:
        self.settings = settings
        self.metrics = ServerMetrics(self._core_status)
        self.callers = Callers(settings)
        self.body_trials = BodyTrials()
        endpoint = settings.otlp_traces_endpoint
        self.tracing = None if endpoint is None else require_tracing().to(endpoint)
        self.created = int(time.time())
        self.state: State = "loading"
        self.phase, self.progress = "starting", 0.0
        self.failure: Exception | None = None
        self.opened, self.ended = asyncio.Event(), asyncio.Event()
        self.reply_format = ReplyFormat.of(None, settings)
        self._open_llm = open_llm
        self._llm: AsyncLLM | None = None
        self._feed: EngineFeed | None = None
        self._status: CoreStatus | None = None
        self._heard_at = time.monotonic()
        self.num_requests = 0
        self._live: set[str] = set()
        self._token_names: dict[bool, TokenNames] = {}
        self._task: asyncio.Task[None] | None = None

    # ---- life

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.body_trials.close()
        if self._llm is not None:
            await self._llm.close()
        if self.tracing is not None:
            await self.tracing.close()

    def drain(self) -> None:
        """Take no more requests; those under way go on."""
        if self.state in ("loading", "ready"):
            self.state = "draining"

    async def abort_all(self) -> None:
        """End what is under way; each client is told."""
        if self._llm is not None and self._llm.is_running:
            await self._llm.abort(list(self._live))

    async def _run(self) -> None:
        """Open the engine, then watch it. `ended` is set when it has died, or never began."""
        try:
            template = read_template(self.settings.chat_template)
            llm = await self._open_llm(self._on_progress)
            if template is not None and llm.tokenizer is not None:
                llm.tokenizer.set_chat_template(template)
            self._llm = llm
            self.reply_format = ReplyFormat.of(llm.tokenizer, self.settings)
            if llm.tokenizer is not None:
                await asyncio.to_thread(llm.tokenizer.start_chat_template)
            self._heard_at = time.monotonic()
            if self.state == "loading":
                self.state = "ready"
            self.opened.set()
            while llm.is_running:
                status = await llm.stats()
                if status is not self._status:
                    self._status, self._heard_at = status, time.monotonic()
                await asyncio.sleep(WATCH_INTERVAL_S)
            await llm.stats()  # raises why
        except (EngineDeadError, ValueError, TimeoutError) as error:
            self.failure = error
        self.state = "dead"
        self.ended.set()

    def _on_progress(self, phase: str, progress: float) -> None:
        if phase != self.phase:
            logger.info("%s …", phase)
        self.phase, self.progress = phase, progress
        self._heard_at = time.monotonic()

    def _core_status(self) -> tuple[Welcome, list[CoreStatus | None]] | None:
        if self._llm is None or self._status is None or not self._llm.is_running:
            return None
        return self.llm.info, self._llm.replica_stats

    # ---- what endpoints ask

    @property
    def llm(self) -> AsyncLLM:
        """Raises `ApiError` 503 while it loads or when it is gone."""
        if self.state == "dead":
            raise ApiError(503, f"the engine is down: {self.failure}", code="engine_dead")
        if self._llm is None:
            what = f"{self.phase}, {self.progress:.0%}"
            raise ApiError(503, f"the model is still loading ({what})", code="loading")
        return self._llm

    @property
    def model_name(self) -> str:
        """What answers call the model."""
        return self.llm.info.served_model_name

    @property
    def model_names(self) -> list[str]:
        """All by which it is served; answers give the first."""
        return [self.model_name, *self.llm.info.other_served_names]

    def token_names(self, *, as_ids: bool) -> TokenNames:
        """How answers write tokens."""
        if as_ids not in self._token_names:
            self._token_names[as_ids] = TokenNames(self.llm.tokenizer, as_ids)
        return self._token_names[as_ids]

    @property
    def body_facts(self) -> BodyFacts:
        """What large bodies are checked against."""
        tokenizer = self.llm.tokenizer
        most_chars = None if tokenizer is None else tokenizer.most_chars
        return BodyFacts(self.llm.info.worker, most_chars)

    @property
    def engine_view(self) -> EngineView | None:
        """How much of the engine may be looked at; None: nothing."""
        return self.settings.shown_view

    @property
    def feed(self) -> EngineFeed:
        """What the engine does, for all viewers of this process. Raises as `llm` does."""
        if self._feed is None:
            self._feed = EngineFeed(self.llm, view=self.engine_view or "counts")
        return self._feed

    def check_model(self, name: str | None) -> None:
        """None is the one model there is."""
        if name is not None and name not in (*self.model_names, self.llm.info.model):
            names = " and ".join(map(repr, self.model_names))
            raise ApiError(
                404,
                f"the model {name!r} does not exist: this server has {names}",
                param="model",
                code="model_not_found",
            )

    def health(self) -> Health:
        silent_s = time.monotonic() - self._heard_at
        is_silent = self.state == "ready" and silent_s > STALLED_AFTER_S
        stalled = is_silent and (self._llm is None or self._llm.is_stalled)
        health = Health("stalled" if stalled else self.state, since_progress_s=round(silent_s, 3))
        if self.state == "loading":
            health.phase, health.progress = self.phase, self.progress
        return health

    @contextlib.contextmanager
    def admission(self) -> Iterator[None]:
        """One request under way. Raises `ApiError` 429 if there are too many, 503 in a drain."""
        if self.state == "draining":
            raise ApiError(503, "the server shuts down and takes no more requests", code="draining")
        if self.num_requests >= self.settings.max_requests:
            raise ApiError(
                429, f"{self.num_requests} requests are under way: try again", code="overloaded"
            )
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1

    def begin(self, prompt: Prompt, params: SamplingParams, options: Options) -> RequestOutputs:
        """Check everything; the request starts when the result is iterated. `ValueError`."""
        llm = self.llm
        request = llm.prepare(prompt, params, options.request_id, **options.how)
        times = RequestTimes(self.metrics, self.model_name)
        outputs = Generation(llm, request, times, self._live, options.constrained_by)
        if self.tracing is None:
            return outputs
        return self.tracing.traced(outputs, request, self.model_name, options.headers)


class Callers:
    """What a key's name means to the engine: whom a request counts for, and whose prefixes it
    shares. `endpoint.generated` applies it to a body before anything is made of it.

    With one key, or none, all requests are one client's, who says himself who his users are.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._are_several = len(settings.keys()) > 1
        isolate = settings.isolate_cache
        self._isolate = self._are_several if isolate is None else isolate

    def apply(self, body: GenerationBody, caller: str) -> None:
        """caller: the name of the key. Its holder cannot choose another's tenant or salt."""
        if self._are_several:
            body.user = caller
        if self._isolate:
            body.cache_salt = f"{caller}\n{body.cache_salt or ''}"  # names hold no line ends


@dataclass(slots=True)
class Generation:
    """One request to the engine. Iterating starts it, leaving the iteration aborts it."""

    _llm: AsyncLLM
    _request: Request
    _times: "RequestTimes"
    _live: set[str]
    _constrained_by: str | None = None

    async def __aiter__(self) -> AsyncGenerator[RequestOutput, None]:
        """Raises `ApiError` if the request ends in a way that the client has not asked for."""
        request, output = self._request, None
        params, request_id = request.params, request.request_id
        if request_id in self._live:
            raise refused("request_id", "is in use: choose another, or wait for its answer")
        self._llm.submit(request)
        self._live.add(request_id)
        try:
            while output is None or not output.finished:
                output = await request.next_output()
                self._times.on_output(output, params)
                for completion in output.outputs:
                    if completion.finish_reason not in ANSWERED:
                        raise from_finish(str(completion.finish_reason))
                yield output
        except RequestFailedError as failure:
            if self._constrained_by is None or failure.cause != "grammar":
                raise
            # Schemas and grammars are compiled in the core: what is wrong with them comes back so.
            raise from_constraint(str(failure), self._constrained_by) from None
        finally:
            self._llm.discard(request)
            self._live.discard(request_id)


class RequestTimes:
    """Measures one request as its outputs come."""

    __slots__ = ("_inter_token", "_labels", "_last", "_metrics", "_started")

    def __init__(self, metrics: ServerMetrics, model: str) -> None:
        self._metrics = metrics
        self._labels = (model, "0")
        self._inter_token = metrics.inter_token(*self._labels)
        self._started = time.perf_counter()
        self._last: float | None = None

    def on_output(self, output: RequestOutput, params: SamplingParams) -> None:
        """In the order in which the client gets them."""
        now = time.perf_counter()
        if self._last is not None:
            self._inter_token.observe(now - self._last)
        elif params.output_kind == "delta":
            self._metrics.ttft(*self._labels).observe(now - self._started)
        self._last = now
        if output.finished:
            self._on_finish(output, params, now - self._started)

    def _on_finish(self, output: RequestOutput, params: SamplingParams, seconds: float) -> None:
        metrics, labels, times = self._metrics, self._labels, output.metrics
        if times.first_token_time is not None and times.finished_time is not None:
            if params.output_kind != "delta":
                first_s = times.first_token_time - times.arrival_time
                metrics.ttft(*labels).observe(max(0.0, first_s))
            num_later = times.num_generation_tokens // params.n - 1
            if num_later > 0:
                later_s = times.finished_time - times.first_token_time
                metrics.per_token(*labels).observe(max(0.0, later_s) / num_later)
        if times.queued_ms is not None:
            metrics.queue_time(*labels).observe(times.queued_ms / 1e3)
        metrics.latency(*labels).observe(seconds)
        metrics.prompt_tokens(*labels).observe(len(output.prompt_token_ids))
        metrics.generation_tokens(*labels).observe(times.num_generation_tokens)
        metrics.params_n(*labels).observe(params.n)
        if params.max_tokens is not None:
            metrics.params_max_tokens(*labels).observe(params.max_tokens)
        metrics.cached(*labels).inc(output.num_cached_tokens or 0)
        for completion in output.outputs:
            if completion.finish_reason is not None:
                metrics.success(*labels, completion.finish_reason).inc()


def read_template(file: str | None) -> str | None:
    """The text of a chat template's file, if one is named. `ValueError` if it cannot be read."""
    if file is None:
        return None
    try:
        return Path(file).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat_template: {file} cannot be read: {error}") from None


def require_tracing() -> "type[Tracing]":
    """`ValueError` if OpenTelemetry's packages are missing."""
    try:
        from nanovllm.frontend.server.tracing import Tracing
    except ImportError as error:
        raise ValueError(
            f"otlp_traces_endpoint: OpenTelemetry is not installed ({error}): "
            "pip install 'nanovllm[otel]'"
        ) from None
    return Tracing
