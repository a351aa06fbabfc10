"""How large a model is, by its config.json and the headers of its files alone; no torch.

Read by `memory_plan` for `nanovllm plan` and for the worker's check before it loads. Shapes come
from the files where there are any, else from the config.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanovllm.checkpoint.locate import Checkpoint

WeightGroup = Literal["embedding", "attention", "mlp", "norms", "head"]
MAX_HEADER_BYTES = 2**28  # of a safetensors file; what is larger is no header

# The first pattern found in a tensor's name says what it belongs to; whatever is left is a norm.
GROUP_PATTERNS: dict[WeightGroup, re.Pattern[str]] = {
    "embedding": re.compile(r"embed_tokens|token_embd"),
    "head": re.compile(r"lm_head|^output\."),
    "attention": re.compile(r"self_attn\.[a-z]+_proj|attn_(q|k|v|output)\."),
    "mlp": re.compile(r"\.mlp\.|ffn_(gate|up|down)"),
}
# Follow from the config, or belong to a quantized neighbour; never loaded as weights.
NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq|rope_freqs|_scale(_inv)?$|zero_point$")


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What memory depends on. parameters: how many of each group; a tied head has none.

    stored_dtype: of the checkpoint, as config.json calls it; None if it does not say. source: where
    the parameters were counted, for whoever wants to know.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    tied_embeddings: bool
    stored_dtype: str | None
    parameters: dict[WeightGroup, int]
    source: str

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def qkv_size(self) -> int:
        """Outputs of the merged query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def read_model_size(checkpoint: Checkpoint) -> ModelSize:
    """The size of a checkpoint. Raises `ValueError` naming what is missing or damaged."""
    config = checkpoint.config()
    parameters, source = None, "config.json"
    shapes = _tensor_shapes(checkpoint)
    if shapes:
        parameters = _count(shapes, tied=bool(config.get("tie_word_embeddings", False)))
        source = "the files' headers"
    return _from_config(config, parameters, source)


def _from_config(
    config: dict[str, Any], parameters: dict[WeightGroup, int] | None, source: str
) -> ModelSize:
    def fact(name: str) -> int:
        value = config.get(name)
        if not isinstance(value, int):
            raise ValueError(f"config.json: {name} is missing: fetch the checkpoint again")
        return value

    num_heads, hidden_size = fact("num_attention_heads"), fact("hidden_size")
    tied = bool(config.get("tie_word_embeddings", False))
    head_dim = config.get("head_dim") or hidden_size // num_heads
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    num_layers, inner, vocab_size = (
        fact(name) for name in ("num_hidden_layers", "intermediate_size", "vocab_size")
    )
    if parameters is None:
        attention = hidden_size * head_dim * (2 * num_heads + 2 * num_kv_heads)
        parameters = {
            "embedding": vocab_size * hidden_size,
            "attention": num_layers * attention,
            "mlp": num_layers * 3 * hidden_size * inner,
            "norms": (2 * num_layers + 1) * hidden_size,
            "head": 0 if tied else vocab_size * hidden_size,
        }
    return ModelSize(
        architecture=(config.get("architectures") or ["unknown"])[0],
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=inner,
        vocab_size=vocab_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fact("max_position_embeddings"),
        tied_embeddings=tied,
        stored_dtype=config.get("dtype") or config.get("torch_dtype"),
        parameters=parameters,
        source=source,
    )


def _count(shapes: Iterable[tuple[str, tuple[int, ...]]], *, tied: bool) -> dict[WeightGroup, int]:
    counts: dict[WeightGroup, int] = dict.fromkeys(
        ("embedding", "attention", "mlp", "norms", "head"), 0
    )
    for name, shape in shapes:
        if NOT_WEIGHTS.search(name):
            continue
        group: WeightGroup = "norms"
        for candidate, pattern in GROUP_PATTERNS.items():
            if pattern.search(name):
                group = candidate
                break
        if not (tied and group == "head"):  # stored though the embedding serves
            counts[group] += math.prod(shape)
    return counts


def _tensor_shapes(checkpoint: Checkpoint) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor; empty if the checkpoint has no weights (yet)."""
    if checkpoint.format == "gguf":
        return [(name, tensor.shape) for name, tensor in checkpoint.gguf.tensors.items()]
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(checkpoint.path.glob("*.safetensors")):
        for name, entry in _safetensors_header(path).items():
            if name != "__metadata__":
                shapes[name] = tuple(entry["shape"])
    return list(shapes.items())


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
