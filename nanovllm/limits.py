"""How much one request may hold, by name. One home, for Python's callers, HTTP bodies and the core.

`SamplingParams`, the bodies of the HTTP server and `core/admission` check against these. Each is
far above what applications send; none lets one request take memory or time that others need.
Frontends check before they send, the core before it queues, for those that did not.
"""

from typing import Any

import msgspec

MAX_STOPS = 64
MAX_STOP_CHARS = 4096  # of all stop strings together: each new character is compared with each
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_ALLOWED_TOKEN_IDS = 65_536
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_CHARS = 256
MAX_BAD_WORDS_TOKENS = 1 << 18  # the table of the encoded words: their number times the longest
MAX_GRAMMAR_BYTES = 1 << 17  # of a schema or a grammar
MAX_CHOICE_TEXTS, MAX_CHOICE_BYTES = 100_000, 1 << 20  # of structured_outputs.choice
MAX_REGEX_BYTES = 1 << 14
MAX_SCHEMA_DEPTH = 100  # objects and arrays of a JSON schema within one another
MAX_SCHEMA_REFS = 1000
MAX_N = 16_384
MAX_REQUEST_TOKENS = 1 << 24  # n copies of a prompt, as the core keeps them
MAX_DEADLINE_MS = 86_400_000.0  # a day
MAX_REQUEST_ID_CHARS = 128
MAX_SALT_CHARS = 1024  # of salts and tenants, to which a server may add something of its own
MAX_NAME_CHARS = 256  # of users, tools, functions, salts, models

# Of a body over HTTP.
MAX_CHOICES = 128
MAX_OUTPUTS = 2048  # prompts times n
MAX_PROMPT_CHARS = 1 << 22
MAX_MESSAGES = 4096
MAX_PARTS = 1024  # of one message
MAX_TOOLS = 128
MAX_METADATA = 16
MAX_DETOKENIZED = 1 << 18
MAX_JSON_BYTES = 1 << 17  # of what a template or a grammar is handed as it is
MAX_JSON_DEPTH = 128
MAX_JSON_LISTS, MAX_JSON_TEXTS, MAX_JSON_VALUES = 1 << 17, 1 << 17, 1 << 20  # of a whole body
# Of long numbers, and of those with exponents, some of which take msgspec 20 µs each.
MAX_JSON_DIGITS, MAX_JSON_EXPONENTS = 1 << 18, 256


def check_count(name: str, count: int, most: int, what: str) -> None:
    """`ValueError` naming the field and its limit. what: of which there are `count`."""
    if count > most:
        raise ValueError(f"{name} holds {count} {what}: at most {most} are allowed")


def check_json(name: str, value: Any) -> None:
    """That a value is JSON, and neither too long nor too deep. `ValueError` naming the field."""
    try:
        encoded = msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be JSON: {error}") from None
    check_count(name, len(encoded), MAX_JSON_BYTES, "bytes")
    if is_deeper(value, MAX_JSON_DEPTH):
        raise ValueError(f"{name} is nested too deep: at most {MAX_JSON_DEPTH} levels are allowed")


def is_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested in more than `most` levels."""
    level = [value]
    for _ in range(most + 1):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.values()
            elif isinstance(one, list | tuple):
                inner += one
        if not inner:
            return False
        level = inner
    return True
