"""Configs in: specs out, or a reason why not."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.spec import (
    Attention,
    DecoderSpec,
    Dense,
    LinearScaling,
    Llama3Scaling,
    MoE,
    Rope,
)
from nanovllm.worker.layers.rotary import cos_sin_table, inverse_frequencies, memory_order
from tests.conftest import LLAMA3_ROPE, TINY
from tests.dense_models import TINY_DENSE

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
FULL = "full_attention"
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"]}
SCALING = Llama3Scaling(8.0, 1.0, 4.0, original_context=64)


def attention_of(fields: dict[str, Any]) -> Attention:
    """Where all layers have the same."""
    (kind,) = spec_from_config(fields).attentions
    return kind


@pytest.mark.parametrize("name", [name for name in TINY if name not in TINY_DENSE])
def test_config_as_transformers_reads_it(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    path = tiny_checkpoint(name)
    spec = spec_from_config(json.loads((path / "config.json").read_text()))
    theirs = AutoConfig.from_pretrained(path)
    assert spec.num_layers == theirs.num_hidden_layers
    assert spec.tied_embeddings == theirs.tie_word_embeddings
    kinds = getattr(theirs, "layer_types", None) or [FULL] * spec.num_layers
    for kind, layer in zip(kinds, spec.layers, strict=True):
        attention, mlp = layer.attention, layer.mlp
        assert attention.num_kv_heads == theirs.num_key_value_heads
        assert attention.head_dim == (getattr(theirs, "head_dim", None) or 12)
        scale = getattr(theirs, "attention_multiplier", attention.head_dim**-0.5)
        assert attention.scale == scale
        multiplier = getattr(theirs, "residual_multiplier", 1.0)
        assert layer.norm.eps == spec.norm.eps == theirs.rms_norm_eps / multiplier**2
        assert attention.rope is not None
        assert attention.rope.theta == theirs.rope_parameters["rope_theta"]
        slides = name in ("mistral", "mixtral") or kind == "sliding_attention"
        assert attention.window == (theirs.sliding_window if slides else None)
        norms_heads = name.startswith("qwen3") or name == "glm4_moe"
        assert (attention.qk_norm == "head") == norms_heads
        both = name in ("llama_linear", "gpt_oss", "gpt_oss_blocks")
        assert attention.qkv_bias == (name.startswith("qwen2") or name == "glm4_moe" or both)
        assert attention.o_bias == both
        assert attention.sinks == name.startswith("gpt_oss")
        match mlp:
            case Dense():
                assert mlp.intermediate_size == theirs.intermediate_size
                assert mlp.bias == (name == "llama_linear")
            case MoE():
                size = getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
                assert mlp.intermediate_size == size
                count = getattr(theirs, "num_local_experts", None) or theirs.num_experts
                assert (mlp.num_experts, mlp.top_k) == (count, theirs.num_experts_per_tok)
                assert mlp.router.renormalizes == getattr(theirs, "norm_topk_prob", True)


def test_absent_fields_have_transformers_defaults() -> None:
    absent = spec_from_config(LLAMA)
    null = dict.fromkeys(("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"))
    for spec in (absent, spec_from_config({**LLAMA, **null, "rope_scaling": None})):
        theirs, (attention,) = LlamaConfig(**LLAMA), spec.attentions
        assert (attention.num_kv_heads, attention.head_dim) == (4, 16)
        assert attention.rope == Rope(theirs.rope_parameters["rope_theta"])
        assert spec.norm.eps == theirs.rms_norm_eps
        assert not spec.tied_embeddings and attention.window is None


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": LLAMA3_ROPE},
        {"rope_theta": 10000.0, "rope_scaling": LLAMA3_ROPE},
        {"rope_theta": 10000.0, "rope_scaling": {**LLAMA3_ROPE, "type": "llama3"}},
    ],
)
def test_llama3_scaling_in_old_and_new_spelling(fields: dict[str, Any]) -> None:
    assert attention_of({**LLAMA, **fields}).rope == Rope(10000.0, SCALING)


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_linear_scaling(kind: str) -> None:
    scaling = {kind: "linear", "factor": 2.0}
    fields = {"rope_theta": 5e5, "rope_scaling": scaling}
    assert attention_of({**LLAMA, **fields}).rope == Rope(5e5, LinearScaling(2.0))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.4],
    "long_factor": [1.5, 2.0, 4.0, 9.0],
    "original_max_position_embeddings": 64,
}
ROPES: dict[str, dict[str, Any]] = {
    "llama3": LLAMA3_ROPE,
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": YARN,
    "yarn of another length": {**YARN, "original_max_position_embeddings": 100, "factor": 2.5},
    "yarn as it is told": {**YARN, "beta_fast": 20, "beta_slow": 2, "attention_factor": 1.3},
    "yarn with two scales": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn between pairs": {**YARN, "truncate": False},
    "longrope": LONG,
    "longrope with a factor": {**LONG, "factor": 8.0},
    "longrope as it is told": {**LONG, "attention_factor": 1.5},
}


@pytest.mark.parametrize("values", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("max_positions", [64, 256])
def test_rope_equals_transformers(values: dict[str, Any], max_positions: int) -> None:
    """As transformers turns a sequence of that length."""
    phi = "short_factor" in values
    fields = {**LLAMA, "architectures": ["Phi3ForCausalLM" if phi else "LlamaForCausalLM"]}
    fields |= {"max_position_embeddings": 256, "rope_theta": 500.0}
    fields |= {"partial_rotary_factor": 0.5} if phi else {}
    values = {"rope_theta": 500.0, "partial_rotary_factor": 0.5 if phi else 1.0, **values}
    config = LlamaConfig(**{**fields, "rope_parameters": dict(values)})
    theta = values["rope_theta"]
    length = max_positions if phi else None
    expected, factor = ROPE_INIT_FUNCTIONS[values["rope_type"]](config, seq_len=length)
    old = {name: value for name, value in values.items() if name != "rope_theta"}
    spellings = [{"rope_parameters": values}, {"rope_theta": theta, "rope_scaling": old}]
    for spelling in spellings:
        rope = attention_of({**fields, **spelling}).rope
        assert rope is not None
        found = inverse_frequencies(rope, 16, max_positions=max_positions)
        torch.testing.assert_close(found, expected, rtol=3e-7, atol=0.0)
    cpu = torch.device("cpu")
    table = cos_sin_table(rope, head_dim=16, max_positions=max_positions, device=cpu)
    cos, sin = table[50].chunk(2)
    num_turning = len(expected)
    torch.testing.assert_close(cos[:num_turning], (50 * expected).cos() * factor)
    torch.testing.assert_close(sin[:num_turning], (50 * expected).sin() * factor)
    assert (cos[num_turning:] == 1).all() and (sin[num_turning:] == 0).all()
    assert table.shape == (max_positions, 16) and table.dtype == torch.float32


@pytest.mark.parametrize(
    ("rope", "order"),
    [
        (Rope(1.0), None),
        (Rope(1.0, interleaved=True), [0, 2, 4, 6, 1, 3, 5, 7]),
        (Rope(1.0, share=0.5), [0, 1, 4, 5, 2, 3, 6, 7]),
        (Rope(1.0, share=0.5, interleaved=True), [0, 2, 4, 5, 1, 3, 6, 7]),
    ],
)
def test_pairs_lie_half_a_head_apart(rope: Rope, order: list[int] | None) -> None:
    assert memory_order(rope, 8) == order


@pytest.mark.parametrize("kind", ["mistral", "ministral3"])
def test_the_text_part_of_a_model_that_sees(kind: str) -> None:
    """Read as if it were alone, with its own defaults."""
    text = {name: value for name, value in LLAMA.items() if name != "architectures"}
    alone = {"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"}[kind]
    seeing = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": {**text, "model_type": kind},
        "vision_config": {"hidden_size": 8},
        "dtype": "bfloat16",
    }
    found = spec_from_config(seeing)
    expected = spec_from_config({**text, "architectures": [alone], "dtype": "bfloat16"})
    assert found.layers == expected.layers and found.dtype == "bfloat16"
    known = found.names.known
    assert known("language_model.model.norm.weight") == "model.norm.weight"
    assert known("model.language_model.norm.weight") == "model.norm.weight"
    assert known("vision_tower.norm.weight") is None
    with pytest.raises(ValueError, match="text_config must be an object"):
        spec_from_config({**seeing, "text_config": [1]})


UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "recurrent": (
        {"architectures": ["Qwen3NextForCausalLM"], "linear_conv_kernel_dim": 4},
        "nearest supported one is Qwen3.*lacks recurrent layers .linear_conv_kernel_dim",
    ),
    "recurrent by layers": (
        {"architectures": ["Qwen3_5ForCausalLM"], "layer_types": ["linear_attention", FULL]},
        "recurrent layers .linear_attention",
    ),
    "latent attention": (
        {"architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 512},
        "lacks latent attention .MLA. .kv_lora_rank",
    ),
    "vision": (
        {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {"x": 1}},
        "lacks vision .vision_config",
    ),
    "maths": (
        {"architectures": ["LlamaProForCausalLM"], "attn_logit_softcapping": 30.0},
        "nearest supported one is LlamaForCausalLM, .* perhaps what .*: attn_logit_softcapping",
    ),
    "nothing told": (
        {"architectures": ["Olmo4ForCausalLM"]},
        "nearest supported one is Olmo[23]ForCausalLM, which lacks what its config does not tell",
    ),
}


@pytest.mark.parametrize(("fields", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_family_is_told_what_is_nearest(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"config.json: .*{message}"):
        spec_from_config({**LLAMA, **fields})


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
    assert attention_of({**QWEN2, **fields}).window == window


@pytest.mark.parametrize(
    "fields", [{"max_window_layers": 3}, {"layer_types": [FULL, FULL, FULL, "sliding_attention"]}]
)
def test_some_layers_may_have_a_window(fields: dict[str, Any]) -> None:
    fields = {**QWEN2, **fields, "use_sliding_window": True, "sliding_window": 32}
    spec = spec_from_config(fields)
    assert [layer.attention.window for layer in spec.layers] == [None, None, None, 32]
    assert len(spec.attentions) == 2 and len(spec.shortened(2).layers) == 2


def test_windows_that_are_asked_for_and_not_given() -> None:
    asked = {**QWEN2, "use_sliding_window": True, "max_window_layers": 0}
    for fields in (asked, {**asked, "sliding_window": None}):
        theirs = Qwen2Config(**{k: v for k, v in fields.items() if k != "architectures"})
        expected = theirs.sliding_window if "sliding_attention" in theirs.layer_types else None
        assert attention_of(fields).window == expected
    del asked["max_window_layers"]
    assert attention_of(asked).window is None, "fewer layers than Qwen's default of 28"


def test_qwen3_without_head_dim() -> None:
    qwen3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"]}
    assert attention_of(qwen3).head_dim == Qwen3Config().head_dim == 128
    assert attention_of({**qwen3, "head_dim": None}).head_dim == 16
    assert attention_of({**qwen3, "head_dim": 32}).head_dim == 32


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("absent", [{}, {"architectures": None}])
def test_without_architectures_the_model_type_counts(
    model_type: str, absent: dict[str, Any]
) -> None:
    fields = {name: value for name, value in LLAMA.items() if name != "architectures"}
    spec = spec_from_config({**fields, **absent, "model_type": model_type})
    assert spec.architecture == f"{model_type.capitalize()}ForCausalLM"


def test_lists_that_say_the_same_of_each_layer() -> None:
    fields = {"num_attention_heads": [4] * 4, "num_key_value_heads": [2] * 4}
    attention = attention_of({**LLAMA, **fields, "intermediate_size": [128] * 4})
    assert (attention.num_heads, attention.num_kv_heads) == (4, 2)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_theta": 7e4}},
        {
            "rope_theta": 7e4,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 9e4},
        },
        {"rope_theta": 7e4, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
    ],
)
def test_old_and_new_spelling_together_as_in_transformers(fields: dict[str, Any]) -> None:
    theirs = LlamaConfig(**{**LLAMA, **deepcopy(fields)}).rope_parameters
    rope = attention_of({**LLAMA, **fields}).rope
    assert rope is not None and rope.theta == theirs["rope_theta"]
    assert isinstance(rope.scaling, LinearScaling) == (theirs["rope_type"] == "linear")


def test_linear_scaling_makes_room_for_more_positions() -> None:
    scaling = {"rope_type": "linear", "factor": 4.0}
    assert spec_from_config({**LLAMA, "rope_scaling": scaling}).max_position_embeddings == 1024
    assert (
        spec_from_config({**LLAMA, "rope_parameters": LLAMA3_ROPE}).max_position_embeddings == 256
    )


def test_mistral_windows() -> None:
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"]}
    assert attention_of(mistral).window == 4096
    assert attention_of({**mistral, "sliding_window": None}).window is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"architectures": ["GPT2LMHeadModel"]},
        r"GPT2.*nearest.*upported are .*Qwen3",
    ),
    "no architecture": ({"architectures": None}, "architectures None are not supported"),
    "missing size": ({"hidden_size": None}, "hidden_size is missing"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    "rope": ({"rope_scaling": {"rope_type": "mrope"}}, "rope_type 'mrope' .* default, linear, dy"),
    "rope by layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters must be one object for all layers",
    ),
    "rope of no type": (
        {"rope_scaling": {"factor": 2.0}},
        "rope_scaling has factor=2.0.*'default'",
    ),
    "rope of another type": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}},
        "rope_parameters has beta_fast=32",
    ),
    "rope text": ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor must be a num"),
    "rope list": ({"rope_scaling": {"rope_type": "linear", "factor": [2]}}, "factor must be a num"),
    "layers that differ": (
        {"num_key_value_heads": [4, 2, 2, 4]},
        "num_key_value_heads differs by layer",
    ),
    "no number": ({"vocab_size": "100"}, "vocab_size must be a whole number above 0, not '100'"),
    "nothing": ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number above 0"),
    "norm": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number"),
    "names": ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of names"),
    "rope factor": ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
    "partial rope": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "heads": ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple .* \(3\)"),
    "kinds of layers": (
        {"architectures": ["Qwen2ForCausalLM"], "layer_types": [FULL, FULL, FULL, "linear"]},
        "layer_types must name 4 layers",
    ),
    "kinds of layers that nobody asks for": (
        {"layer_types": [FULL, FULL, FULL, "chunked"]},
        r"layer_types \['chunked'\] are not supported",
    ),
    "soft caps": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 changes what"),
    "experts": ({"num_local_experts": 8}, "num_local_experts=8 changes what"),
    "multipliers": ({"residual_multiplier": 0.22}, "residual_multiplier=0.22 changes what"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"config.json: .*{message}"):
        spec_from_config({**LLAMA, **fields})


def test_dtype_in_old_and_new_spelling() -> None:
    assert spec_from_config({**LLAMA, "dtype": "bfloat16"}).dtype == "bfloat16"
    assert spec_from_config({**LLAMA, "torch_dtype": "float16"}).dtype == "float16"
    assert spec_from_config(LLAMA).dtype is None


def test_neutral_values_are_no_maths() -> None:
    neutral = {"num_experts": 0, "embedding_multiplier": 1.0, "layer_types": [FULL] * 4}
    assert spec_from_config({**LLAMA, **neutral}) == spec_from_config(LLAMA)


@pytest.mark.parametrize("name", TINY)
def test_survives_being_passed_to_another_program(
    name: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """As the compiler ahead is told which steps it should go through."""
    spec = spec_from_config(json.loads((tiny_checkpoint(name) / "config.json").read_text()))
    assert msgspec.json.decode(msgspec.json.encode(spec), type=DecoderSpec) == spec
