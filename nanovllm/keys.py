"""Keys that let clients reach a core over a network: CurveZMQ pairs in small JSON files.

The core reads a directory (`core.json`, and a public key per client in `clients/`, where a second
line "operator" lets him look at everybody's requests), a client reads the one file made for it.
Secret files are for their owner's eyes only (mode 0600).
"""

import os
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

import msgspec

OPERATOR = b"operator"
T = TypeVar("T", bound=msgspec.Struct)


class ClientKeys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A client's pair, and the core it is to trust; all Z85 text."""

    public: str
    secret: str
    core: str

    @classmethod
    def load(cls, path: str | Path) -> "ClientKeys":
        """`ValueError` if `path` is no such file."""
        return _load(Path(path), cls)


class CorePair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contents of `core.json`."""

    public: str
    secret: str


class CoreKeys:
    """A core's pair, and whom it lets in. `ValueError` if `directory` has no keys."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        pair = _load(self._directory / "core.json", CorePair)
        self.public, self.secret = pair.public, pair.secret

    def client_keys(self) -> set[bytes]:
        """The public keys of those let in at this moment."""
        return {key for key, *_ in self._entries()}

    def is_operator(self, key: bytes) -> bool:
        """Whether who has this public key may look at others' requests, at this moment."""
        return [key, OPERATOR] in self._entries()

    def _entries(self) -> list[list[bytes]]:
        """The words of each client's file: his key, and what he is."""
        files = (self._directory / "clients").glob("*.pub")
        return [words for path in files if (words := path.read_bytes().split())]


def make_keys(
    directory: str | Path, clients: list[str], operators: Collection[str] = ()
) -> list[Path]:
    """Make a core's keys, unless they are there, and those of new `clients`; returns the files to
    hand to the clients. operators: those of them who may look at everybody's requests.

    `ValueError` if one has keys already."""
    import zmq

    directory = Path(directory)
    (directory / "clients").mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    known = [name for name in clients if (directory / "clients" / f"{name}.pub").exists()]
    if known:
        raise ValueError(f"client {known[0]!r} has keys in {directory}: choose another name")
    odd = [name for name in clients if not name.replace("-", "").replace("_", "").isalnum()]
    if strangers := set(operators) - set(clients):
        raise ValueError(f"operator {min(strangers)!r}: name it among the clients as well")
    if odd or "core" in clients:
        raise ValueError(f"client {(odd or ['core'])[0]!r}: a name of letters and digits, not core")
    if not (directory / "core.json").exists():
        public, secret = (key.decode() for key in zmq.curve_keypair())
        _save(directory / "core.json", CorePair(public, secret))
    core = CoreKeys(directory)
    files = []
    for name in clients:
        public, secret = (key.decode() for key in zmq.curve_keypair())
        words = [public, OPERATOR.decode()] if name in operators else [public]
        (directory / "clients" / f"{name}.pub").write_text("\n".join(words) + "\n")
        files.append(directory / f"{name}.json")
        _save(files[-1], ClientKeys(public, secret, core.public))
    return files


def _save(path: Path, keys: msgspec.Struct) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(keys)) + b"\n")


def _load(path: Path, kind: type[T]) -> T:
    try:
        keys = msgspec.json.decode(path.read_bytes(), type=kind)
        if path.stat().st_mode & 0o077:
            raise ValueError("others can read it: `chmod 600` it")
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise ValueError(
            f"keys: {path} cannot be used ({error}): make keys with `nanovllm keys new DIRECTORY`"
        ) from None
    return keys
