"""Finds a model's files by the name a user gives, and reads what they say about the model.

Used by frontends (tokenizer) and workers (weights) alike, each for itself; no torch here. Names
are tried in this order: a path, an alias (`fetch`), a Hugging Face id.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from nanovllm.checkpoint.fetch import ALIASES, fetch
from nanovllm.checkpoint.gguf import GGUFFile, hf_config
from nanovllm.config import unknown_name

WEIGHT_FILES = "*.safetensors"
HUB_FILES = ["*.json", WEIGHT_FILES, "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]


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
            return hf_config(self.gguf)
        return self._json("config.json")

    def eos_token_ids(self) -> list[int]:
        """Every id that ends an output: from generation_config.json, else the model's config."""
        if self.format == "gguf":
            keys = ("eos_token_id", "eot_token_id", "eom_token_id")
            found = [self.gguf.metadata.get(f"tokenizer.ggml.{key}") for key in keys]
            return sorted({token_id for token_id in found if token_id is not None})
        for name in ("generation_config.json", "config.json"):
            if (self.path / name).is_file():
                eos = self._json(name).get("eos_token_id")
                if eos is not None:
                    return [eos] if isinstance(eos, int) else list(eos)
        return []

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            content = json.loads(path.read_text("utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"model: {path} is not valid JSON ({error}): fetch it again") from None
        assert isinstance(content, dict)
        return content


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
        return Checkpoint(path, "gguf")
    if model in ALIASES:
        return Checkpoint(fetch(model, on_progress=on_progress), "gguf")
    if model.count("/") == 1 and not path.is_absolute() and not model.startswith("."):
        return _in_directory(_from_hub(model, weights=weights))
    if "/" in model or path.suffix == ".gguf":
        raise ValueError(f"model: there is no such file or directory: {model}")
    raise ValueError(unknown_name("model", model, list(ALIASES)))


def _in_directory(path: Path) -> Checkpoint:
    if (path / "config.json").is_file():
        return Checkpoint(path, "safetensors")
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return Checkpoint(files[0], "gguf")
    if files:
        raise ValueError(f"model: {path} holds {len(files)} .gguf files: name one of them")
    raise ValueError(f"model: {path} holds neither config.json nor a .gguf file")


def _from_hub(model: str, *, weights: bool) -> Path:
    """The local snapshot of a Hugging Face repository; asks the network only if it is not whole."""
    from huggingface_hub import snapshot_download

    reason = ""
    wanted = HUB_FILES if weights else [name for name in HUB_FILES if name != WEIGHT_FILES]
    for local_files_only in (True, False):
        try:
            path = snapshot_download(
                model, allow_patterns=wanted, local_files_only=local_files_only
            )
        except (OSError, ValueError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        # Another program may have cached no more than the tokenizer.
        needed = WEIGHT_FILES if weights else "config.json"
        if any(Path(path).glob(needed)) or not local_files_only:
            return Path(path)
    raise ValueError(
        f"model: {model!r} is no local path and could not be fetched from Hugging Face "
        f"({reason}): check the id and the network, or name a local directory"
    )
