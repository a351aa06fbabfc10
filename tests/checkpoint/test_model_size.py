"""Parameters by group, counted from headers or from the config: as many as the built model has."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.locate import Checkpoint, locate
from nanovllm.checkpoint.model_size import read_model_size
from nanovllm.checkpoint.spec import count_parameters
from nanovllm.worker.attention.select import attention_specs, select_attention
from nanovllm.worker.kernels.torch.layer_kernels import TorchKernels
from nanovllm.worker.models.decoder import Decoder
from tests.checkpoint.gguf_writing import QuantizationType, values, write_gguf
from tests.conftest import TINY

CPU = torch.device("cpu")


def build(checkpoint: Checkpoint) -> Decoder:
    spec = spec_from_config(checkpoint.config())
    specs = attention_specs(spec, block_size=16, dtype=torch.float32, device=CPU)
    attention, _ = select_attention("torch", specs)
    return Decoder(
        spec, kernels=TorchKernels(), attention=attention, dtype=torch.float32, device=CPU
    )


@pytest.mark.parametrize("name", list(TINY))
def test_counts_what_is_built(tiny_checkpoint: Callable[[str], Path], name: str) -> None:
    checkpoint = locate(str(tiny_checkpoint(name)))
    size, model = read_model_size(checkpoint), build(checkpoint)
    assert size.num_parameters == model.num_parameters
    assert size.source == "the files' headers"
    assert size.spec == model.spec and size.parameters == count_parameters(model.spec)
    slots = [slot for index, one in enumerate(model.layers) for slot in one.mlp.slots(index)]
    slots += [
        slot for i, one in enumerate(model.layers) if one.input for slot in one.input.slots(i)
    ]
    embedding = model.embedding.weight.numel()
    if model.layer_inputs is not None:
        embedding += model.layer_inputs.embedding.numel()
        slots += model.layer_inputs.projection.slots(None)
    sizes = [slot.target.numel() for slot in slots if not slot.part.endswith("norm")]
    assert size.parameters["mlp"] == sum(sizes)
    assert size.parameters["embedding"] == embedding
    assert (size.parameters["head"] == 0) == model.spec.tied_embeddings


def test_without_weights_the_config_says_as_much(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    from_config, from_files = (read_model_size(locate(str(path))) for path in (tmp_path, source))
    assert from_config.source == "config.json"
    assert from_config.parameters == from_files.parameters


def test_a_tied_head_that_is_stored_is_not_counted(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen2")  # tied
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    stored, plain = (read_model_size(locate(str(path))) for path in (tmp_path, source))
    assert stored.parameters == plain.parameters


def test_gguf_tensors_count_by_group(tmp_path: Path) -> None:
    tensors: dict[str, tuple[np.ndarray, QuantizationType]] = {
        "token_embd.weight": (values(40, 64), QuantizationType.Q8_0),
        "output.weight": (values(40, 64), QuantizationType.F32),
        "output_norm.weight": (values(64), QuantizationType.F32),
        "blk.0.attn_norm.weight": (values(64), QuantizationType.F32),
        "blk.0.attn_q.weight": (values(64, 64), QuantizationType.F16),
        "blk.0.attn_output.weight": (values(64, 64), QuantizationType.F16),
        "blk.0.ffn_norm.weight": (values(64), QuantizationType.F32),
        "blk.0.ffn_up.weight": (values(128, 64), QuantizationType.Q8_0),
    }
    size = read_model_size(locate(str(write_gguf(tmp_path / "m.gguf", tensors=tensors))))
    assert size.parameters == {
        "embedding": 40 * 64,
        "attention": 2 * 64 * 64,
        "mlp": 128 * 64,
        "norms": 3 * 64,
        "head": 40 * 64,
    }


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, (5).to_bytes(8, "little") + b"[1,2]", b"\x09" + b"\0" * 7 + b"{"]
)
def test_a_damaged_header_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        read_model_size(locate(str(tmp_path)))


def test_a_missing_fact_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4})
    )
    with pytest.raises(ValueError, match=r"config\.json: hidden_size is missing"):
        read_model_size(locate(str(tmp_path)))
