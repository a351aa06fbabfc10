"""Which files of a directory or of a hub's repository are a model's weights.

Asked by whoever counts, loads or fetches them, so that all three mean the same files. Beside them
often lie others of the same suffix: adapters, the same weights in their maker's own layout.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from nanovllm.checkpoint.json_file import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
SHARD_PATTERN = "model-?????-of-?????.safetensors"  # the same for whoever takes patterns of files
NOT_THE_MODEL = ("consolidated", "adapter_", "optimizer", "scheduler", "training_", "mmproj")
GGUF_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of the model in `directory`; empty if there are none (yet).

    Raises `ValueError` if some that the index or a shard's name tells of are missing, and if names
    do not tell which files they are.
    """
    names = {path.name for path in directory.glob("*.safetensors")}
    chosen = _chosen(names, directory)
    if not names & set(chosen):
        return []
    if missing := sorted(set(chosen) - names):
        raise ValueError(f"model: {directory / missing[0]} is missing: fetch the checkpoint again")
    return [directory / name for name in chosen]


def indexed_files(directory: Path) -> dict[str, Path] | None:
    """Tensor name → file, by the index; None if the model has none, or is one file."""
    index = directory / INDEX
    if (directory / SINGLE).is_file() or not index.is_file():
        return None
    return {tensor: directory / name for tensor, name in _weight_map(index).items()}


def gguf_parts(path: Path, count: int) -> list[Path]:
    """All parts, in order, of the split file that `path` is one of. `ValueError`: one is missing,
    or the name of `path` is not that of a part."""
    match = GGUF_PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise ValueError(
            f"model: {path} is one of {count} parts, whose names must end in "
            f"-00001-of-{count:05}.gguf and so on: give them their names back"
        )
    parts = [path.with_name(name) for name in part_names(path.name)]
    if missing := [part for part in parts if not part.is_file()]:
        raise ValueError(f"model: {missing[0]} is missing: fetch all {count} parts")
    return parts


def part_names(name: str) -> list[str]:
    """The names of all parts of the GGUF file that `name` is a part of, or just the one."""
    match = GGUF_PART.fullmatch(name)
    if match is None:
        return [name]
    stem, count = match["stem"], match["count"]
    return [f"{stem}-{number:05}-of-{count}.gguf" for number in range(1, int(count) + 1)]


def gguf_models(names: Iterable[str]) -> list[str]:
    """The GGUF files among `names` that are models, by the first part of each."""
    found = {name for name in names if name.endswith(".gguf")}
    found = {name for name in found if not Path(name).name.startswith(NOT_THE_MODEL)}
    return sorted({part_names(name)[0] for name in found})


def _chosen(names: set[str], directory: Path) -> list[str]:
    if SINGLE in names:
        return [SINGLE]
    if (directory / INDEX).is_file():
        return sorted(set(_weight_map(directory / INDEX).values()))
    shards = {match[2] for name in names if (match := SHARD.fullmatch(name))}
    if len(shards) == 1:
        count = shards.pop()
        numbers = range(1, int(count) + 1)
        return [f"model-{number:05}-of-{count}.safetensors" for number in numbers]
    others = sorted(name for name in names if not name.startswith(NOT_THE_MODEL))
    if len(others) > 1:
        raise ValueError(
            f"model: {directory} holds {len(others)} .safetensors files ({others[0]}, "
            f"{others[1]} …), and no {INDEX} says which are the model's: fetch it, or leave only "
            f"{SINGLE} there"
        )
    return others


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"model: {index} is damaged (it has no weight_map): fetch it again")
    for tensor, name in weight_map.items():
        is_plain = isinstance(name, str) and Path(name).name == name  # it stays in its directory
        if not is_plain or not name.endswith(".safetensors"):
            raise ValueError(f"model: {index} names no file for {tensor!r}: fetch it again")
    return weight_map
