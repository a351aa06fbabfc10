"""Requests under way: what the core has sent is merged here until the caller asks for it.

`RequestTable.apply` takes every `Outputs` message, `Request.next_output` gives to the caller. There
is no queue in between: a slow caller finds one merged output, however much has come.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import InitVar, dataclass, field

from msgspec import structs

from nanovllm.frontend.detokenizer import Detokenizer, DetokenizerFactory, StopStrings
from nanovllm.frontend.outputs import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    TokenAlternatives,
)
from nanovllm.frontend.tokenizer import Tokenizer
from nanovllm.protocol.messages import AddRequest, Finished, FinishReason, Outputs
from nanovllm.protocol.plan import TokenLogprobs
from nanovllm.sampling_params import SamplingParams

# More than a core may have computed and not yet delivered: the steps under way, and a few on their
# way through sockets.
TRIAL_TOKENS = 8


@dataclass(slots=True, eq=False, repr=False)
class Completion:
    """One output sequence. `arrived` are tokens the core has sent that are not yet text."""

    request: "Request"
    index: int
    detokenizer: Detokenizer | None
    stops: StopStrings | None
    logprobs: list[TokenAlternatives] | None = None  # unless asked for, as the sum of them
    cumulative_logprob: float | None = None
    arrived: list[int] = field(default_factory=list)
    arrived_logprobs: list[TokenLogprobs] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    num_given: int = 0  # of token_ids, if output_kind is "delta"
    text: str = ""  # this and `logprobs`: not yet given out, if output_kind is "delta"
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    has_news: bool = False
    num_received_before: int = 0  # tokens, when it was last sent to a core
    deaths: list[str] = field(default_factory=list)  # epochs of cores that may have died of it
    num_failed_trials: int = 0  # of those, in how many it was alone on trial

    @classmethod
    def of(
        cls, request: "Request", index: int, detokenizers: DetokenizerFactory | None
    ) -> "Completion":
        """The output of that index of a request."""
        params, detokenizer, stops = request.params, None, None
        if detokenizers is not None and params.detokenize:
            prompt, skips = request.message.prompt_token_ids, params.skip_special_tokens
            detokenizer = detokenizers.make(prompt, skip_special_tokens=skips)
        if params.stop:
            stops = StopStrings(params.stop, include_in_output=params.include_stop_str_in_output)
        made = cls(request, index, detokenizer, stops)
        if params.logprobs is not None:
            made.logprobs, made.cumulative_logprob = [], 0.0
        return made

    @property
    def number(self) -> int:
        """The client's own id of it, as the core knows it."""
        return self.request.number + self.index

    @property
    def num_received(self) -> int:
        """Tokens the core has sent."""
        return len(self.token_ids) + len(self.arrived)

    @property
    def is_stuck(self) -> bool:
        """Whether it has got nowhere since it was last sent to a core."""
        return self.finish_reason is None and self.num_received == self.num_received_before

    @property
    def has_passed(self) -> bool:
        """Whether it is beyond where it was when a core died, and what that may have swallowed."""
        gained = self.num_received - self.num_received_before
        return self.finish_reason is not None or gained >= TRIAL_TOKENS

    def acquit(self) -> None:
        """No core has died of it."""
        self.deaths, self.num_failed_trials = [], 0

    @property
    def last_token_id(self) -> int:
        """Of those that the core has sent, of which there is one at least."""
        return (self.arrived or self.token_ids)[-1]

    def received_token_ids(self) -> list[int]:
        """All that the core has sent."""
        return self.token_ids + self.arrived

    def advance(self, end: Finished | None) -> bool:
        """Turn what has arrived into text. True if a stop string ended it before the core did."""
        arrived, self.arrived = self.arrived, []
        stopped = False
        if self.detokenizer is not None:
            # The token that ended it is not text, be it EOS or one of stop_token_ids.
            cut = end is not None and end.reason == "stop" and not end.last_is_text
            cut = cut and not self.request.params.include_stop_str_in_output
            text_ids = arrived[:-1] if cut else arrived
            if self.stops is None:
                self.text += self.detokenizer.feed(text_ids)
            else:
                num_used = self._feed_until_stop(self.detokenizer, self.stops, text_ids)
                stopped = self.finish_reason is not None
                if stopped:
                    del arrived[num_used:]
        self.token_ids += arrived
        if self.logprobs is not None:
            self.take_logprobs(len(arrived))
        if end is not None and not stopped:
            self.finish_reason, self.stop_reason = end.reason, end.stop_reason
            if self.detokenizer is not None:
                self._flush_text(self.detokenizer)
        self.has_news = True
        return stopped and end is None

    def take(self) -> CompletionOutput:
        """What the caller gets now."""
        output = CompletionOutput(
            self.index,
            self.text,
            self.token_ids[self.num_given :],
            self.cumulative_logprob,
            None if self.logprobs is None else self.logprobs.copy(),
            self.finish_reason,
            self.stop_reason,
        )
        if self.request.gives_deltas:
            self.text = ""
            self.num_given = len(self.token_ids)
            if self.logprobs is not None:
                self.logprobs.clear()
        self.has_news = False
        return output

    def _feed_until_stop(
        self, detokenizer: Detokenizer, stops: StopStrings, token_ids: list[int]
    ) -> int:
        """One token at a time, so that tokens after a match are known. Returns how many it took."""
        min_tokens = self.request.params.min_tokens
        for index, token_id in enumerate(token_ids):
            look = len(self.token_ids) + index >= min_tokens
            text, stop = stops.feed(detokenizer.feed((token_id,)), look=look)
            self.text += text
            if stop is not None:
                self.finish_reason, self.stop_reason = "stop", stop
                return index + 1
        return len(token_ids)

    def _flush_text(self, detokenizer: Detokenizer) -> None:
        """The end: what was held back is text after all. (A stop string cannot appear here: only
        U+FFFD is new.)"""
        text = detokenizer.flush()
        if self.stops is not None:
            text = self.stops.feed(text, look=False)[0] + self.stops.flush()
        self.text += text

    def take_logprobs(self, num_tokens: int | None = None) -> None:
        """Those that have arrived, of the first `num_tokens`; the others are of no token."""
        assert self.logprobs is not None and self.cumulative_logprob is not None
        arrived, self.arrived_logprobs = self.arrived_logprobs[:num_tokens], []
        for logprobs in arrived:
            self.logprobs.append(alternatives(logprobs, self.request.tokenizer))
            self.cumulative_logprob += logprobs.logprob


@dataclass(slots=True, eq=False, repr=False)
class Request:
    """One call of `generate`, with its `n` completions, numbered from `number` on."""

    request_id: str
    prompt: str | None  # as text, if it was one
    message: AddRequest
    detokenizers: InitVar[DetokenizerFactory | None]  # None if outputs are token ids only
    params: SamplingParams = field(init=False)
    number: int = field(init=False)
    numbers: range = field(init=False)
    tokenizer: Tokenizer | None = field(init=False)
    metrics: RequestMetrics = field(init=False)
    made_at: float = field(init=False)
    num_cached_tokens: int | None = None
    prompt_logprobs: list[TokenAlternatives | None] | None = None
    final_only: bool = field(init=False)
    gives_deltas: bool = field(init=False)
    completions: list[Completion] = field(init=False)
    num_unfinished: int = field(init=False)
    epoch: str = ""  # of the core that it was last sent to
    is_aborted: bool = False  # asked of the core, which may not have answered yet
    _error: Exception | None = None
    _has_news: bool = False
    _waiter: asyncio.Future[None] | None = None  # there is one reader at most

    def __post_init__(self, detokenizers: DetokenizerFactory | None) -> None:
        self.params = params = self.message.params
        self.number = self.message.number
        self.numbers = range(self.number, self.number + params.n)
        self.tokenizer = None if detokenizers is None else detokenizers.tokenizer
        self.metrics = RequestMetrics(arrival_time=time.time())
        self.made_at = time.monotonic()
        self.forget_prompt_logprobs()
        self.final_only = params.output_kind == "final_only"
        self.gives_deltas = params.output_kind == "delta"
        self.completions = [Completion.of(self, one, detokenizers) for one in range(params.n)]
        self.num_unfinished = params.n

    @property
    def has_begun(self) -> bool:
        """Whether the core has said anything of it."""
        return self.num_cached_tokens is not None

    @property
    def is_suspect(self) -> bool:
        """Whether a core may have died of it."""
        return any(one.deaths for one in self.completions)

    @property
    def is_stuck(self) -> bool:
        """Whether one of its outputs has got nowhere since it was last sent to a core."""
        return any(one.is_stuck for one in self.completions)

    def note_sent(self, epoch: str) -> None:
        """All that is unfinished goes to this life of the core."""
        self.epoch = epoch
        for one in self.completions:
            one.num_received_before = one.num_received

    def fail(self, error: Exception) -> None:
        """Make the caller's next (or present) `next_output` raise `error`."""
        self._error = error
        self._wake()

    def forget_unfinished_prompt_logprobs(self) -> None:
        """The core will send them again, all of them, unless it had when the first token came."""
        if self.completions[0].num_received == 0:
            self.forget_prompt_logprobs()

    def forget_prompt_logprobs(self) -> None:
        """None of them has come; the first token has none."""
        self.prompt_logprobs = None if self.params.prompt_logprobs is None else [None]

    def announce(self) -> None:
        """Wake the caller, if it is waiting for something like this."""
        if not self.final_only or self.num_unfinished == 0:
            self._wake()

    async def next_output(self) -> RequestOutput:
        """All that has come since the last call; waits until something has.

        Raises what the request was failed with.
        """
        if not self._has_news:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None:
            raise self._error
        self._has_news = False
        # With thousands of these a second, what follows is most of what a frontend does.
        given = []
        for one in self.completions:
            if one.has_news or not self.gives_deltas:
                given.append(one.take())
        output = RequestOutput(
            self.request_id,
            self.prompt,
            self.message.prompt_token_ids,
            given,
            self.num_unfinished == 0,
            structs.replace(self.metrics),
            self.prompt_logprobs,
            self.num_cached_tokens,
        )
        if self.gives_deltas:
            self.prompt_logprobs = None
        return output

    def _wake(self) -> None:
        self._has_news = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class RequestTable:
    """The live requests of one client, by id, and their completions, by number."""

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}
        self._completions: dict[int, Completion] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._requests.values()))

    def add(self, request: Request) -> None:
        self._requests[request.request_id] = request
        for number, completion in zip(request.numbers, request.completions, strict=True):
            self._completions[number] = completion

    def find(self, request_id: str) -> Request | None:
        return self._requests.get(request_id)

    def owner_of(self, number: int) -> Request | None:
        completion = self._completions.get(number)
        return None if completion is None else completion.request

    def completion(self, number: int) -> Completion | None:
        return self._completions.get(number)

    def remove(self, request: Request) -> list[int]:
        """Forget a request. Returns the numbers that the core may still be working on."""
        self._requests.pop(request.request_id, None)
        return [n for n in request.numbers if self._completions.pop(n, None) is not None]

    def apply(self, outputs: Outputs) -> list[int]:
        """Take in a message from the core; returns the numbers that stop strings have ended."""
        self._apply_starts(outputs)
        if outputs.prompt_logprobs:
            self._apply_prompt_logprobs(outputs)
        completions = self._completions
        touched: dict[int, Completion] = {}
        for index, number in enumerate(outputs.numbers):
            completion = completions.get(number)
            if completion is None:
                continue  # ended here, which the core did not know yet
            touched[number] = completion
            completion.arrived.append(outputs.token_ids[index])
            if outputs.logprobs and index in outputs.logprobs:
                completion.arrived_logprobs.append(outputs.logprobs[index])
        ends: dict[int, Finished] = {}
        for end in outputs.finished:
            completion = completions.get(end.number)
            if completion is not None:
                ends[end.number] = end
                touched[end.number] = completion
        if outputs.logprobs:  # which take long to write: no other stream waits for them
            touched = dict(sorted(touched.items(), key=lambda item: item[1].logprobs is not None))
        return self._advance(touched, ends)

    def _apply_starts(self, outputs: Outputs) -> None:
        for started in outputs.started:
            request = self.owner_of(started.number)
            # One that was resumed starts again, with its own output in the cache: not news.
            if request is not None and started.number == request.number and not request.has_begun:
                request.num_cached_tokens = started.num_cached_tokens
                request.metrics.queued_ms = started.queued_ms

    def _apply_prompt_logprobs(self, outputs: Outputs) -> None:
        for some in outputs.prompt_logprobs:
            if (request := self.owner_of(some.number)) is not None:
                request.prompt_logprobs = request.prompt_logprobs or [None]
                request.prompt_logprobs += [
                    alternatives(logprobs, request.tokenizer) for logprobs in some.logprobs
                ]

    def _advance(self, touched: dict[int, Completion], ends: dict[int, Finished]) -> list[int]:
        stopped: list[int] = []
        now = time.time()
        for number, completion in touched.items():
            request = completion.request
            metrics = request.metrics
            end = ends.get(number) if ends else None
            if metrics.first_token_time is None and completion.arrived:
                metrics.first_token_time = now
            if end is None and request.final_only and completion.stops is None:
                if completion.logprobs is not None:
                    completion.take_logprobs()  # a text can wait for the end; these take longer
                continue
            num_tokens = len(completion.token_ids)
            if completion.advance(end):
                stopped.append(number)
            metrics.num_generation_tokens += len(completion.token_ids) - num_tokens
            if completion.finish_reason is not None:
                self._finish(completion, end, now)
            request.announce()
        return stopped

    def _finish(self, completion: Completion, end: Finished | None, now: float) -> None:
        request = completion.request
        del self._completions[request.number + completion.index]
        request.num_unfinished -= 1
        if end is not None:
            request.metrics.num_preemptions += end.num_preemptions
        if end is not None and end.why is not None:
            request.metrics.num_recomputed_tokens += end.why.num_recomputed_tokens
            request.metrics.num_forced_tokens += end.why.num_forced_tokens
            request.metrics.why = {**request.metrics.why, completion.index: end.why}
        if request.num_unfinished == 0:
            request.metrics.finished_time = now
            del self._requests[request.request_id]


def alternatives(logprobs: TokenLogprobs, tokenizer: Tokenizer | None) -> TokenAlternatives:
    """The token itself first, then the most probable ones in order."""
    token_id, text = logprobs.token_id, None if tokenizer is None else tokenizer.token_text
    found = {
        token_id: Logprob(logprobs.logprob, logprobs.rank, None if text is None else text(token_id))
    }
    likeliest = zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
    for rank, (top_id, logprob) in enumerate(likeliest, 1):
        if top_id != token_id:
            found[top_id] = Logprob(logprob, rank, None if text is None else text(top_id))
    return found
