"""Gemma 4 (2026), the text decoder: wide heads in layers that see all, normed values, and in some
sizes experts beside the MLP, a vector per token and layer, and last layers without keys."""

from typing import Any

from msgspec.structs import replace

from nanovllm.checkpoint import hf_config as hf
from nanovllm.checkpoint.families.gemma2 import NAMES
from nanovllm.checkpoint.families.gemma2 import mlp_of as plain_mlp_of
from nanovllm.checkpoint.hf_config import FULL, SLIDING, Config
from nanovllm.checkpoint.spec import Attention, DecoderSpec, Dense, LayerSpec, MoE, Rope, Router
from nanovllm.checkpoint.weight_names import WeightNames, of_text_part

LAYER = "model.layers.{}"
SAFETENSORS_NAMES = NAMES.safetensors | {
    "router": f"{LAYER}.router.proj",
    "router_norm": f"{LAYER}.router.scale",
    "expert_scale": f"{LAYER}.router.per_expert_scale",
    "expert_gate": f"{LAYER}.experts.gate_up_proj+",
    "expert_up": f"{LAYER}.experts.gate_up_proj+",
    "expert_down": f"{LAYER}.experts.down_proj+",
    "dense_post_norm": f"{LAYER}.post_feedforward_layernorm_1",
    "experts_norm": f"{LAYER}.pre_feedforward_layernorm_2",
    "experts_post_norm": f"{LAYER}.post_feedforward_layernorm_2",
    "layer_gate": f"{LAYER}.per_layer_input_gate",
    "layer_out": f"{LAYER}.per_layer_projection",
    "layer_post_norm": f"{LAYER}.post_per_layer_input_norm",
    "layer_scale": f"{LAYER}.layer_scalar",
    "layer_embedding": "model.embed_tokens_per_layer",
    "layer_projection": "model.per_layer_model_projection",
    "layer_projection_norm": "model.per_layer_projection_norm",
}
ROPES: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


def spec(config: Config) -> DecoderSpec:
    kinds, norm = hf.layer_kinds(config, every=6), hf.rms_norm(config, rounds_last=True)
    if config.get("use_bidirectional_attention") not in (None, "vision"):
        raise ValueError("config.json: use_bidirectional_attention 'all' is not supported")
    has_experts = config.get("enable_moe_block", False)
    experts = _experts(config) if has_experts else None
    config.get("num_experts")  # which means nothing without the block
    input_size = config.get("hidden_size_per_layer_input", 256)
    vocabulary = hf.whole(config, "vocab_size")
    if input_size and hf.whole(config, "vocab_size_per_layer_input", 262_144) < vocabulary:
        raise ValueError("config.json: vocab_size_per_layer_input must be at least vocab_size")
    num_own = len(kinds) - config.get("num_kv_shared_layers", 0)
    layers = []
    for index, kind in enumerate(kinds):
        attends_to = None
        if index >= num_own:
            earlier = [other for other in range(num_own) if kinds[other] == kind]
            if not earlier:
                raise ValueError(f"config.json: num_kv_shared_layers leaves no {kind} with keys")
            attends_to = earlier[-1]
        layer = LayerSpec(
            attention=_attention(config, index, kind),
            mlp=_mlp(config, is_wide=attends_to is not None),
            norm=norm,
            post_norm=True,
            experts=experts,
            keys_of=attends_to,
            input_size=input_size,
            scaled=True,
        )
        layers.append(layer)
    return hf.decoder(
        config,
        names=of_text_part(WeightNames(SAFETENSORS_NAMES, NAMES.gguf)),
        layers=layers,
        norm=norm,
        tied_embeddings=config.get("tie_word_embeddings", True),
        embedding_multiplier=hf.whole(config, "hidden_size") ** 0.5,
        final_softcap=hf.number_or_none(config, "final_logit_softcapping"),
    )


def _attention(config: Config, index: int, kind: str) -> Attention:
    """transformers 5.2x tells of each layer by itself, configs before of all that see all."""
    is_full, bias = kind == FULL, config.get("attention_bias", False)
    shares = is_full and config.get("attention_k_eq_v", False)
    own = config.get("per_layer_config", {}).get(str(index), {})
    if odd := own.keys() - {"head_dim", "num_key_value_heads"}:
        raise ValueError(f"config.json: per_layer_config has {sorted(odd)}, not supported here")
    if is_full and "per_layer_config" not in config:
        own = {"head_dim": config.get("global_head_dim", 512)}
        if shares and "num_global_key_value_heads" in config:
            own["num_key_value_heads"] = config["num_global_key_value_heads"]
    return hf.attention(
        config.replaced(own),
        default_head_dim=256,
        scale=1.0,
        rope=_rope(config, kind),
        window=None if is_full else hf.whole(config, "sliding_window", 512),
        qk_norm="head",
        v_norm=True,
        values_are_keys=shares,
        qkv_bias=bias,
        o_bias=bias,
    )


def _rope(config: Config, kind: str) -> Rope:
    told = config.get("rope_parameters") or ROPES
    own = {"rope_parameters": {kind: told.get(kind) or ROPES[kind]}}
    return hf.rope(config.replaced(own), kind, share=1.0 if kind == FULL else None)


def _mlp(config: Config, *, is_wide: bool) -> Dense:
    plain = plain_mlp_of(config)
    times = 2 if is_wide and config.get("use_double_wide_mlp", False) else 1
    return replace(plain, intermediate_size=times * plain.intermediate_size)


def _experts(config: Config) -> MoE:
    return hf.experts(
        config.replaced({"num_experts_per_tok": hf.whole(config, "top_k_experts")}),
        num_experts=hf.whole(config, "num_experts"),
        router=Router(renormalizes=True, norms=True),
        activation=plain_mlp_of(config).activation,
    )
