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
from typing import Any, NamedTuple

from msgspec.structs import replace

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.checkpoint.spec import DecoderSpec, WeightGroup, count_parameters
from nanovllm.checkpoint.weight_files import indexed_files, weight_files
from nanovllm.checkpoint.weight_names import WeightNames, tensor_name

COMPARED_BYTES = 2**24  # at a time
NATIVE_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")  # of GGUF
MAX_HEADER_BYTES = 2**28  # of a safetensors file; what is larger is no header
GROUPS: dict[str, WeightGroup] = {
    "embedding": "embedding",
    "lm_head": "head",
    **dict.fromkeys(("q", "k", "v", "o", "sinks"), "attention"),
    **dict.fromkeys(("gate", "up", "down"), "mlp"),
    **dict.fromkeys(("router", "expert_gate", "expert_up", "expert_down"), "mlp"),
    "expert_gate_up": "mlp",
    **dict.fromkeys(("layer_gate", "layer_out", "layer_projection", "expert_scale"), "mlp"),
    "layer_embedding": "embedding",
    **dict.fromkeys(("router_correction", "shared_gate", "shared_up", "shared_down"), "mlp"),
    "shared_expert_gate": "mlp",
}  # of parts; all others are norms


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What memory depends on. parameters: how many of each group; a tied head has none.

    source: where the parameters were counted, for whoever wants to know. stored_bytes: of a GGUF
    file, what each group takes where native kernels keep it as it is.
    """

    spec: DecoderSpec
    parameters: dict[WeightGroup, int]
    source: str
    stored_bytes: dict[WeightGroup, int] | None = None

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())


def read_model_size(checkpoint: Checkpoint) -> ModelSize:
    """The size of a checkpoint. Raises `ValueError` naming what is missing or damaged."""
    shapes = dict(_tensor_shapes(checkpoint))
    config = checkpoint.config()
    spec = spec_from_config(config)
    if spec.tied_embeddings and _stores_another_head(checkpoint, spec):
        spec = replace(spec, tied_embeddings=False)
    if not shapes or "quantization_config" in config:  # whose packed weights have other shapes
        return ModelSize(spec=spec, parameters=count_parameters(spec), source="config.json")
    is_gguf = checkpoint.format == "gguf"
    names = spec.names.gguf if is_gguf else spec.names.safetensors
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return ModelSize(
        spec=spec,
        parameters=_count(sizes, names, spec),
        source="the files' headers",
        stored_bytes=_count(_kept_bytes(checkpoint), names, spec) if is_gguf else None,
    )


def _kept_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Of each tensor of a GGUF file, as native kernels keep it: what they do not multiply by, in
    half precision."""
    return {
        name: tensor.raw.nbytes
        if tensor.type.name in NATIVE_TYPES or len(tensor.shape) == 1
        else 2 * math.prod(tensor.shape)
        for name, tensor in checkpoint.gguf.tensors.items()
    }


def _stores_another_head(checkpoint: Checkpoint, spec: DecoderSpec) -> bool:
    """Whether a head is stored that is not the embedding: then it is the head, whatever the config
    says of tying, as in transformers 5. (GGUF has no such field to contradict.)"""
    if checkpoint.format == "gguf":
        return False
    embedding, head = (
        _stored(checkpoint.path, spec.names, f"{spec.names.safetensors[part]}.weight")
        for part in ("embedding", "lm_head")
    )
    if embedding is None or head is None:
        return False
    if embedding.kind != head.kind or embedding.num_bytes != head.num_bytes:
        return True
    with embedding.path.open("rb") as one, head.path.open("rb") as other:
        one.seek(embedding.start)
        other.seek(head.start)
        for done in range(0, head.num_bytes, COMPARED_BYTES):
            size = min(COMPARED_BYTES, head.num_bytes - done)
            if one.read(size) != other.read(size):
                return True
    return False


class _Stored(NamedTuple):
    """Where a tensor's bytes lie. kind: its dtype and shape."""

    path: Path
    kind: tuple[str, tuple[int, ...]]
    start: int
    num_bytes: int


def _stored(directory: Path, names: WeightNames, wanted: str) -> _Stored | None:
    files = indexed_files(directory)
    for path in weight_files(directory):
        header = _safetensors_header(path)
        name = next((name for name in header if names.known(name) == wanted), wanted)
        entry = header.get(name)
        if entry is not None and (files is None or files.get(name) == path):
            with path.open("rb") as file:
                start = 8 + int.from_bytes(file.read(8), "little")
            first, end = entry["data_offsets"]
            kind = entry["dtype"], tuple(entry["shape"])
            return _Stored(path, kind, start + first, end - first)
    return None


def _count(
    sizes: dict[str, int], names: dict[str, str], spec: DecoderSpec
) -> dict[WeightGroup, int]:
    """What the model takes of the files: scales, for one, are no parameters. sizes: of tensors."""
    counts: dict[WeightGroup, int] = dict.fromkeys(count_parameters(spec), 0)
    groups = {
        tensor_name(name, kind): GROUPS.get(part, "norms")
        for part, name in names.items()
        for kind in ("weight", "bias", "")
        # a tied head is perhaps stored though the embedding serves
        if part != "lm_head" or not spec.tied_embeddings
    }
    for stored, size in sizes.items():
        name = spec.names.known(stored)
        if name is None:
            continue
        whole = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)
        group = groups.get(whole)
        if group is not None:
            counts[group] += size
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
