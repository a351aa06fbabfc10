"""How large a model is, by its config.json and the headers of its files alone; no torch.

Read by `memory_plan` for `nanovllm plan` and for the worker's check before it loads. Shapes come
from the files where there are any, else from the config.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.checkpoint.spec import DecoderSpec, WeightGroup, count_parameters
from nanovllm.checkpoint.weight_files import indexed_files, weight_files

MAX_HEADER_BYTES = 2**28  # of a safetensors file; what is larger is no header
GROUPS: dict[str, WeightGroup] = {
    "embedding": "embedding",
    "lm_head": "head",
    **dict.fromkeys(("q", "k", "v", "o", "sinks"), "attention"),
    **dict.fromkeys(("router", "gate", "up", "down"), "mlp"),
}  # of parts; all others are norms
KINDS = re.compile(r"\.(weight|bias)$")


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What memory depends on. parameters: how many of each group; a tied head has none.

    source: where the parameters were counted, for whoever wants to know.
    """

    spec: DecoderSpec
    parameters: dict[WeightGroup, int]
    source: str

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())


def read_model_size(checkpoint: Checkpoint) -> ModelSize:
    """The size of a checkpoint. Raises `ValueError` naming what is missing or damaged."""
    shapes = list(_tensor_shapes(checkpoint))
    spec = spec_from_config(checkpoint.config())
    if not shapes:
        return ModelSize(spec=spec, parameters=count_parameters(spec), source="config.json")
    is_gguf = checkpoint.format == "gguf"
    names = spec.names.gguf if is_gguf else spec.names.safetensors
    return ModelSize(spec=spec, parameters=_count(shapes, names, spec), source="the files' headers")


def _count(
    shapes: list[tuple[str, tuple[int, ...]]], names: dict[str, str], spec: DecoderSpec
) -> dict[WeightGroup, int]:
    """What the model takes of the files: scales, for one, are no parameters."""
    counts: dict[WeightGroup, int] = dict.fromkeys(count_parameters(spec), 0)
    groups = {name: GROUPS.get(part, "norms") for part, name in names.items()}
    if spec.tied_embeddings:
        del groups[names["lm_head"]]  # perhaps stored though the embedding serves
    for name, shape in shapes:
        module, is_parameter = KINDS.subn("", name)
        group = groups.get(re.sub(r"(?<=\.)\d+(?=\.)", "{}", module)) if is_parameter else None
        if group is not None:
            counts[group] += math.prod(shape)
    return counts


def _tensor_shapes(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor; none if the checkpoint has no weights (yet)."""
    if checkpoint.format == "gguf":
        for name, tensor in checkpoint.gguf.tensors.items():
            yield name, tensor.shape
        return
    files = indexed_files(checkpoint.path)
    for path in weight_files(checkpoint.path):
        for name, entry in _safetensors_header(path).items():
            if name != "__metadata__" and (files is None or files.get(name) == path):
                yield name, tuple(entry["shape"])


def _safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON that a safetensors file begins with; its length comes first, in eight bytes."""
    try:
        with path.open("rb") as file:
            num_bytes = int.from_bytes(file.read(8), "little")
            if num_bytes > MAX_HEADER_BYTES:
                raise ValueError
            header = json.loads(file.read(num_bytes))
            if not isinstance(header, dict):
                raise ValueError
    except ValueError:  # also what JSON and UTF-8 raise
        raise ValueError(f"{path} is truncated or damaged in its header: fetch it again") from None
    return header
