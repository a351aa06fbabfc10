"""Small GGUF files for tests, written by the `gguf` package: an independent hand at the format."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

VOCAB_SIZE, HIDDEN_SIZE = 40, 64
QuantizationType = gguf.GGMLQuantizationType


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    facts: dict[str, Any] | None = None,
    tensors: dict[str, tuple[np.ndarray, QuantizationType]] | None = None,
) -> Path:
    """A file with the metadata of a tiny model. `facts` overrides or adds; None leaves one out."""
    writer = gguf.GGUFWriter(path, architecture)
    defaults = {
        f"{architecture}.embedding_length": HIDDEN_SIZE,
        f"{architecture}.feed_forward_length": 128,
        f"{architecture}.block_count": 2,
        f"{architecture}.context_length": 512,
        f"{architecture}.attention.head_count": 4,
        f"{architecture}.attention.head_count_kv": 2,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 5000.0,
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(VOCAB_SIZE)],
        "tokenizer.ggml.eos_token_id": 2,
    }
    for key, value in {**defaults, **(facts or {})}.items():
        _add(writer, key, value)
    if tensors is None:
        tensors = {"token_embd.weight": (values(VOCAB_SIZE, HIDDEN_SIZE), QuantizationType.F32)}
    for name, (content, kind) in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(content, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            pass
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def rewrite(path: Path, content: bytes) -> None:
    """As a file of its own: one that is cut short and written again goes to the disk at once (ext4
    does so for programs that replace their files like that), which takes ten times as long."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
