"""The synchronous engine: lists in, lists out.

A facade over the same `AsyncLLM`, on an event loop of its own in a daemon thread; so it works at
the top level of a script and inside notebooks, whose own loop it leaves alone.
"""

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar, Unpack

import msgspec
import uvloop
from tqdm import tqdm

from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.chat_template import Message
from nanovllm.frontend.core_life import ProgressCallback
from nanovllm.frontend.core_process import CoreHandle
from nanovllm.frontend.inputs import Prompt, PromptInput, check_call
from nanovllm.frontend.outputs import RequestOutput
from nanovllm.frontend.request import Request
from nanovllm.frontend.tokenizer import Tokenizer
from nanovllm.keywords import EngineKeywords
from nanovllm.protocol.messages import CoreStatus, Welcome
from nanovllm.sampling_params import SamplingParams

T = TypeVar("T")
STOP_TIMEOUT_S = 10.0  # for the event loop to end


class LLM:
    """An engine for offline use. The core process ends with `close`, at the end of a `with`, when
    the object is collected, and when the interpreter exits.

    Keywords are the fields of `EngineConfig`. Raises `ValueError` if the configuration cannot work,
    `EngineDeadError` if the core dies while it loads.
    """

    def __init__(
        self,
        model: str = "smollm2",
        *,
        on_progress: ProgressCallback | None = None,
        **config_fields: Unpack[EngineKeywords],
    ) -> None:
        # The queue holds the caller's own prompts only, so their number is not limited.
        fields: EngineKeywords = {
            "max_queued_requests": None,
            "max_queued_tokens": None,
            **config_fields,
        }
        self._llm = AsyncLLM(model, on_progress=on_progress, **fields)
        self._loop = uvloop.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="nanovllm", daemon=True)
        thread.start()
        self._process_id = os.getpid()
        self._shut_down = weakref.finalize(
            self, _shut_down, self._llm, self._loop, thread, self._process_id
        )
        try:
            self._run(self._llm.start())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the core and the event loop. May be called twice."""
        self._shut_down()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def info(self) -> Welcome:
        """What the core said of itself and its model."""
        return self._llm.info

    @property
    def vocab_size(self) -> int:
        """Of the model; token ids are below it."""
        return self._llm.vocab_size

    def get_tokenizer(self) -> Tokenizer | None:
        """None with skip_tokenizer_init."""
        return self._llm.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Those of prompts that come without: the model's own (`generation_config`)."""
        return self._llm.get_default_sampling_params()

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Complete all prompts, batched by the engine; the outputs are in the prompts' order.

        prompts: one or a list; each a text, a list of token ids, or a dict of one of them.
        sampling_params, priority: one for all, or a list as long as that of the prompts.
        Raises `ValueError` before anything is sent. Ctrl-C aborts what runs and leaves the engine
        usable.
        """
        made = [self._llm.make_prompt(prompt) for prompt in _as_list(prompts)]
        return self._complete(made, sampling_params, use_tqdm=use_tqdm, priority=priority)

    def chat(
        self,
        messages: list[Message] | Sequence[list[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
        **template_variables: Any,
    ) -> list[RequestOutput]:
        """`generate` the next message of one conversation, or of each in a list."""
        conversations: Any = messages
        if not isinstance(messages, list | tuple) or (messages and isinstance(messages[0], dict)):
            conversations = [messages]
        made = [self._llm.chat_prompt(one, **template_variables) for one in conversations]
        return self._complete(made, sampling_params, use_tqdm=use_tqdm, priority=priority)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. False if blocks in use made it partial."""
        return self._run(self._llm.reset_prefix_cache())

    def stats(self) -> CoreStatus:
        """What the core does; at most a second old."""
        return self._run(self._llm.stats())

    def _complete(
        self,
        prompts: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        use_tqdm: bool,
        priority: int | Sequence[int],
    ) -> list[RequestOutput]:
        count = len(prompts)
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = _one_each("sampling_params", sampling_params, count)
        priorities = _one_each("priority", priority, count)
        for one, rank in zip(params, priorities, strict=True):
            check_call(one, None, {"priority": rank})
        with tqdm(total=count, desc="Prompts", unit="prompt", disable=not use_tqdm) as bar:
            return self._run(self._gather(prompts, params, priorities, bar.update))

    async def _gather(
        self,
        prompts: list[Prompt],
        params: list[SamplingParams],
        priorities: list[int],
        on_finished: Callable[[], object],
    ) -> list[RequestOutput]:
        """Submit all, or none if one is wrong; then wait for all."""
        requests = [
            self._llm.prepare(
                prompt, msgspec.structs.replace(one, output_kind="final_only"), priority=priority
            )
            for prompt, one, priority in zip(prompts, params, priorities, strict=True)
        ]

        async def finish(request: Request) -> RequestOutput:
            output = await request.next_output()
            on_finished()
            return output

        try:
            for request in requests:
                self._llm.submit(request)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(finish(request)) for request in requests]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            for request in requests:
                self._llm.discard(request)
        return [task.result() for task in tasks]

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run in the loop's thread, and wait. Ctrl-C here cancels the work there."""
        if os.getpid() != self._process_id:
            work.close()
            raise RuntimeError(
                "this LLM belongs to the process that this one was forked from: make one here, "
                "or attach to its core with AsyncLLM.connect"
            )
        if not self._shut_down.alive:
            work.close()
            raise RuntimeError("this LLM has been closed: make a new one")
        loop, interrupted = self._loop, Future[None]()

        async def interruptible() -> T:
            task = asyncio.ensure_future(work)
            interrupted.add_done_callback(lambda _: loop.call_soon_threadsafe(task.cancel))
            return await task

        try:
            # The work may be well under way before this has returned, and so may Ctrl-C.
            return asyncio.run_coroutine_threadsafe(interruptible(), loop).result()
        except KeyboardInterrupt:
            interrupted.set_result(None)
            raise


def _shut_down(
    llm: AsyncLLM, loop: asyncio.AbstractEventLoop, thread: threading.Thread, process_id: int
) -> None:
    """End the engine from any thread, also while the interpreter exits (when no thread can start,
    so the core is waited for here and not in the loop). A fork has no thread for the loop, and the
    engine is not its own to end."""
    if os.getpid() != process_id:
        return
    try:
        handles = asyncio.run_coroutine_threadsafe(_leave(llm), loop).result(STOP_TIMEOUT_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(STOP_TIMEOUT_S)
    loop.close()
    for handle in handles:
        handle.close()


async def _leave(llm: AsyncLLM) -> list[CoreHandle]:
    handles = await llm.leave()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    return handles


def _as_list(prompts: PromptInput | Sequence[PromptInput]) -> list[PromptInput]:
    """One prompt, or several? A non-empty list of integers is one prompt; so is what is no list,
    for `make_prompt` to take or refuse."""
    if not isinstance(prompts, Iterable) or isinstance(prompts, str | bytes | dict):
        return [prompts]
    items: list[Any] = list(prompts)
    if items and all(type(item) is int for item in items):
        return [items]
    return items


def _one_each(name: str, value: T | Sequence[T], count: int) -> list[T]:
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries for {count} prompts: pass one, or each")
    return list(value)
