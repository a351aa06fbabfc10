"""Fetches models and tokenizers from the Hugging Face Hub, no more of them than is asked for.

`locate` calls it. What the hub's own cache holds whole is used without asking the network.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from nanovllm.checkpoint.weight_files import (
    INDEX,
    SHARD_PATTERN,
    SINGLE,
    gguf_models,
    indexed_files,
    part_names,
    weight_files,
)

CONFIG_FILES = ["config.json", "generation_config.json", "hf_quant_config.json", INDEX]
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "config.json",  # transformers asks it which tokenizer to make
]
VOCABULARY_FILES = ["tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"]
NUM_NAMES_SHOWN = 12
REFERENCE = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:(?P<mark>[:/])(?P<choice>[^@]+))?(?:@(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True)
class HubReference:
    """A repository at a revision, and of its GGUF files perhaps one, by path or quantization."""

    repo: str
    file: str | None = None
    quantization: str | None = None
    revision: str | None = None

    @property
    def names_gguf(self) -> bool:
        return self.file is not None or self.quantization is not None

    def __str__(self) -> str:
        file = "" if self.file is None else f"/{self.file}"
        quantization = "" if self.quantization is None else f":{self.quantization}"
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repo}{file}{quantization}{revision}"


def parse(name: str) -> HubReference | None:
    """`org/name`, `org/name:Q4_K_M`, `org/name:FILE.gguf` or `org/name/FILE.gguf`; with
    `@REVISION` (a branch, a tag or a commit) behind it."""
    match = REFERENCE.fullmatch(name)
    if match is None or name.startswith("."):
        return None
    choice, whole = match["choice"], HubReference(match["repo"], revision=match["revision"])
    if choice is None:
        return None if match["repo"].endswith(".gguf") else whole
    if choice.endswith(".gguf"):
        return replace(whole, file=choice)
    if match["mark"] == ":" and "/" not in choice:
        return replace(whole, quantization=choice)
    return None


def fetch_model(reference: HubReference, *, weights: bool) -> Path:
    """A directory with the model's files, or the GGUF file (of a split one the first part).

    weights: without them a model in safetensors brings its config and tokenizer only. Raises
    `ValueError` with the remedy.
    """
    if reference.names_gguf:
        return _fetch_gguf(reference)
    small = [*CONFIG_FILES, *TOKENIZER_FILES]
    if not weights:
        path = _snapshot(reference, small, is_whole=_has_config)
        return path if _has_config(path) else _fetch_only_gguf(reference)
    path = _snapshot(reference, [*small, SINGLE, SHARD_PATTERN], is_whole=_has_weights)
    if not _has_weights(path) and (path / INDEX).is_file():  # it names them otherwise
        names = {file.name for file in (indexed_files(path) or {}).values()}
        path = _snapshot(reference, sorted(names), is_whole=_has_weights)
    return path if _has_weights(path) else _fetch_only_gguf(reference)


def fetch_tokenizer(reference: HubReference) -> Path:
    """A directory with a tokenizer's files and no weights, or the GGUF file that has it inside."""
    if reference.names_gguf:
        return _fetch_gguf(reference)
    path = _snapshot(reference, TOKENIZER_FILES, is_whole=_has_vocabulary)
    return path if _has_vocabulary(path) else _fetch_only_gguf(reference)


def _has_config(path: Path) -> bool:
    return (path / "config.json").is_file()


def _has_vocabulary(path: Path) -> bool:
    return any((path / name).is_file() for name in VOCABULARY_FILES)


def _has_weights(path: Path) -> bool:
    """Whether all that the index or the names of shards tell of is there."""
    try:
        return bool(weight_files(path))
    except ValueError:
        return False


def _fetch_gguf(reference: HubReference) -> Path:
    """The file that a reference names, by path or by quantization."""
    if reference.file is not None:
        names = part_names(reference.file)
        path = _snapshot(
            reference, names, is_whole=lambda path: all((path / n).is_file() for n in names)
        )
        found = [reference.file] if (path / reference.file).is_file() else []
    else:
        kind = re.escape(reference.quantization or "")
        wanted = re.compile(rf"(.*[-._/])?{kind}(-\d{{5}}-of-\d{{5}})?\.gguf", re.IGNORECASE)
        path = _snapshot(
            reference,
            _patterns(reference.quantization or ""),
            is_whole=lambda path: bool(_ggufs(path, wanted)),
        )
        found = _ggufs(path, wanted)
    if len(found) == 1:
        return path / part_names(found[0])[0]
    if found:
        raise ValueError(
            f"model: {reference} is {len(found)} files of {reference.repo} "
            f"({', '.join(found)}): name one as {reference.repo}/FILE.gguf"
        )
    raise ValueError(f"model: there is no {reference}: {_offer(reference)}")


def _fetch_only_gguf(reference: HubReference) -> Path:
    """The file of a repository with nothing but one GGUF model."""
    models = gguf_models(_names(reference))
    if len(models) == 1:
        return _fetch_gguf(replace(reference, file=models[0]))
    raise ValueError(
        f"model: {reference.repo!r} has no {SINGLE} or shards of it: {_offer(reference)}"
    )


def _offer(reference: HubReference) -> str:
    """What else a user may name, for an error's text."""
    repo, models = reference.repo, gguf_models(_names(reference))
    if not models:
        return "name a repository with safetensors or GGUF files, or a local directory"
    more = " …" if len(models) > NUM_NAMES_SHOWN else ""
    return (
        f"name one of its {len(models)} GGUF files as {repo}:QUANTIZATION or {repo}/FILE.gguf: "
        f"{', '.join(models[:NUM_NAMES_SHOWN])}{more}"
    )


def _names(reference: HubReference) -> list[str]:
    """The names of a repository's files; none where the hub is out of reach."""
    from huggingface_hub import list_repo_files

    try:
        return list(list_repo_files(reference.repo, revision=reference.revision))
    except (OSError, ValueError):
        return []


def _ggufs(path: Path, wanted: re.Pattern[str]) -> list[str]:
    names = [str(file.relative_to(path)) for file in path.rglob("*.gguf")]
    return gguf_models(name for name in names if wanted.fullmatch(name))


def _patterns(quantization: str) -> list[str]:
    """Names of files with a quantization's name before the suffix, as all who publish write it."""
    spellings = dict.fromkeys((quantization, quantization.upper(), quantization.lower()))
    return [
        f"{start}{spelling}{end}"
        for spelling in spellings
        for start in ("*-", "*.", "*_", "*/", "")
        for end in (".gguf", "-?????-of-?????.gguf")
    ]


def _snapshot(
    reference: HubReference, patterns: list[str], *, is_whole: Callable[[Path], bool]
) -> Path:
    """The local snapshot; asks the network only if it `is_whole` not."""
    from huggingface_hub import snapshot_download

    reason = ""
    for local_files_only in (True, False):
        try:
            path = Path(
                snapshot_download(
                    reference.repo,
                    revision=reference.revision,
                    allow_patterns=patterns,
                    local_files_only=local_files_only,
                )
            )
        except (OSError, ValueError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        # Another program may have cached no more than the tokenizer.
        if is_whole(path) or not local_files_only:
            return path
    raise ValueError(
        f"model: {str(reference)!r} is no local path and could not be fetched from Hugging Face "
        f"({reason}): check the id and the network, or name a local directory"
    )
