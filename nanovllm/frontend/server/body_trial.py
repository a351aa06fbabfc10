"""The process in which large bodies are checked first: decoding one holds up everybody's streams.

`endpoint.read` has each that takes long checked here, and decodes what may pass. `BodyTrials`
starts the process, which ends with it. Its standard input is a socket: each body comes as two
frames, a `Trial` and the bytes, and is answered.
"""

import asyncio
import contextlib
import gc
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import msgspec

from nanovllm.frontend.child_process import ChildProcess, parent, receive, send
from nanovllm.frontend.server.api_errors import ApiError
from nanovllm.frontend.server.bodies import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    PaceBody,
    TokenizeBody,
    blaming,
    decoded,
)
from nanovllm.frontend.server.prompts import batch_of, refusal_of_length
from nanovllm.frontend.server.sampling import chat_params, completion_params, constraint_of
from nanovllm.limits import (
    MAX_JSON_DIGITS,
    MAX_JSON_EXPONENTS,
    MAX_JSON_LISTS,
    MAX_JSON_TEXTS,
    MAX_JSON_VALUES,
    MAX_PROMPT_CHARS,
    check_count,
)
from nanovllm.protocol.plan import WorkerInfo

PROGRAM = (sys.executable, "-m", "nanovllm.frontend.server.body_trial")
KINDS = {
    kind.__name__: kind
    for kind in (ChatBody, CompletionBody, DetokenizeBody, PaceBody, TokenizeBody)
}
TIMEOUT_S = 30.0  # most bodies take milliseconds, the worst a tenth of a second
NICENESS = 5  # whoever sends such bodies waits for them, rather than others


class BodyFacts(msgspec.Struct, frozen=True):
    """What bodies are checked against. most_chars: of a token; None if it is not known, or there is
    no tokenizer."""

    worker: WorkerInfo
    most_chars: int | None


class Trial(msgspec.Struct, frozen=True, array_like=True):
    """kind: the struct's name."""

    kind: str
    facts: BodyFacts


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """An `ApiError`, for the way back."""

    status: int
    message: str
    param: str | None
    code: str | None


def check(content: bytes, kind: type[Body], facts: BodyFacts) -> None:
    """All that is wrong with a body by itself, whatever its prompt is encoded to. `ApiError`."""
    if (too_much := excess(content)) is not None:
        raise ApiError(413, too_much, code="body_too_large")
    body = decoded(content, kind)
    defaults = facts.worker.sampling_defaults
    with blaming(body):
        if isinstance(body, CompletionBody):
            params = completion_params(body, constraint_of(body), defaults)
            contents, _ = batch_of(body)
            if len(contents) > 1 or body.truncate_prompt_tokens is not None:
                return  # what is wrong with one of several is told in its choices
            if isinstance(contents[0], str):
                most_tokens = facts.worker.max_model_len
                refusal = refusal_of_length(contents[0], facts.most_chars, most_tokens)
                if refusal is not None:
                    raise refusal
            else:
                most, vocab_size = facts.worker.max_model_len, facts.worker.vocab_size
                params.check_prompt(contents[0], most=most, vocab_size=vocab_size)
        elif isinstance(body, ChatBody | TokenizeBody):
            check_conversation(body)
            if isinstance(body, GenerationBody):
                chat_params(body, constraint_of(body), defaults)


def check_conversation(body: ChatBody | TokenizeBody) -> None:
    """That its messages are not too long together. Raises `ValueError`. (Shorter bodies than those
    that are tried here have no room for so many characters.)"""
    size = 0
    for message in body.messages or ():
        content = message.content or message.refusal or ""
        parts = [content] if isinstance(content, str) else content
        size += sum(len(part if isinstance(part, str) else part.text or "") for part in parts)
    check_count("messages", size, MAX_PROMPT_CHARS, "characters")


def excess(content: bytes) -> str | None:
    """What there is too much of to decode, if anything, by the punctuation between texts. Any bytes
    may be asked about: of what is no JSON, it says something."""
    unescaped = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    num_texts = unescaped.count(b'"') // 2
    if num_texts > MAX_JSON_TEXTS:
        return _told(num_texts, MAX_JSON_TEXTS, "names and texts")
    bare = b"".join(unescaped.split(b'"')[::2])
    num_values = bare.count(b",")
    num_digits = len(bare) - len(bare.translate(None, b"0123456789"))
    num_exponents = bare.count(b"e") + bare.count(b"E") - bare.count(b"true") - bare.count(b"false")
    counts = (
        (num_values, MAX_JSON_VALUES, "values"),
        (bare.count(b"[") + bare.count(b"{"), MAX_JSON_LISTS, "lists and objects"),
        (num_digits - 8 * num_values, MAX_JSON_DIGITS, "digits beyond eight of each value"),
        (num_exponents, MAX_JSON_EXPONENTS, "numbers with exponents"),
    )
    return next((_told(*one) for one in counts if one[0] > one[1]), None)


def _told(count: int, most: int, what: str) -> str:
    return f"the body holds {count} {what}: at most {most} are allowed"


class BodyTrials:
    """One body at a time; those that come meanwhile wait. Nothing is started before the first."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bodies")
        self._process: ChildProcess | None = None  # the thread's

    async def refusal(
        self, content: bytes | bytearray, kind: type[Body], facts: BodyFacts
    ) -> ApiError | None:
        """What is wrong with it, if anything. `ApiError` 503: it cannot be told."""
        trial = msgspec.msgpack.encode(Trial(kind.__name__, facts))
        found = await asyncio.get_running_loop().run_in_executor(
            self._thread, self._try_out, trial, content
        )
        if found is None:
            return None
        return ApiError(found.status, found.message, param=found.param, code=found.code)

    def close(self) -> None:
        """End the process, if there is one. Bodies that are being checked are refused."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._process is not None:
            self._process.end()

    def _try_out(self, trial: bytes, content: bytes | bytearray) -> Refusal | None:
        if self._process is None or not self._process.is_alive:
            self._process = ChildProcess(PROGRAM, timeout_s=TIMEOUT_S)
        reply = self._process.ask(trial, content)
        if reply is None:
            raise ApiError(503, "the body could not be checked: send it again", code="overloaded")
        return msgspec.msgpack.decode(reply, type=Refusal | None)


def answer(content: bytes, trial: Trial) -> Refusal | None:
    try:
        check(content, KINDS[trial.kind], trial.facts)
    except ApiError as error:
        return Refusal(error.status, error.details.message, error.details.param, error.details.code)
    return None


def main() -> None:
    """Serve until the other side closes."""
    channel = parent()
    os.nice(NICENESS)
    gc.freeze()
    with contextlib.suppress(ConnectionError):
        while (frame := receive(channel)) is not None and (content := receive(channel)) is not None:
            trial = msgspec.msgpack.decode(frame, type=Trial)
            send(channel, msgspec.msgpack.encode(answer(content, trial)))


if __name__ == "__main__":
    main()
