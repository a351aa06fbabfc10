"""Finds a model's files by the name a user gives, and reads what they say about the model.

Used by frontends (tokenizer) and workers (weights) alike, each for itself; no torch here. Names
are tried in this order: a path, an alias (`fetch`), a Hugging Face id.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from nanovllm.checkpoint import hub
from nanovllm.checkpoint.damage import blaming
from nanovllm.checkpoint.fetch import ALIASES, fetch
from nanovllm.checkpoint.gguf import GGUFFile, hf_config
from nanovllm.checkpoint.json_file import read_json
from nanovllm.checkpoint.special_tokens import eos_token_id, gguf_end_ids
from nanovllm.checkpoint.weight_files import gguf_models, part_names
from nanovllm.config import unknown_name

# Any of these is a tokenizer; what else belongs to one lies beside it.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: a directory with config.json, or one .gguf file."""

    path: Path
    format: Literal["safetensors", "gguf"]

    @cached_property
    def gguf(self) -> GGUFFile:
        """The opened file; only for format "gguf"."""
        assert self.format == "gguf"
        return GGUFFile(self.path)

    def config(self) -> dict[str, Any]:
        """The model's facts in the form of a Hugging Face config.json, whatever the format."""
        if self.format == "gguf":
            with blaming(self.path):
                return hf_config(self.gguf)
        return read_json(self.path / "config.json")

    def eos_token_ids(self, tokenizer: Path | None = None) -> list[int]:
        """Every id that ends an output: the model's own (generation_config.json, else config.json,
        else GGUF metadata) and the tokenizer's EOS token.

        tokenizer: where its files are, if not with the model.
        """
        with blaming(self.path):
            return self._end_ids(tokenizer)

    def _end_ids(self, tokenizer: Path | None) -> list[int]:
        found: set[int] = set()
        if self.format == "gguf":
            found |= gguf_end_ids(self.gguf.metadata)
        else:
            found |= self._configured_eos()
            tokenizer = tokenizer or self.path
        if tokenizer is not None and tokenizer.is_dir():
            eos = eos_token_id(tokenizer)
            found |= set() if eos is None else {eos}
        elif tokenizer is not None:
            found |= gguf_end_ids(GGUFFile(tokenizer).metadata)
        return sorted(found)

    def _configured_eos(self) -> set[int]:
        for name in ("generation_config.json", "config.json"):
            if (self.path / name).is_file():
                eos = read_json(self.path / name).get("eos_token_id")
                if eos is not None:
                    ids = eos if isinstance(eos, list) else [eos]
                    if not all(type(token_id) is int for token_id in ids):
                        raise ValueError(
                            f"model: {self.path / name}: eos_token_id must be an integer or a "
                            f"list of integers, not {eos!r}"
                        )
                    return set(ids)
        return set()


def locate(
    model: str,
    *,
    on_progress: Callable[[str, float], None] | None = None,
    weights: bool = True,
) -> Checkpoint:
    """The checkpoint `model` names, fetched first if it must be (an alias, a Hugging Face id).

    weights: whether they are wanted, too; without, a Hugging Face id brings its config at least.
    on_progress is told the phase ("download") and how far it is, in [0, 1]. Raises `ValueError`
    naming the field and the remedy.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _in_directory(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"model: {path} is not a .gguf file: name a directory or a .gguf file")
        return _gguf(path)
    if model in ALIASES:
        return Checkpoint(fetch(model, on_progress=on_progress), "gguf")
    if (reference := hub.parse(model)) is not None:
        return _found(hub.fetch_model(reference, weights=weights))
    name, mark, revision = model.rpartition("@")
    if mark and (name in ALIASES or Path(name).expanduser().exists()):
        raise ValueError(f"revision: {name} has none, so not {revision!r} either: leave it out")
    if "/" in model or path.suffix == ".gguf":
        raise ValueError(f"model: there is no such file or directory: {model}")
    raise ValueError(unknown_name("model", model, list(ALIASES)))


def locate_tokenizer(name: str) -> Path:
    """Where the tokenizer is that `name` names: a directory with its files, or a GGUF file.

    name: as for `locate`, or a directory or repository that holds a tokenizer and nothing else. No
    weights are fetched, save those of a GGUF file, which has its tokenizer inside. Raises
    `ValueError` with the remedy.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path if has_tokenizer(path) else _in_directory(path).path
    if path.is_file() and path.name in TOKENIZER_FILES:
        return path.parent
    reference = None if path.is_file() or name in ALIASES else hub.parse(name)
    if reference is None:
        return locate(name).path
    found = hub.fetch_tokenizer(reference)
    return found if found.is_file() or has_tokenizer(found) else _found(found).path


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def _found(path: Path) -> Checkpoint:
    return _in_directory(path) if path.is_dir() else _gguf(path)


def _gguf(path: Path) -> Checkpoint:
    """Of a file, or of the first part of a split one."""
    return Checkpoint(path.with_name(part_names(path.name)[0]), "gguf")


def _in_directory(path: Path) -> Checkpoint:
    """Safetensors, where there are any; else a GGUF file, which needs no config beside it."""
    has_config = (path / "config.json").is_file()
    files = gguf_models(file.name for file in path.glob("*.gguf"))
    if has_config and (any(path.glob("*.safetensors")) or len(files) != 1):
        return Checkpoint(path, "safetensors")
    if len(files) == 1:
        return _gguf(path / files[0])
    if files:
        raise ValueError(f"model: {path} holds {len(files)} .gguf files: name one of them")
    raise ValueError(f"model: {path} holds neither config.json nor a .gguf file")
