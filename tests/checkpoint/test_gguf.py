"""The GGUF parser against the gguf package's writer, and against damaged and foreign files."""

import math
import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.gguf import GGUFFile, hf_config
from tests.checkpoint.gguf_writing import (
    HIDDEN_SIZE,
    VOCAB_SIZE,
    QuantizationType,
    rewrite,
    values,
    write_gguf,
)

# All that the gguf package can also quantize to; it dequantizes more.
QUANTIZED = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def test_metadata_of_every_kind(tmp_path: Path) -> None:
    facts = {
        "a.text": "grüße 🙂",
        "a.yes": True,
        "a.int": 2**32 - 1,
        "a.float": 0.5,
        "a.texts": ["", "one", "zwei ü"],
        "a.ints": [1, -2, 3],
        "a.floats": [0.25, -1.5],
        "a.flags": [True, False],
    }
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", facts=facts))
    assert {key: file.metadata[key] for key in facts} == facts
    assert file.metadata["general.architecture"] == "llama"


@pytest.mark.parametrize("name", QUANTIZED)
def test_tensors_come_back_in_torch_order(tmp_path: Path, name: str) -> None:
    kind, content = QuantizationType[name], values(6, 256)
    path = write_gguf(
        tmp_path / "m.gguf",
        tensors={"first": (values(5), QuantizationType.F32), "second": (content, kind)},
    )
    tensor = GGUFFile(path).tensors["second"]
    assert tensor.shape == (6, 256) and tensor.type is kind
    found = tensor.dequantize()
    assert found.dtype == np.float32 and found.shape == (6, 256)
    expected = gguf.quants.dequantize(gguf.quants.quantize(content, kind), kind)
    np.testing.assert_array_equal(found, expected)
    assert abs(found - content).max() < 0.5, "and quantizing is not wildly off either"


def test_tensors_of_one_and_three_dimensions(tmp_path: Path) -> None:
    contents = {"flat": values(7), "deep": values(2, 3, 32)}
    tensors = {name: (content, QuantizationType.F32) for name, content in contents.items()}
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", tensors=tensors))
    for name, content in contents.items():
        np.testing.assert_array_equal(file.tensors[name].dequantize(), content)


def test_alignment_other_than_the_default(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(128)
    for seed in (1, 2):
        writer.add_tensor(f"t{seed}", values(3, seed=seed))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = GGUFFile(tmp_path / "m.gguf").tensors
    for seed in (1, 2):
        np.testing.assert_array_equal(tensors[f"t{seed}"].dequantize(), values(3, seed=seed))


# ---- files that are not what they say


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "too short"),
        (b"GGUF", "too short"),
        (b"PK\x03\x04" + bytes(40), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "damaged"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        GGUFFile(path)
    assert str(path) in str(caught.value)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "part.gguf"
    num_padding = -VOCAB_SIZE * HIDDEN_SIZE * 4 % 32  # after the last tensor: nobody's loss
    for size in [*range(24, 2000, 7), len(whole) - 4096, len(whole) - num_padding - 1]:
        rewrite(path, whole[:size])
        with pytest.raises(ValueError, match=r"part\.gguf is truncated"):
            GGUFFile(path)


def test_damage_costs_a_value_error_at_most(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "damaged.gguf"
    rng = random.Random(0)
    num_noticed = 0
    for _ in range(2000):
        damaged = bytearray(whole)
        at = rng.randrange(1500)
        damaged[at : at + 4] = rng.randbytes(4)
        rewrite(path, damaged)
        try:
            hf_config(GGUFFile(path))
        except ValueError as error:
            num_noticed += 1
            assert str(path) in str(error)
    assert num_noticed > 200


def test_unknown_tensor_types_name_the_remedy(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    at = content.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    content[at : at + 4] = struct.pack("<I", 999)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"token_embd\.weight.*type 999.*newer gguf"):
        GGUFFile(path)


def test_types_gguf_cannot_decode_name_the_remedy(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tensors={"t": (values(4, 32), QuantizationType.F32)})
    content = bytearray(path.read_bytes())
    at = content.index(b"\x01" + bytes(7) + b"t") + 9 + 4 + 2 * 8
    content[at : at + 4] = struct.pack("<I", QuantizationType.I32)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"'t' has type I32.*another quantization"):
        GGUFFile(path).tensors["t"].dequantize()


# ---- Hugging Face's form of the metadata


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("llama", "LlamaForCausalLM"),
        ("qwen2", "Qwen2ForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
    ],
)
def test_config_of_each_architecture(tmp_path: Path, architecture: str, expected: str) -> None:
    config = hf_config(GGUFFile(write_gguf(tmp_path / "m.gguf", architecture=architecture)))
    assert config["architectures"] == [expected]
    assert config["hidden_size"] == HIDDEN_SIZE and config["head_dim"] == HIDDEN_SIZE // 4
    assert config["num_attention_heads"] == 4 and config["num_key_value_heads"] == 2
    assert config["vocab_size"] == VOCAB_SIZE and config["max_position_embeddings"] == 512
    assert config["rope_theta"] == 5000.0 and config["rope_scaling"] is None
    assert config["tie_word_embeddings"] is True


def test_untied_embeddings_and_a_head_dim_of_its_own(tmp_path: Path) -> None:
    embedding = (values(VOCAB_SIZE, HIDDEN_SIZE), QuantizationType.F32)
    path = write_gguf(
        tmp_path / "m.gguf",
        architecture="qwen3",
        facts={"qwen3.attention.key_length": 32},
        tensors={"token_embd.weight": embedding, "output.weight": embedding},
    )
    config = hf_config(GGUFFile(path))
    assert config["tie_word_embeddings"] is False and config["head_dim"] == 32


def llama3_divisors(factor: float, theta: float, head_dim: int) -> np.ndarray:
    """As llama.cpp's converter computes them, one frequency at a time."""
    divisors = []
    for i in range(0, head_dim, 2):
        period = 2 * math.pi * theta ** (i / head_dim)
        if period < 8192 / 4.0:
            divisors.append(1.0)
        elif period > 8192 / 1.0:
            divisors.append(factor)
        else:
            smooth = (8192 / period - 1.0) / (4.0 - 1.0)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


def with_rope_divisors(path: Path, divisors: np.ndarray) -> GGUFFile:
    write_gguf(
        path,
        facts={
            "llama.rope.freq_base": 500000.0,
            "llama.embedding_length": 512,
            "llama.attention.head_count": 4,
        },
        tensors={
            "token_embd.weight": (values(VOCAB_SIZE, 512), QuantizationType.F16),
            "rope_freqs.weight": (divisors, QuantizationType.F32),
        },
    )
    return GGUFFile(path)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recovered(tmp_path: Path, factor: float) -> None:
    divisors = llama3_divisors(factor, 500000.0, 128)
    assert hf_config(with_rope_divisors(tmp_path / "m.gguf", divisors))["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_other_rope_scalings_are_refused(tmp_path: Path) -> None:
    divisors = llama3_divisors(8.0, 500000.0, 128)
    divisors[40] *= 1.01
    with pytest.raises(ValueError, match=r"unknown way.*safetensors"):
        hf_config(with_rope_divisors(tmp_path / "m.gguf", divisors))
    with pytest.raises(ValueError, match=r"'yarn' is not supported.*safetensors"):
        facts = {"llama.rope.scaling.type": "yarn"}
        hf_config(GGUFFile(write_gguf(tmp_path / "yarn.gguf", facts=facts)))


@pytest.mark.parametrize(
    ("facts", "factor"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 4.0}, 4.0),
        ({"rope.scaling.factor": 2.0, "rope.scale_linear": 4.0}, 2.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scaling.factor": 0.0}, None),
        ({"rope.scale_linear": 1.0}, None),
    ],
)
def test_linear_rope_scaling_in_all_spellings(
    tmp_path: Path, facts: dict[str, object], factor: float | None
) -> None:
    given = {f"llama.{key}": value for key, value in facts.items()}
    config = hf_config(GGUFFile(write_gguf(tmp_path / "m.gguf", facts=given)))
    scaling = config["rope_scaling"]
    assert scaling == (None if factor is None else {"rope_type": "linear", "factor": factor})
    assert spec_from_config(config).max_position_embeddings == 512 * (factor or 1)


def test_lists_for_layers_that_are_alike(tmp_path: Path) -> None:
    facts = {"attention.head_count": [4, 4], "attention.head_count_kv": [2, 2]}
    facts["feed_forward_length"] = [128, 128]
    given = {f"llama.{key}": value for key, value in facts.items()}
    plain = hf_config(GGUFFile(write_gguf(tmp_path / "plain.gguf")))
    assert hf_config(GGUFFile(write_gguf(tmp_path / "m.gguf", facts=given))) == plain


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("attention.head_count_kv", [2, 4], "head_count_kv differs by layer"),
        ("feed_forward_length", [128, 64], "feed_forward_length differs by layer"),
        ("rope.dimension_count", 8, "dimension_count=8 changes what a model computes"),
        ("attention.value_length", 8, "value_length=8 changes what a model computes"),
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping=50.0 changes what"),
        ("residual_scale", 0.5, "residual_scale=0.5 changes what"),
    ],
)
def test_maths_that_nobody_does_is_refused(
    tmp_path: Path, key: str, value: object, reason: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", facts={f"llama.{key}": value})
    with pytest.raises(ValueError, match=reason):
        hf_config(GGUFFile(path))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "mamba"}, "'mamba' is not supported: supported are cohere2, gemma2"),
        ({"facts": {"llama.block_count": None}}, "llama.block_count is missing"),
        ({"facts": {"llama.expert_count": 8}}, "expert_used_count is missing"),
        ({"architecture": "qwen3", "facts": {"qwen3.expert_count": 8}}, "qwen3.expert_count=8"),
        ({"tensors": {}}, "no token_embd.weight"),
    ],
)
def test_what_cannot_run_is_said(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=reason):
        hf_config(GGUFFile(path))
