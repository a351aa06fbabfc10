"""Reads GGUF files: metadata as plain values, tensors as memory-mapped blocks to dequantize.

The metadata is parsed here, not by `gguf.GGUFReader`: that makes a numpy array per vocabulary entry
and takes 2.2 s for a 49k vocabulary, which alone would be a third of the start-up budget. Block
formats and dequantization are the `gguf` package's. Used by `checkpoint`, tokenizer and weights.
"""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nanovllm.checkpoint.gguf_families import ARCHITECTURES
from nanovllm.checkpoint.weight_files import gguf_parts

if TYPE_CHECKING:
    import gguf  # else with the first such file: most starts read none

SUPPORTED_VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_STRING_BYTES = 1 << 24  # templates are the longest
MAX_NUMBERS = 1 << 22  # in all arrays: vocabularies have two for each token
PARTS_KEY, NUM_TENSORS_KEY = "split.count", "split.tensors.count"
# What counts, lengths and alignments that are not what they should be run into.
NONSENSE = (OverflowError, MemoryError, TypeError, ZeroDivisionError)

# GGUF metadata value types (ggml/docs/gguf.md): id → struct format of the scalar ones
SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a file. `shape` is torch's order, outermost first (GGUF stores it reversed)."""

    name: str
    shape: tuple[int, ...]
    type: "gguf.GGMLQuantizationType"
    raw: npt.NDArray[np.uint8]  # [rows, bytes per row], memory-mapped

    def dequantize(self) -> npt.NDArray[np.float32]:
        """All values as float32, in `shape`. Raises `ValueError` for types gguf cannot decode."""
        import gguf

        try:
            values = gguf.quants.dequantize(self.raw, self.type)
        except NotImplementedError as error:
            raise ValueError(
                f"tensor {self.name!r} has type {self.type.name}, which cannot be dequantized: "
                "use another quantization of the model"
            ) from error
        return values.astype(np.float32, copy=False).reshape(self.shape)


class GGUFFile:
    """A GGUF file, version 2 or 3, little endian.

    metadata: key → int, float, bool, str or list of these. tensors: name → `GGUFTensor`, as stored:
    of architecture "llama" (Llama, Mistral, SmolLM2 …) llama.cpp has permuted the rows of
    `attn_q` and `attn_k` within each head for its interleaved rotary embedding; `worker.weights`
    undoes that. Raises `ValueError` naming the file if it is foreign or truncated.
    """

    def __init__(self, path: Path, *, with_parts: bool = True) -> None:
        """path: of a split file any part, which brings all others unless with_parts is false."""
        self.path = path
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise ValueError(f"{path} is too short to be a GGUF file: fetch it again")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        self._num_numbers = 0
        try:
            num_tensors, num_entries = self._header()
            self.metadata = dict(self._entry() for _ in range(num_entries))
            infos = [self._tensor_info() for _ in range(num_tensors)]
            alignment = self.metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
            start = -(-self._at // alignment) * alignment
        except (struct.error, IndexError, *NONSENSE) as error:
            raise ValueError(
                f"{path} is truncated or damaged in its metadata: fetch it again"
            ) from error
        self.tensors = {
            name: self._tensor(name, shape, type_id, start + offset)
            for name, shape, type_id, offset in infos
        }
        count = self.metadata.get(PARTS_KEY)
        if with_parts and isinstance(count, int) and count > 1:
            self._join(gguf_parts(path, count))

    def _join(self, paths: list[Path]) -> None:
        """Take in the tensors of all other parts, and the first one's metadata, which is whole."""
        files = [self if p == self.path else GGUFFile(p, with_parts=False) for p in paths]
        self.metadata = files[0].metadata
        tensors: dict[str, GGUFTensor] = {}
        for file in files:
            if twice := tensors.keys() & file.tensors.keys():
                raise ValueError(
                    f"{file.path} and a part before it both hold {min(twice)}: fetch all parts of "
                    "one model again"
                )
            tensors |= file.tensors
        wanted = self.metadata.get(NUM_TENSORS_KEY, len(tensors))
        if wanted != len(tensors):
            raise ValueError(
                f"{self.path}: its {len(paths)} parts hold {len(tensors)} tensors, where the first "
                f"tells of {wanted}: fetch all parts of one model again"
            )
        self.tensors = tensors

    # ---- parsing, at `self._at`

    def _header(self) -> tuple[int, int]:
        magic, version = self._map[:4], self._unpack("I", 4)[0]
        if magic != b"GGUF":
            raise ValueError(f"{self.path} is not a GGUF file (it begins with {magic!r})")
        if version not in SUPPORTED_VERSIONS:
            raise ValueError(
                f"{self.path} is GGUF version {version}: supported are {SUPPORTED_VERSIONS}, "
                "little endian"
            )
        num_tensors, num_entries = self._unpack("QQ", 8)
        return num_tensors, num_entries

    def _unpack(self, code: str, at: int | None = None) -> tuple[Any, ...]:
        start = self._at if at is None else at
        layout = struct.Struct("<" + code)
        self._at = start + layout.size
        return layout.unpack_from(self._map, start)

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        start = self._at
        self._at += length
        if self._at > len(self._map) or length > MAX_STRING_BYTES:
            raise IndexError(self._at)
        return str(self._map[start : self._at], "utf-8", "replace")

    def _entry(self) -> tuple[str, Any]:
        key = self._string()
        (type_id,) = self._unpack("I")
        return key, self._value(type_id)

    def _value(self, type_id: int) -> Any:
        if type_id == STRING:
            return self._string()
        if type_id == ARRAY:
            item_type, count = self._unpack("IQ")
            if item_type == STRING:
                return self._strings(count)
            self._num_numbers += count
            if self._num_numbers > MAX_NUMBERS:
                raise IndexError(count)
            return list(self._unpack(f"{count}{self._scalar(item_type)}"))
        return self._unpack(self._scalar(type_id))[0]

    def _scalar(self, type_id: int) -> str:
        if type_id not in SCALARS:
            raise ValueError(f"{self.path} has a metadata value of unknown type {type_id}")
        return SCALARS[type_id]

    def _strings(self, count: int) -> list[str]:
        """Many strings at once: vocabularies are most of the metadata, and start-up waits."""
        data, at = self._map, self._at
        lengths: Callable[[mmap.mmap, int], tuple[int]] = struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(count):
            (length,) = lengths(data, at)
            end = at + 8 + length
            strings.append(str(data[at + 8 : end], "utf-8", "replace"))
            at = end
        if at > len(data):
            raise IndexError(at)
        self._at = at
        return strings

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (num_dims,) = self._unpack("I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise IndexError(num_dims)
        shape = self._unpack(f"{num_dims}Q")[::-1]
        type_id, offset = self._unpack("IQ")
        return name, shape, type_id, offset

    def _tensor(self, name: str, shape: tuple[int, ...], type_id: int, start: int) -> GGUFTensor:
        import gguf

        try:
            tensor_type = gguf.GGMLQuantizationType(type_id)
            block_size, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
        except (ValueError, KeyError):
            raise ValueError(
                f"{self.path}: tensor {name!r} has unknown type {type_id}: "
                "install a newer gguf package, or use another quantization of the model"
            ) from None
        row_bytes = shape[-1] // block_size * block_bytes
        num_rows = math.prod(shape[:-1])
        end = start + num_rows * row_bytes
        if shape[-1] % block_size or end > len(self._map):
            raise ValueError(
                f"{self.path} is truncated or damaged: tensor {name!r} of shape {shape} "
                f"would end at byte {end}, the file ends at {len(self._map)}: fetch it again"
            )
        raw = np.frombuffer(self._map, np.uint8, count=end - start, offset=start)
        return GGUFTensor(name, shape, tensor_type, raw.reshape(num_rows, row_bytes))


# ---- Hugging Face's names for the same facts

# What Llama 3.1, 3.2 and 3.3 share of their rope scaling.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192

PER_LAYER = {"attention.sliding_window_pattern"}  # keys whose lists are understood
# Metadata that changes what some architecture computes, and values with which it changes nothing.
MATHS: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.key_length_swa": (),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window_pattern": (0, 1),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.dimension_sections": (),
    "rope.freq_base_swa": (),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """A file's metadata in the form of a Hugging Face config.json.

    llama.cpp stores Mistral as "llama" too. Raises `ValueError` naming the file for architectures
    and rope scalings that are not supported, and for facts that are missing.
    """
    metadata = file.metadata
    name = str(metadata.get("general.architecture"))
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: architecture {name!r} is not supported: "
            f"supported are {', '.join(sorted(ARCHITECTURES))}"
        )
    architecture = ARCHITECTURES[name]
    facts = _Facts(file, name)
    fact = facts.fact
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} holds no token_embd.weight: name the model's first part")
    num_heads, theta = fact("attention.head_count"), fact("rope.freq_base", 10000.0)
    head_dim = fact("attention.key_length", fact("embedding_length") // num_heads)
    # Where norms are layer norms, the architecture reads another key.
    eps = fact("attention.layer_norm_rms_epsilon") if _has_rms_norms(file, name) else None
    common = {
        "architectures": [architecture.architecture],
        "model_type": architecture.model_type,
        "hidden_size": fact("embedding_length"),
        "intermediate_size": fact("feed_forward_length"),
        "num_hidden_layers": fact("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fact("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, facts, theta=theta, head_dim=head_dim),
        "max_position_embeddings": fact("context_length"),
        "sliding_window": fact("attention.sliding_window", 0) or None,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    config = common | architecture.fields(facts, common)
    _check_maths(file, name, head_dim=head_dim, read=facts.read)
    return config


class _Facts:
    """Implements `gguf_families.Facts`; remembers which keys have been read."""

    def __init__(self, file: GGUFFile, name: str) -> None:
        self._file, self._name = file, name
        self.read: set[str] = set()

    def has(self, key: str) -> bool:
        return f"{self._name}.{key}" in self._file.metadata

    def fact(self, key: str, default: Any = None) -> Any:
        path, full = self._file.path, f"{self._name}.{key}"
        self.read.add(key)
        value = self._file.metadata.get(full, default)
        if value is None:
            raise ValueError(f"{path}: metadata {full} is missing: fetch it again")
        if key in PER_LAYER:
            return value
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]  # one for each layer, all the same
        if isinstance(value, list):
            raise ValueError(
                f"{path}: metadata {full} differs by layer, which is not supported: "
                "use a model whose layers are alike"
            )
        return value

    def values(self, tensor: str) -> npt.NDArray[np.float32] | None:
        found = self._file.tensors.get(tensor)
        return None if found is None else found.dequantize()


def _has_rms_norms(file: GGUFFile, name: str) -> bool:
    return f"{name}.attention.layer_norm_epsilon" not in file.metadata


def _check_maths(file: GGUFFile, name: str, *, head_dim: int, read: set[str]) -> None:
    """Raises `ValueError` naming what asks for maths that nobody does. name: the architecture;
    read: keys that have been understood."""
    sizes = dict.fromkeys(("attention.value_length", "rope.dimension_count"), (head_dim,))
    for key, neutral in {**MATHS, **sizes}.items():
        value = file.metadata.get(f"{name}.{key}")
        if value is not None and value not in neutral and key not in read:
            raise ValueError(
                f"{file.path}: metadata {name}.{key}={value!r} changes what a model computes, and "
                f"is not supported for {name!r}"
            )


def _rope_scaling(
    file: GGUFFile, facts: _Facts, *, theta: float, head_dim: int
) -> dict[str, Any] | None:
    """The rope scaling as config.json would give it; None if there is none.

    llama.cpp stores Llama 3's as a tensor of divisors, one per frequency. Its four parameters are
    not stored: all released models share three of them and the fourth is the largest divisor, so
    they are recovered here, and believed only if they give the stored tensor back.
    """
    # The second is the older name.
    factor = facts.fact("rope.scaling.factor", facts.fact("rope.scale_linear", 0))
    # As in llama.cpp, which scales linearly unless told otherwise, and for which 0 is no factor.
    kind = facts.fact("rope.scaling.type", "linear")
    if kind == "yarn" and factor:
        return _yarn(facts, factor)
    is_scaled = kind == "linear" and factor not in (0, 1)
    if kind not in ("none", "linear") or (is_scaled and "rope_freqs.weight" in file.tensors):
        raise ValueError(
            f"{file.path}: rope scaling {kind!r} is not supported from GGUF"
            f"{' beside rope_freqs.weight' if is_scaled else ''}: use the model's safetensors"
        )
    if is_scaled:
        return {"rope_type": "linear", "factor": factor}
    if "rope_freqs.weight" not in file.tensors:
        return None
    stored = file.tensors["rope_freqs.weight"].dequantize()  # [head_dim / 2]
    factor = float(stored.max())
    periods = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)  # in positions
    blend = np.clip((LLAMA3_CONTEXT / periods - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0.0, 1.0)
    expected = 1 / ((1 - blend) / factor + blend)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4):
        raise ValueError(
            f"{file.path}: the rope frequencies are scaled in an unknown way: "
            "use the model's safetensors"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }


def _yarn(facts: _Facts, factor: float) -> dict[str, Any]:
    """attn_factor: as config.json has attention_factor, where it has one."""
    context = facts.fact("rope.scaling.original_context_length")
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context}
    for field, key in (
        ("beta_fast", "yarn_beta_fast"),
        ("beta_slow", "yarn_beta_slow"),
        ("attention_factor", "attn_factor"),
    ):
        if value := facts.fact(f"rope.scaling.{key}", 0):
            scaling[field] = value
    return scaling
