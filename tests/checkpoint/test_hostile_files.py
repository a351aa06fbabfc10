"""A damaged or hostile model file costs an error that names it: never a crash, a hang or memory."""

import json
import struct
import tracemalloc
from pathlib import Path

import pytest

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.gguf import GGUFFile
from nanovllm.checkpoint.weight_files import weight_files
from tests.checkpoint import mutations

STRING, ARRAY, UINT8 = 8, 9, 0


def gguf_bytes(*entries: bytes, num_tensors: int = 0, num_entries: int | None = None) -> bytes:
    count = len(entries) if num_entries is None else num_entries
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, count) + b"".join(entries)


def entry(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


@pytest.mark.parametrize("seed", range(4))
def test_files_changed_at_random_are_good_or_refused(tmp_path: Path, seed: int) -> None:
    for kind, outcomes in mutations.run(160, tmp_path, seed=seed).items():
        assert outcomes["refused"], kind


@pytest.mark.parametrize(
    "content",
    [
        gguf_bytes(num_entries=2**63),
        gguf_bytes(num_tensors=2**63),
        gguf_bytes(entry(b"a", STRING, struct.pack("<Q", 2**63))),
        gguf_bytes(entry(b"a", ARRAY, struct.pack("<IQ", UINT8, 2**62))),
        gguf_bytes(entry(b"a", ARRAY, struct.pack("<IQ", STRING, 2**62))),
        gguf_bytes(entry(b"a", ARRAY, struct.pack("<IQ", ARRAY, 3))),
        gguf_bytes(entry(b"a", ARRAY, struct.pack("<IQ", UINT8, 5 << 20) + bytes(5 << 20))),
        gguf_bytes(entry(b"a", STRING, struct.pack("<Q", 20 << 20) + b"x" * (20 << 20))),
    ],
    ids=["entries", "tensors", "string", "array", "strings", "nested", "numbers", "long string"],
)
def test_counts_and_lengths_that_lie(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"m\.gguf"):
            GGUFFile(path)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(content) + 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "name", ["../other/a.safetensors", "/etc/passwd", "sub/a.safetensors", ".."]
)
def test_an_index_does_not_leave_its_directory(tmp_path: Path, name: str) -> None:
    index = {"weight_map": {"a": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", {}),
        ("num_attention_heads", 0),
        ("architectures", [{}]),
        ("num_hidden_layers", 2**31),
    ],
)
def test_a_config_that_makes_no_sense(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        spec_from_config({**mutations.CONFIG, field: value})
