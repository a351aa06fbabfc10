"""The asynchronous engine: encode, send, stream.

What servers and `LLM` are built on. Owns the tokenizer, the session with the core (live requests
and line) and, unless it was attached with `connect`, the core process itself.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Unpack

from nanovllm.checkpoint.locate import locate
from nanovllm.config import EngineConfig, section_of
from nanovllm.frontend.chat_template import Message
from nanovllm.frontend.core_life import CONNECT_TIMEOUT_S, ProgressCallback
from nanovllm.frontend.core_process import CoreHandle, start_cores
from nanovllm.frontend.detokenizer import DetokenizerFactory
from nanovllm.frontend.inputs import (
    OPTION_NAMES,
    Prompt,
    PromptInput,
    RequestOptions,
    check_call,
    check_choice,
    checked_messages,
    encode_bad_words,
    make_prompt,
)
from nanovllm.frontend.outputs import RequestOutput
from nanovllm.frontend.replicas import SEPARATOR, Lines, Replicas
from nanovllm.frontend.request import Request
from nanovllm.frontend.session import Session
from nanovllm.frontend.supervisor import Supervisor
from nanovllm.frontend.tokenizer import Tokenizer
from nanovllm.keys import ClientKeys
from nanovllm.keywords import EngineKeywords, SupervisionKeywords
from nanovllm.protocol.messages import AddRequest, CoreStatus, ResetPrefixCache, SetPace, Welcome
from nanovllm.protocol.watch import BlockContents, Observation, Observe, ShowBlock
from nanovllm.sampling_params import SamplingParams

NUM_BAD_WORDS_KEPT = 8
NO_STOPS = "stop strings need a tokenizer, and none is loaded: use stop_token_ids instead"


class AsyncLLM:
    """An engine with a core of its own, between `start` and `close` (or in an `async with`).

    Keywords are the fields of `EngineConfig`; `ValueError` if one is unknown or out of range.
    on_progress(phase, fraction) is called while the model is fetched and loaded.
    """

    def __init__(
        self,
        model: str = "smollm2",
        *,
        on_progress: ProgressCallback | None = None,
        **config_fields: Unpack[EngineKeywords],
    ) -> None:
        self.config = EngineConfig.from_kwargs(model=model, **config_fields)
        self._on_progress = on_progress
        self._handles: list[CoreHandle] = []
        self._session: Session | Replicas | None = None
        self._tokenizer: Tokenizer | None = None
        self._why_no_tokenizer = "skip_tokenizer_init is set"
        self._detokenizers: DetokenizerFactory | None = None
        self._next_number = 0
        self._seeds = random.Random(self.config.model.seed)
        # Several prompts often share their parameters, and a long list takes a while.
        self.encode_bad_words = lru_cache(NUM_BAD_WORDS_KEPT)(self._encode_bad_words)

    # ---- life

    @classmethod
    async def connect(
        cls,
        address: str,
        *,
        tokenizer: str | Tokenizer | None = None,
        skip_tokenizer_init: bool = False,
        on_progress: ProgressCallback | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        keys: str | Path | None = None,
        **supervision: Unpack[SupervisionKeywords],
    ) -> "AsyncLLM":
        """Attach to a running core; any number of frontends may. `close` leaves it running.

        address: or several with commas, of cores that run the same model: each request goes to one.
        tokenizer: by default that of the core's model, if it can be had on this machine; without
        one, only token ids can be sent. connect_timeout_s: for somebody to answer at the address;
        a core that still loads is waited for. keys: the file that `nanovllm keys new` made for this
        client, if the core wants one. supervision: fields of `SupervisionConfig`, such as
        on_core_death. Raises `EngineDeadError`, `ValueError`.
        """
        for name in supervision:
            if section_of(name) != "supervision":
                raise ValueError(f"{name}: the core at {address} has settings of its own: omit it")
        llm = cls(skip_tokenizer_init=skip_tokenizer_init, on_progress=on_progress, **supervision)
        llm._seeds = random.Random()  # not the core's: its other clients draw seeds as well
        try:
            pair = None if keys is None else ClientKeys.load(keys)
            welcome = await llm._greet(
                address.split(SEPARATOR), connect_timeout_s=connect_timeout_s, keys=pair
            )
            if tokenizer is not None:
                await llm._load_tokenizer(tokenizer)
            elif not skip_tokenizer_init:
                await llm._try_tokenizer(welcome.model)
        except BaseException:
            await llm.close()
            raise
        return llm

    async def start(self) -> None:
        """Start the core and load the tokenizer beside it.

        Raises `ValueError` if the configuration cannot work, `EngineDeadError` if the core dies.
        """
        if self._session is not None:
            raise RuntimeError("this engine has been started before: make a new one")
        model = self.config.model
        has_own = model.tokenizer is not None or model.load_format != "synthetic"
        tokenizer = model.tokenizer_source if has_own else None
        try:
            if model.load_format not in ("dummy", "synthetic"):
                # Fetch it here, where the user sees the progress.
                await asyncio.to_thread(locate, model.source, on_progress=self._thread_progress())
            self._handles = start_cores(self.config)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._greet([handle.address for handle in self._handles]))
                if tokenizer is not None and not model.skip_tokenizer_init:
                    group.create_task(self._load_tokenizer(tokenizer))
        except BaseException as error:
            await self.close()
            if isinstance(error, BaseExceptionGroup):  # the first failure cancelled the other task
                raise error.exceptions[0] from None
            raise

    async def close(self) -> None:
        """Abort what runs, say goodbye, and end the core if it is owned. May be called twice."""
        handles = await self.leave()
        await asyncio.gather(*(asyncio.to_thread(handle.close) for handle in handles))

    async def leave(self) -> list[CoreHandle]:
        """`close`, but for the blocking end of owned cores: the caller closes their handles."""
        if self._session is not None:
            await self._session.line.close()
        if self._tokenizer is not None:
            self._tokenizer.long_texts.close()
        handles, self._handles = self._handles, []
        return handles

    async def __aenter__(self) -> "AsyncLLM":
        if self._session is None:  # else it comes from `connect`: `async with await …connect(…)`
            await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    @property
    def is_running(self) -> bool:
        """Takes requests. (While a dead core is being replaced, they wait for the new one.)"""
        line = None if self._session is None else self._session.line
        return line is not None and line.welcome is not None and not line.is_dead

    @property
    def is_stalled(self) -> bool:
        """The core has not been heard of for seconds: it is stuck or stopped, or has died and is
        not back yet. Streams pause; nothing is lost."""
        return self.is_running and self._line.is_stalled

    @property
    def address(self) -> str:
        """Where the core is; other frontends may attach there, to an owned core as well."""
        return self._line.address

    @property
    def info(self) -> Welcome:
        """What the core said of itself and its model: limits, sizes, choices made."""
        if self._session is None or self._session.line.welcome is None:
            raise _not_started()
        return self._session.line.welcome

    @property
    def vocab_size(self) -> int:
        """Of the model; token ids are below it."""
        return self.info.worker.vocab_size

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None with skip_tokenizer_init, or if none could be had when attaching."""
        return self._tokenizer

    # ---- requests

    def generate(
        self,
        prompt: PromptInput,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Stream the outputs of one prompt: a text, token ids, or a dict of one of them.

        Ends after the output that is `finished`. Leaving the loop early, or being cancelled, aborts
        the request. A caller slower than the model gets several steps in one output.
        options: see `RequestOptions` (priority, cache_salt, tenant, deadlines).
        Raises `ValueError` before anything is sent, `RequestFailedError` (`OverloadedError` if the
        core refused it for now), `EngineDeadError`.
        """
        made = self.make_prompt(prompt)
        check_call(sampling_params, request_id, options)
        return self._stream(self.prepare(made, sampling_params, request_id, **options))

    def chat(
        self,
        messages: list[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **options_and_variables: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """`generate`, from the prompt that the model's chat template makes of `messages`.

        Keywords that are no option of a request (`RequestOptions`) are the template's variables.
        """
        variables = dict(options_and_variables)
        options = {name: variables.pop(name) for name in OPTION_NAMES if name in variables}
        made = self.chat_prompt(messages, **variables)
        check_call(sampling_params, request_id, options)
        return self._stream(self.prepare(made, sampling_params, request_id, **options))

    def apply_chat_template(self, messages: list[Message], **template_variables: Any) -> str:
        """The text of `chat`'s prompt. Raises `ValueError` if the template refuses the messages."""
        return self._need_tokenizer().apply_chat_template(messages, **template_variables)

    def make_prompt(self, prompt: PromptInput) -> Prompt:
        """Encode a text, or copy token ids."""
        return make_prompt(prompt, self._need_tokenizer)

    def chat_prompt(self, messages: list[Message], **template_variables: Any) -> Prompt:
        """The template writes its special tokens itself, so none are added in encoding."""
        text = self.apply_chat_template(
            checked_messages(messages, self._need_tokenizer), **template_variables
        )
        return Prompt(text, self._need_tokenizer().encode(text, add_special_tokens=False))

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests early: their last output has finish_reason "abort". Unknown ids are fine:
        they may just have finished."""
        self._running.abort([request_id] if isinstance(request_id, str) else request_id)

    async def stats(self) -> CoreStatus:
        """What the core does, all clients together; at most a second (or a step) old, unless the
        core `is_stalled`. Waits while it is being replaced."""
        return await self._line.status()

    @property
    def replica_stats(self) -> list[CoreStatus | None]:
        """The latest word of each core, by its place; None of one that is away."""
        line = self._line
        lines = line.lines if isinstance(line, Lines) else [line]
        return [one.latest_status for one in lines]

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. False if blocks in use made it partial."""
        return bool(await self._line.call(ResetPrefixCache()))

    # ---- looking into the core

    async def observe(self, *, fresh: bool = False) -> Observation:
        """What the core does, and what is new since the last call, for viewers that ask again after
        `interval_s`. fresh: begin again. Waits while the core is being replaced."""
        answer = await self._line.call(Observe(fresh))
        assert isinstance(answer, Observation)
        return answer

    async def show_block(self, block_id: int) -> BlockContents:
        """Who holds a block of KV cache, and its tokens. `RuntimeError`: there is no such block."""
        answer = await self._line.call(ShowBlock(block_id))
        assert isinstance(answer, BlockContents)
        return answer

    async def set_pace(
        self, *, num_steps: int | None = None, interval_ms: float = 0.0, for_s: float = 30.0
    ) -> None:
        """Hold the core, let it take `num_steps` steps, or slow it down, for `for_s` seconds
        (`SetPace`). Raises `NotAllowedError`: not without `allow_debug`, or not with this key."""
        await self._line.call(SetPace(num_steps, interval_ms, for_s))

    def request_id_of(self, client_id: int, number: int) -> str | None:
        """The id of a request of this frontend, live or just ended, by the core's names for it."""
        if client_id != self.info.client_id:
            return None
        return self._running.request_id_of(number)

    def get_default_sampling_params(self) -> SamplingParams:
        """Those of requests that bring none: the model's own (`generation_config`)."""
        defaults: dict[str, Any] = {**self.info.worker.sampling_defaults}
        return SamplingParams(**defaults)

    # ---- one request in steps, as `LLM` needs it

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> Request:
        """Check what only the model's facts tell and give it a number; nothing is sent yet.

        The types of what is passed have been checked, by `check_call` or as fields of an HTTP body.
        Raises `ValueError`.
        """
        params = self.get_default_sampling_params() if params is None else params
        worker = self.info.worker
        most, vocab_size = worker.max_model_len, worker.vocab_size
        params.check_prompt(prompt.token_ids, most=most, vocab_size=vocab_size)
        if params.stop and self._tokenizer is None:
            raise ValueError(NO_STOPS)
        if params.seed is None and not params.greedy:
            # Drawn here and not by the core, so that any other core can continue the request.
            params = params.with_values(seed=self._seeds.getrandbits(63))
        bad_words = self.encode_bad_words(tuple(params.bad_words))
        if params.allowed_token_ids is not None:
            check_choice(params, bad_words, worker)
        number, self._next_number = self._next_number, self._next_number + params.n
        message = AddRequest(
            number, prompt.token_ids, params, bad_words_token_ids=bad_words, **options
        )
        name = f"request-{message.number}" if request_id is None else request_id
        return Request(name, prompt.text, message, self._detokenizers)

    def submit(self, request: Request) -> None:
        """Send it; from here on `request.next_output` brings what the core answers."""
        self._running.submit(request)

    def discard(self, request: Request) -> None:
        """Nobody waits for it any more: abort what still runs of it."""
        self._running.discard(request)

    async def _stream(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        self.submit(request)
        try:
            while True:
                output = await request.next_output()
                yield output
                if output.finished:
                    return
        finally:
            self.discard(request)

    # ---- the line to the core

    @property
    def _running(self) -> Session | Replicas:
        if self._session is None:
            raise _not_started()
        return self._session

    @property
    def _line(self) -> Supervisor | Lines:
        return self._running.line

    async def _greet(
        self,
        addresses: list[str],
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        keys: ClientKeys | None = None,
    ) -> Welcome:
        config, handles = self.config.supervision, self._handles
        if len(addresses) == 1:
            handle = handles[0] if handles else None
            self._session = Session(config, addresses[0], handle=handle, keys=keys)
        else:
            self._session = Replicas(config, addresses, handles=handles, keys=keys)
        line = self._session.line
        return await line.connect(timeout_s=connect_timeout_s, on_progress=self._on_progress)

    def _encode_bad_words(self, words: tuple[str, ...]) -> list[list[int]]:
        return encode_bad_words(words, self._need_tokenizer)

    def _need_tokenizer(self) -> Tokenizer:
        if self._session is None:
            raise _not_started()
        if self._tokenizer is None:
            raise ValueError(
                f"text needs a tokenizer, and there is none ({self._why_no_tokenizer}): "
                "pass token ids as {'prompt_token_ids': [...]}, or name a tokenizer"
            )
        return self._tokenizer

    async def _try_tokenizer(self, name: str) -> None:
        """The core may run without one, or know the model by a path of another machine."""
        try:
            await self._load_tokenizer(name)
        except ValueError as error:
            self._why_no_tokenizer = str(error)

    async def _load_tokenizer(self, tokenizer: str | Tokenizer) -> None:
        if isinstance(tokenizer, str):
            tokenizer = await asyncio.to_thread(Tokenizer.load, tokenizer)
        self._tokenizer = tokenizer
        self._detokenizers = DetokenizerFactory(tokenizer)

    def _thread_progress(self) -> ProgressCallback | None:
        """`on_progress` for another thread to call: it runs in the event loop all the same."""
        if self._on_progress is None:
            return None
        loop, on_progress = asyncio.get_running_loop(), self._on_progress

        def report(phase: str, progress: float) -> None:
            loop.call_soon_threadsafe(on_progress, phase, progress)

        return report


def _not_started() -> RuntimeError:
    return RuntimeError("the engine is not started: use `async with AsyncLLM(...)`")
