"""The keys that clients send, and by what name each is known: in metrics, and as a tenant.

`command.py` collects them when the server starts; the middleware asks whose key a request brings.
Keys are compared in constant time, and appear in no log, no metric and no error.
"""

import hashlib
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

import msgspec

CALLER = "caller"  # where a request's state has the name of its key, if keys are asked for
NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


class ApiKey(msgspec.Struct, frozen=True):
    """A key, and its name."""

    name: str
    key: str

    def __repr__(self) -> str:
        return f"ApiKey({self.name!r})"


def read_keys(path: Path) -> list[ApiKey]:
    """Of a file with a line `name key` (or a key alone) for each; `#` begins a comment.

    Raises `ValueError` if it cannot be read, others may read it, or a line is neither.
    """
    try:
        text = path.read_text("utf-8")
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--api-key-file: {path} cannot be read: {error}") from None
    if mode & 0o077:
        raise ValueError(f"--api-key-file: others can read {path}: `chmod 600` it")
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name = words[0] if len(words) == 2 else f"key-{number}"
        if len(words) > 2 or not NAME.fullmatch(name):
            raise ValueError(f"--api-key-file: line {number} of {path} is no `name key`")
        keys.append(ApiKey(name, words[-1]))
    if not keys:
        raise ValueError(f"--api-key-file: {path} holds no key")
    return keys


class ApiKeys:
    """All keys of a server. Raises `ValueError` if two have one name."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._digests = {key.name: _digest(key.key) for key in keys}

    def __len__(self) -> int:
        return len(self._digests)

    def owner(self, authorization: str) -> str | None:
        """The name of the key in this header, or None. All are compared, so time tells nothing."""
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        found = None
        for name, digest in self._digests.items():
            if secrets.compare_digest(given, digest):
                found = name
        return found


def _digest(key: str) -> bytes:
    """Of one length, whatever the key's."""
    return hashlib.sha256(key.encode()).digest()
