"""POST /v1/chat/completions.

The whole path of a chat request over HTTP: body → prompt and parameters → `RequestOutputs` →
message or events. Words, reasoning and tool calls are told apart by `reply_format.ReplyParser`.
"""

import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.frontend.outputs import CompletionOutput, RequestOutput
from nanovllm.frontend.server.api_errors import refused
from nanovllm.frontend.server.bodies import ChatBody, StreamOptions
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
from nanovllm.frontend.server.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from nanovllm.frontend.server.prompts import chat_prompt, truncated
from nanovllm.frontend.server.reasoning import CLOSE
from nanovllm.frontend.server.replies import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    Delta,
    FinishReasonName,
    Function,
    FunctionDelta,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from nanovllm.frontend.server.reply_format import ReplyFormat, ReplyParser
from nanovllm.frontend.server.sampling import chat_params, constraint_of
from nanovllm.frontend.server.serving import RequestOutputs, Serving
from nanovllm.frontend.server.tool_parsers.pieces import (
    CallArguments,
    CallBegin,
    Content,
    Piece,
    Reasoning,
)

decode_entries = msgspec.json.Decoder(list[TokenLogprob]).decode
MaybeUsage = Usage | UnsetType | None
# By what an event brings: where its text stands in it.
TEXT_FIELDS = {Content: b"content", Reasoning: b"reasoning_content", CallArguments: b"arguments"}


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    return await generated(request, ChatBody, _prepare)


async def _prepare(serving: Serving, body: ChatBody, headers: Mapping[str, str]) -> "ChatAnswer":
    """Everything that can be wrong with a request is found here."""
    tokenizer = serving.llm.tokenizer
    if tokenizer is None:
        raise refused("messages", "text needs a tokenizer, and there is none")
    if body.tools and serving.reply_format.tools is None and body.tool_choice in (None, "auto"):
        raise refused("tools", "unknown how this model writes calls: set --tool-call-parser")
    prompt = await chat_prompt(tokenizer, body, most_tokens(serving, body))
    form = serving.reply_format
    thinks_first = form.has_reasoning and form.thinks_first(prompt.text or "")
    constraint = constraint_of(body, after=CLOSE if thinks_first else None)
    params = chat_params(body, constraint, serving.llm.info.worker.sampling_defaults)
    parsers: list[ReplyParser | None] = [None] * params.n
    if body.tools or form.has_reasoning:
        parsers = [form.make_parser(body, thinks_first=thinks_first) for _ in parsers]
    if form.keeps_special_tokens and parsers[0] is not None:
        params = msgspec.structs.replace(params, skip_special_tokens=False)
    options = options_of(body, "chatcmpl", headers, constraint)
    outputs = serving.begin(truncated(prompt, body.truncate_prompt_tokens), params, options)
    names = serving.token_names(as_ids=bool(body.return_tokens_as_token_ids))
    choices = [ChoiceState(index, parser) for index, parser in enumerate(parsers)]
    return ChatAnswer(options.request_id, serving.model_name, body, outputs, choices, form, names)


@dataclass(slots=True)
class ChoiceState:
    """One choice under way. call_ids: of the calls begun so far; alike: events that differ in their
    text, by what it is; plain: those, if there are no others."""

    index: int
    parser: ReplyParser | None
    begun: bool = False
    call_ids: list[str] = field(default_factory=list)
    alike: dict[type[Piece], AlikeEvents] = field(default_factory=dict)
    plain: AlikeEvents | None = None


@dataclass(slots=True)
class ChatAnswer:
    """One request's answer, as a whole or as events."""

    request_id: str
    model: str
    body: ChatBody
    outputs: RequestOutputs
    choices: list[ChoiceState]
    form: ReplyFormat
    names: TokenNames
    created: int = field(default_factory=lambda: int(time.time()))

    # ---- whole

    async def whole(self) -> ChatCompletion:
        last = await last_of(self.outputs)
        prompt_ids, prompt_lps = last.prompt_token_ids, last.prompt_logprobs
        return ChatCompletion(
            id=self.request_id,
            created=self.created,
            model=self.model,
            choices=[self._choice(completion) for completion in last.outputs],
            usage=usage_of([last]),
            prompt_token_ids=prompt_ids if self.body.return_token_ids else UNSET,
            prompt_logprobs=UNSET if prompt_lps is None else prompt_logprobs(prompt_lps),
        )

    def _choice(self, completion: CompletionOutput) -> ChatChoice:
        state = self.choices[completion.index]
        message = AssistantMessage(content=completion.text)
        if state.parser is not None:
            pieces = state.parser.feed(completion.text) + state.parser.finish()
            message = self._message(state, pieces)
        return ChatChoice(
            index=completion.index,
            message=message,
            logprobs=self._logprobs(completion),
            finish_reason=_finish_reason(state, completion),
            stop_reason=completion.stop_reason,
            token_ids=self._token_ids(completion),
        )

    def _message(self, state: ChoiceState, pieces: list[Piece]) -> AssistantMessage:
        content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
        calls: list[ToolCall] = []
        for piece in pieces:
            if isinstance(piece, CallBegin):
                state.call_ids.append(self.form.new_call_id())
                calls.append(ToolCall(state.call_ids[-1], Function(piece.name, "")))
            elif isinstance(piece, CallArguments):
                calls[-1].function.arguments += piece.text
        return AssistantMessage(
            content=None if calls and not content else content,
            reasoning_content=reasoning or UNSET,
            tool_calls=calls or UNSET,
        )

    # ---- as events

    async def events(self) -> AsyncGenerator[bytes, None]:
        options = self.body.stream_options or StreamOptions()
        usage: MaybeUsage = None if options.include_usage else UNSET
        last: RequestOutput | None = None
        async for output in self.outputs:
            last = output
            if options.continuous_usage_stats:
                usage = usage_of([output])
            if events := b"".join(self._events_of(one, usage, output) for one in output.outputs):
                yield events
        if options.include_usage:
            common = self.request_id, self.created, self.model
            yield event(ChatCompletionChunk(*common, [], usage=usage_of([last])))

    def _events_of(
        self, completion: CompletionOutput, usage: MaybeUsage, output: RequestOutput
    ) -> bytes:
        state, is_last = self.choices[completion.index], completion.finish_reason is not None
        if state.plain is not None and not is_last:
            return state.plain.of(encode(completion.text))
        odd = self.body.return_token_ids or isinstance(usage, Usage)
        odd = odd or not state.begun or is_last
        if odd or (self.body.logprobs and state.parser is not None):
            choices = self._deltas(completion)
            return b"".join(event(self._chunk(choice, usage, output)) for choice in choices)
        if state.parser is not None:
            pieces = state.parser.feed(completion.text) if completion.text else []
            return b"".join(self._alike(state, piece, usage, output) for piece in pieces)
        logprobs = self._encoded_logprobs(completion)
        return self._alike(state, Content(completion.text), usage, output, logprobs)

    def _alike(
        self,
        state: ChoiceState,
        piece: Piece,
        usage: MaybeUsage,
        output: RequestOutput,
        logprobs: bytes | None = None,
    ) -> bytes:
        """The event of a piece; those of a kind are encoded around their values."""
        if isinstance(piece, CallBegin):
            choice = ChatChunkChoice(state.index, self._delta(state, piece))
            return event(self._chunk(choice, usage, output))
        alike = state.alike.get(type(piece))
        if alike is None:
            choice = ChatChunkChoice(state.index, self._delta(state, piece._replace(text="")))
            empty = [b'"%b":""' % TEXT_FIELDS[type(piece)]]
            if logprobs is not None:
                choice.logprobs = ChatLogprobs([])
                empty.append(b'"content":[]')
            alike = AlikeEvents(self._chunk(choice, usage, output), *empty)
            state.alike[type(piece)] = alike
            state.plain = alike if state.parser is None and logprobs is None else None
        text = encode(piece.text)
        return alike.of(text) if logprobs is None else alike.of(text, logprobs)

    def _chunk(
        self, choice: ChatChunkChoice, usage: MaybeUsage, output: RequestOutput
    ) -> ChatCompletionChunk:
        common = self.request_id, self.created, self.model
        chunk = ChatCompletionChunk(*common, [choice], usage=usage)
        if self.body.return_token_ids and choice.delta.role is not UNSET:
            chunk.prompt_token_ids = output.prompt_token_ids
        return chunk

    def _deltas(self, completion: CompletionOutput) -> list[ChatChunkChoice]:
        """What is new of one choice; log-probabilities and token ids go with the first of it."""
        state, finished = self.choices[completion.index], completion.finish_reason is not None
        deltas: list[Delta] = []
        if not state.begun:
            state.begun = True
            deltas.append(Delta(role="assistant", content=""))
        if state.parser is not None:
            deltas += self._parsed(state, state.parser, completion)
        elif completion.text or not (finished or deltas):
            deltas.append(Delta(content=completion.text))
        choices = [ChatChunkChoice(completion.index, delta) for delta in deltas]
        if finished:
            last = ChatChunkChoice(completion.index, Delta())
            last.finish_reason = _finish_reason(state, completion)
            last.stop_reason = completion.stop_reason
            choices.append(last)
        if completion.token_ids and (self.body.return_token_ids or self.body.logprobs):
            self._add_tokens(choices, completion)
        return choices

    def _add_tokens(self, choices: list[ChatChunkChoice], completion: CompletionOutput) -> None:
        if not choices:
            choices.append(ChatChunkChoice(completion.index, Delta()))
        first = choices[1 if len(choices) > 1 and choices[0].delta.role is not UNSET else 0]
        first.logprobs = self._logprobs(completion)
        first.token_ids = self._token_ids(completion)

    def _parsed(
        self, state: ChoiceState, parser: ReplyParser, completion: CompletionOutput
    ) -> list[Delta]:
        pieces = parser.feed(completion.text) if completion.text else []
        if completion.finish_reason is not None:
            pieces += parser.finish()
        return [self._delta(state, piece) for piece in pieces]

    def _delta(self, state: ChoiceState, piece: Piece) -> Delta:
        match piece:
            case Content(text):
                return Delta(content=text)
            case Reasoning(text):
                return Delta(reasoning_content=text)
            case CallBegin(name):
                state.alike.pop(CallArguments, None)  # which would be those of the call before
                state.call_ids.append(self.form.new_call_id())
                function = FunctionDelta(name, "")
                index, call_id = len(state.call_ids) - 1, state.call_ids[-1]
                return Delta(tool_calls=[ToolCallDelta(index, function, call_id, "function")])
            case CallArguments(text):
                function = FunctionDelta(arguments=text)
                return Delta(tool_calls=[ToolCallDelta(len(state.call_ids) - 1, function)])

    # ---- both

    def _encoded_logprobs(self, completion: CompletionOutput) -> bytes | None:
        if completion.logprobs is None:
            return None
        return chat_logprobs(completion.logprobs, self.body.top_logprobs or 0, self.names)

    def _logprobs(self, completion: CompletionOutput) -> ChatLogprobs | None:
        encoded = self._encoded_logprobs(completion)
        return None if encoded is None else ChatLogprobs(decode_entries(encoded))

    def _token_ids(self, completion: CompletionOutput) -> Any:
        return completion.token_ids if self.body.return_token_ids else UNSET


def _finish_reason(state: ChoiceState, completion: CompletionOutput) -> FinishReasonName:
    reason = completion.finish_reason
    if reason == "stop" and state.call_ids:
        return "tool_calls"
    assert reason in ("stop", "length")
    return reason
