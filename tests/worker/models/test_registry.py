"""Configs in: specs out, or a reason why not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nanovllm.worker.layers.rotary import (
    LinearScaling,
    Llama3Scaling,
    Rope,
    cos_sin_table,
    inverse_frequencies,
)
from nanovllm.worker.models.registry import dtype_from_config, spec_from_config
from tests.conftest import LLAMA3_ROPE, TINY

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"]}
SCALING = Llama3Scaling(8.0, 1.0, 4.0, original_context=64)


@pytest.mark.parametrize("name", TINY)
def test_config_as_transformers_reads_it(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    path = tiny_checkpoint(name)
    spec = spec_from_config(json.loads((path / "config.json").read_text()))
    theirs = AutoConfig.from_pretrained(path)
    assert spec.num_layers == theirs.num_hidden_layers
    assert spec.num_kv_heads == theirs.num_key_value_heads
    assert spec.head_dim == (getattr(theirs, "head_dim", None) or 12)
    assert spec.rms_norm_eps == theirs.rms_norm_eps
    assert spec.rope.theta == theirs.rope_parameters["rope_theta"]
    assert spec.tied_embeddings == theirs.tie_word_embeddings
    assert spec.sliding_window == getattr(theirs, "sliding_window", None)
    assert spec.qk_norm == (name == "qwen3")
    assert spec.qkv_bias == (name in ("qwen2", "llama_linear"))
    assert spec.o_bias == spec.mlp_bias == (name == "llama_linear")


def test_absent_fields_have_transformers_defaults() -> None:
    spec, theirs = spec_from_config(LLAMA), LlamaConfig(**LLAMA)
    assert (spec.num_kv_heads, spec.head_dim) == (4, 16)
    assert spec.rope == Rope(theirs.rope_parameters["rope_theta"])
    assert spec.rms_norm_eps == theirs.rms_norm_eps
    assert not spec.tied_embeddings and spec.sliding_window is None


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": LLAMA3_ROPE},
        {"rope_theta": 10000.0, "rope_scaling": LLAMA3_ROPE},
        {"rope_theta": 10000.0, "rope_scaling": {**LLAMA3_ROPE, "type": "llama3"}},
    ],
)
def test_llama3_scaling_in_old_and_new_spelling(fields: dict[str, Any]) -> None:
    assert spec_from_config({**LLAMA, **fields}).rope == Rope(10000.0, SCALING)


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_linear_scaling(kind: str) -> None:
    scaling = {kind: "linear", "factor": 2.0}
    spec = spec_from_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling})
    assert spec.rope == Rope(5e5, LinearScaling(2.0))


def test_frequencies_equal_transformers() -> None:
    for scaling in (LLAMA3_ROPE, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}):
        config = LlamaConfig(**{**LLAMA, "rope_parameters": dict(scaling)})
        expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
        rope = spec_from_config({**LLAMA, "rope_parameters": scaling}).rope
        torch.testing.assert_close(inverse_frequencies(rope, 16), expected, rtol=2e-7, atol=0.0)
        assert factor == 1.0
    table = cos_sin_table(rope, head_dim=16, max_positions=5, device=torch.device("cpu"))
    angles = 3 * expected
    torch.testing.assert_close(table[3], torch.cat((angles.cos(), angles.sin())))
    assert table.shape == (5, 16) and table.dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"use_sliding_window": False, "sliding_window": 32}, None),
        ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 4}, None),
        ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}, 32),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention"] * 4,
            },
            8,
        ),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention"] * 4,
            },
            None,
        ),
    ],
)
def test_qwen2_windows(fields: dict[str, Any], window: int | None) -> None:
    assert spec_from_config({**QWEN2, **fields}).sliding_window == window


def test_mistral_windows() -> None:
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"]}
    assert spec_from_config(mistral).sliding_window == 4096
    assert spec_from_config({**mistral, "sliding_window": None}).sliding_window is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2.*supported are Llama.*Qwen3"),
    "no architecture": ({"architectures": None}, "architectures None are not supported"),
    "missing size": ({"hidden_size": None}, "hidden_size is missing"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    "rope": ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn' .* default, linear and"),
    "rope factor": ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
    "partial rope": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "heads": ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple .* \(3\)"),
    "some windows": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "use_sliding_window": True,
            "sliding_window": 32,
            "max_window_layers": 3,
        },
        "1 of 4 layers use a sliding window.*set use_sliding_window to false",
    ),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"config.json: .*{message}"):
        spec_from_config({**LLAMA, **fields})


def test_dtype_in_old_and_new_spelling() -> None:
    assert dtype_from_config({"dtype": "bfloat16"}) == torch.bfloat16
    assert dtype_from_config({"torch_dtype": "float16"}) == torch.float16
    assert dtype_from_config({}) is None
