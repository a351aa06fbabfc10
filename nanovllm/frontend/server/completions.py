"""POST /v1/completions: plain prompts, in batches if wanted.

A request of several prompts is several requests to the engine; choice i of prompt p has the index
p * n + i. Events of all of them share one stream. What is wrong with one prompt of several is told
in its choices, and the others are answered.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.frontend.outputs import CompletionOutput, RequestOutput
from nanovllm.frontend.server.api_errors import ApiError
from nanovllm.frontend.server.bodies import CompletionBody, StreamOptions, blaming
from nanovllm.frontend.server.endpoint import (
    AlikeEvents,
    encode,
    event,
    generated,
    last_of,
    most_tokens,
    options_of,
    usage_of,
)
from nanovllm.frontend.server.logprobs import (
    TextOffsets,
    TokenEntry,
    TokenNames,
    completion_logprobs,
    prompt_entries,
    prompt_logprobs,
)
from nanovllm.frontend.server.prompts import text_prompts, truncated
from nanovllm.frontend.server.replies import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReasonName,
    Usage,
)
from nanovllm.frontend.server.sampling import completion_params, constraint_of
from nanovllm.frontend.server.serving import RequestOutputs, Serving


async def completions(request: Request) -> Response:
    """Continue texts or token ids."""
    return await generated(request, CompletionBody, _prepare)


async def _prepare(
    serving: Serving, body: CompletionBody, headers: Mapping[str, str]
) -> "CompletionAnswer":
    """Everything that can be wrong with a request is found here."""
    constraint = constraint_of(body)
    params = completion_params(body, constraint, serving.llm.info.worker.sampling_defaults)
    tokenizer = serving.llm.tokenizer
    options = options_of(body, "cmpl", headers, constraint)
    texts: list[str | None] = []
    generations: dict[int, RequestOutputs] = {}
    refusals: dict[int, ApiError] = {}
    most = most_tokens(serving, body)
    for index, prompt in enumerate(await text_prompts(tokenizer, body, most)):
        own = options._replace(request_id=f"{options.request_id}-{index}")
        try:
            with blaming(body):
                if isinstance(prompt, ApiError):
                    raise prompt
                made = truncated(prompt, body.truncate_prompt_tokens)
                generations[index] = serving.begin(made, params, own)
                texts.append(made.text)
        except ApiError as refusal:
            refusals[index] = refusal
            texts.append(None)
    if not generations:
        raise refusals[0]
    names = serving.token_names(as_ids=bool(body.return_tokens_as_token_ids))
    return CompletionAnswer(
        *(options.request_id, serving.model_name, body, texts, names), generations, refusals
    )


@dataclass(slots=True)
class ChoiceState:
    """One choice under way. text_end: characters sent; alike: events of more of its text, if there
    is nothing else in them."""

    text_end: int = 0
    alike: AlikeEvents | None = None
    offsets: TextOffsets | None = None


@dataclass(slots=True)
class CompletionAnswer:
    """One request's answer, as a whole or as events. texts: of the prompts, if they were texts.
    generations, refusals: by the prompts' index; one or the other. choices: that have begun."""

    request_id: str
    model: str
    body: CompletionBody
    texts: list[str | None]
    names: TokenNames
    generations: dict[int, RequestOutputs]
    refusals: dict[int, ApiError]
    created: int = field(default_factory=lambda: int(time.time()))
    choices: dict[int, ChoiceState] = field(default_factory=dict)

    async def whole(self) -> Completion:
        finals = await _gather([*self.generations.values()])
        choices = [
            self._choice(prompt_index, output, completion)
            for prompt_index, output in zip(self.generations, finals, strict=True)
            for completion in output.outputs
        ]
        choices += self._refused_choices()
        choices.sort(key=lambda choice: choice.index)
        return self._completion(choices, self._usage(finals))

    def _refused_choices(self) -> list[CompletionChoice]:
        n = self.body.n or 1
        return [
            CompletionChoice(prompt_index * n + index, "", None, "error", error=refusal.details)
            for prompt_index, refusal in self.refusals.items()
            for index in range(n)
        ]

    async def events(self) -> AsyncGenerator[bytes, None]:
        options = self.body.stream_options or StreamOptions()
        usage: Usage | UnsetType | None = None if options.include_usage else UNSET
        latest: dict[int, RequestOutput] = {}
        waiting = [event(self._completion([one], usage)) for one in self._refused_choices()]
        indices = list(self.generations)
        async with contextlib.aclosing(_merged([*self.generations.values()])) as outputs:
            async for place, output in outputs:
                latest[place] = output
                if options.continuous_usage_stats:
                    usage = self._usage(latest.values())
                events = waiting + [
                    self._event(indices[place], output, completion, usage)
                    for completion in output.outputs
                ]
                waiting = []
                if events:
                    yield b"".join(events)
        if options.include_usage:
            yield event(self._completion([], self._usage(latest.values())))

    def _event(
        self,
        prompt_index: int,
        output: RequestOutput,
        completion: CompletionOutput,
        usage: Usage | UnsetType | None,
    ) -> bytes:
        index = prompt_index * (self.body.n or 1) + completion.index
        state = self.choices.get(index)
        if completion.finish_reason is None and state is not None and state.alike is not None:
            return state.alike.of(encode(completion.text))
        choice = self._choice(prompt_index, output, completion)
        body = self.body
        rich = body.logprobs is not None or body.return_token_ids or body.max_tokens == 0
        if not rich and not isinstance(usage, Usage):
            plain = CompletionChoice(index, "", None, None)
            alike = AlikeEvents(self._completion([plain], usage), b'"text":""')
            self.choices[index].alike = alike
        return event(self._completion([choice], usage))

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None
    ) -> Completion:
        return Completion(self.request_id, self.created, self.model, choices, usage=usage)

    def _choice(
        self, prompt_index: int, output: RequestOutput, completion: CompletionOutput
    ) -> CompletionChoice:
        """One choice, or, in a stream, what is new of it."""
        index = prompt_index * (self.body.n or 1) + completion.index
        first = index not in self.choices
        state = self.choices.setdefault(index, ChoiceState())
        shown = completion if self.body.max_tokens != 0 else _unshown(completion)
        echoed = self._prompt_text(prompt_index, output) if self.body.echo and first else ""
        state.text_end += len(echoed) + len(shown.text)
        choice = CompletionChoice(
            index=index,
            text=echoed + shown.text,
            logprobs=self._logprobs(output, shown, state, echoed),
            finish_reason=_finish_reason(shown),
            stop_reason=shown.stop_reason,
        )
        if self.body.return_token_ids:
            choice.token_ids = shown.token_ids
            if first:
                choice.prompt_token_ids = output.prompt_token_ids
        if self.body.prompt_logprobs is not None and output.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
        return choice

    def _prompt_text(self, prompt_index: int, output: RequestOutput) -> str:
        text, tokenizer = self.texts[prompt_index], self.names.tokenizer
        if text is None and tokenizer is not None:
            return tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
        return text or ""

    def _logprobs(
        self, output: RequestOutput, shown: CompletionOutput, state: ChoiceState, echoed: str
    ) -> CompletionLogprobs | None:
        """With echo those of the prompt come first."""
        if self.body.logprobs is None or shown.logprobs is None:
            return None
        entries: list[TokenEntry] = []
        if state.offsets is None:
            skip = self.body.skip_special_tokens is not False
            state.offsets = self.names.text_offsets(
                len(echoed), output.prompt_token_ids, skip_special_tokens=skip
            )
            if self.body.echo and output.prompt_logprobs is not None:
                entries = prompt_entries(output, echoed, self.names.tokenizer)
        new = state.offsets.entries(shown.token_ids, shown.logprobs)
        last = shown.finish_reason is not None
        entries += state.offsets.shown(new, state.text_end, last=last)
        return completion_logprobs(entries, self.names)

    def _usage(self, outputs: Iterable[RequestOutput]) -> Usage:
        usage = usage_of(outputs)
        if self.body.max_tokens == 0:
            usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens
        return usage


def _unshown(completion: CompletionOutput) -> CompletionOutput:
    """max_tokens 0: the prompt was to be scored, and nothing to be generated."""
    return msgspec.structs.replace(
        completion,
        text="",
        token_ids=[],
        logprobs=None if completion.logprobs is None else [],
        finish_reason=completion.finish_reason and "length",
        stop_reason=None,
    )


def _finish_reason(completion: CompletionOutput) -> FinishReasonName | None:
    reason = completion.finish_reason
    assert reason in (None, "stop", "length")
    return reason


async def _gather(generations: Sequence[RequestOutputs]) -> list[RequestOutput]:
    """The last outputs of all; the first failure ends the others."""
    if len(generations) == 1:
        return [await last_of(generations[0])]
    tasks = [asyncio.ensure_future(last_of(generation)) for generation in generations]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


async def _merged(
    generations: Sequence[RequestOutputs],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Outputs of all, each with its index, as they come. The first failure ends all.

    A reader that lags finds merged outputs: each generation waits until its last one was taken.
    """
    if len(generations) == 1:
        async for output in generations[0]:
            yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue(maxsize=1)

    async def pump(index: int, generation: RequestOutputs) -> None:
        try:
            async for output in generation:
                await queue.put((index, output))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.ensure_future(pump(i, one)) for i, one in enumerate(generations)]
    num_running = len(tasks)
    try:
        while num_running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item
    finally:
        await _cancel(tasks)


async def _cancel(tasks: Sequence["asyncio.Task[Any]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
