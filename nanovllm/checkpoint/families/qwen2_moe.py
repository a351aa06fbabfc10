"""Qwen1.5's and Qwen2's mixtures of experts: Qwen2 with experts, and one that all tokens take."""

from msgspec.structs import replace

from nanovllm.checkpoint.families.qwen3_moe import mlps
from nanovllm.checkpoint.hf_config import (
    FULL,
    SLIDING,
    Config,
    attention,
    decoder,
    rms_norm,
    whole,
)
from nanovllm.checkpoint.spec import DecoderSpec, LayerSpec, MoE
from nanovllm.checkpoint.weight_names import QWEN


def spec(config: Config) -> DecoderSpec:
    slides, kinds = config.get("use_sliding_window", False), config.get("layer_types")
    if slides and (kinds is None or SLIDING in kinds):
        raise ValueError(
            "config.json: use_sliding_window is not supported for Qwen2's mixtures of experts: "
            f"use a checkpoint whose layer_types are {FULL}"
        )
    shared = whole(config, "shared_expert_intermediate_size", 5632)
    layers = [
        LayerSpec(
            attention=attention(config, qkv_bias=config.get("qkv_bias", True)),
            mlp=replace(mlp, shared_size=shared, shared_gate=True) if isinstance(mlp, MoE) else mlp,
            norm=rms_norm(config),
        )
        for mlp in mlps(config, default_num_experts=60, default_top_k=4)
    ]
    return decoder(config, names=QWEN, layers=layers)
