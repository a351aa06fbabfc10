"""What callers pass to `generate`, made into token ids and checked before anything is sent.

Called by `AsyncLLM`. Every mistake is a `ValueError` naming the field and the remedy.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypedDict

import msgspec

from nanovllm.config import unknown_name
from nanovllm.frontend.chat_template import Message
from nanovllm.frontend.tokenizer import Tokenizer
from nanovllm.limits import MAX_BAD_WORDS_TOKENS, MAX_NAME_CHARS, MAX_PROMPT_CHARS, check_count
from nanovllm.protocol.plan import WorkerInfo
from nanovllm.sampling_params import SamplingParams, leaves_nothing


class PromptDict(TypedDict, total=False):
    """A prompt as text or as token ids: exactly one of the two."""

    prompt: str
    prompt_token_ids: list[int]


PromptInput = str | list[int] | PromptDict
NeedTokenizer = Callable[[], Tokenizer]  # raises `ValueError` if there is none
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
PROMPT_KEYS = ["prompt", "prompt_token_ids"]
PRINTABLE = re.compile(r"[ -~]*")  # ASCII: what may stand in a log and in an HTTP header


class RequestOptions(TypedDict, total=False):
    """How a request is to be treated, besides what is sampled.

    priority: lower runs first, with scheduling_policy="priority". cache_salt: share cached prefixes
    only with requests of the same salt. tenant: whom it counts for where tenants share fairly;
    default: this client. deadline_ms, ttft_deadline_ms: an output that is not finished, or has no
    token, so long after the core got it ends with finish_reason "timeout".
    """

    priority: int
    cache_salt: str | None
    tenant: str | None
    deadline_ms: float | None
    ttft_deadline_ms: float | None


OPTION_NAMES = list(RequestOptions.__annotations__)


class Prompt(NamedTuple):
    """`text` is None if the caller gave token ids."""

    text: str | None
    token_ids: list[int]


def make_prompt(prompt: PromptInput, need_tokenizer: NeedTokenizer) -> Prompt:
    """Encode a text, or copy token ids. `ValueError`: neither, both, or empty."""
    content = prompt if isinstance(prompt, str) else _content(prompt)
    if not isinstance(content, str):
        return Prompt(None, _token_ids(content))
    if not content:
        raise ValueError("prompt is empty: pass at least one character")
    check_count("prompt", len(content), MAX_PROMPT_CHARS, "characters")
    return Prompt(content, need_tokenizer().encode(content))


def checked_messages(messages: Any, need_tokenizer: NeedTokenizer) -> list[Message]:
    """A conversation for the chat template, with contents of several texts joined.

    `ValueError` if it is no list of messages, or holds a role or content that the model cannot
    read. Roles beyond the usual ones are those that its template names.
    """
    if not isinstance(messages, list | tuple) or not messages:
        remedy = "a list such as [{'role': 'user', 'content': 'Hello'}]"
        raise ValueError(f"messages must be {remedy}, not {_shown(messages)}")
    template = need_tokenizer().chat_template or ""
    made: list[Message] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise ValueError(f"{where} must be a dict with role and content, not {_shown(message)}")
        role = message.get("role")
        if not isinstance(role, str) or (role not in ROLES and role not in template):
            raise ValueError(f"{where}.role must be one of {', '.join(ROLES)}, not {role!r}")
        made.append({**message, "content": _joined(message.get("content"), where)})
    return made


def _joined(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ValueError(f"{where}.content must be a string, not {_shown(content)}")
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else _shown(part)
            raise ValueError(f"{where}.content of type {kind!r}: this model reads text only")
        texts.append(text)
    return "\n".join(texts)


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}"


def encode_bad_words(words: Sequence[str], need_tokenizer: NeedTokenizer) -> list[list[int]]:
    """Each word as it is spelled at the start of a text and after a space."""
    if not words:
        return []
    bare = [word.lstrip() or word for word in words]
    spelled = [spelling for word in bare for spelling in (word, " " + word)]
    encoded = need_tokenizer().encode_batch(spelled)
    made = [list(token_ids) for token_ids in dict.fromkeys(map(tuple, encoded)) if token_ids]
    size = len(made) * max(map(len, made), default=0)
    check_count("bad_words", size, MAX_BAD_WORDS_TOKENS, "words times tokens of the longest")
    return made


def check_choice(params: SamplingParams, bad_words: list[list[int]], info: WorkerInfo) -> None:
    """That there is a first token to sample. bad_words: encoded. Raises `ValueError`."""
    if leaves_nothing(params, bad_words_token_ids=bad_words, eos_token_ids=info.eos_token_ids):
        raise ValueError(
            "allowed_token_ids: min_tokens and bad_words forbid all of them: allow more, or leave "
            "these out"
        )


def check_call(params: object, request_id: str | None, options: Mapping[str, Any]) -> None:
    """What else a caller in Python passes: types that the core could not decode, and would answer
    with a bad frame. params: None stands for the model's own."""
    if not isinstance(params, SamplingParams | None):
        remedy = ": write SamplingParams(**params)" if isinstance(params, dict) else ""
        kind = type(params).__name__
        raise ValueError(f"sampling_params must be a SamplingParams, not {kind}{remedy}")
    if options or request_id is not None:
        _check_options(request_id, options)


def _check_options(request_id: str | None, options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in OPTION_NAMES:
            raise ValueError(unknown_name("request option", name, OPTION_NAMES))
    priority = options.get("priority", 0)
    if type(priority) is not int or not -(2**63) <= priority < 2**63:
        raise ValueError(f"priority must be an integer of 64 bits, not {priority!r}")
    texts = {"request_id": request_id, **{k: options.get(k) for k in ("cache_salt", "tenant")}}
    for name, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} must be a string, not {value!r}")
        check_count(name, len(value or ""), MAX_NAME_CHARS, "characters")
    if request_id is not None and not PRINTABLE.fullmatch(request_id):
        raise ValueError(f"request_id must hold printable ASCII only, not {request_id!r}")
    for name in ("deadline_ms", "ttft_deadline_ms"):
        limit = options.get(name)
        is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
        if limit is not None and not (is_number and 0 < limit < math.inf):
            raise ValueError(f"{name} must be a number of milliseconds above 0, not {limit!r}")


def _content(prompt: list[int] | PromptDict) -> Any:
    if not isinstance(prompt, Mapping):
        return prompt
    for key in prompt:
        if key not in PROMPT_KEYS:
            raise ValueError(unknown_name("prompt key", str(key), PROMPT_KEYS))
    if len(prompt) != 1:
        raise ValueError("prompt must hold exactly one of 'prompt' and 'prompt_token_ids'")
    (key, value) = next(iter(prompt.items()))
    if (key == "prompt") != isinstance(value, str):
        kind = "a string" if key == "prompt" else "a list of integers"
        raise ValueError(f"{key} must be {kind}, not {type(value).__name__}")
    return value


def _token_ids(content: Any) -> list[int]:
    if isinstance(content, list | tuple):
        with suppress(msgspec.ValidationError):
            return msgspec.convert(content, list[int])  # a third of the time Python would take
    raise ValueError(
        "prompt must be a string, a list of integer token ids, {'prompt': …} or "
        f"{{'prompt_token_ids': […]}}, not {_describe(content)}"
    )


def _describe(content: Any) -> str:
    if isinstance(content, list | tuple):
        odd = next(item for item in content if type(item) is not int)
        return f"a {type(content).__name__} with {odd!r} in it"
    return type(content).__name__
