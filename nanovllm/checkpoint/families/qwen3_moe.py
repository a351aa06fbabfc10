"""Qwen3's mixtures of experts (Yang et al. 2025): Qwen3 with experts in all layers, or in some."""

from nanovllm.checkpoint.hf_config import (
    Config,
    attention,
    decoder,
    dense,
    experts,
    num_layers,
    rms_norm,
)
from nanovllm.checkpoint.spec import DecoderSpec, Dense, LayerSpec, MoE, Router
from nanovllm.checkpoint.weight_names import QWEN


def spec(config: Config) -> DecoderSpec:
    bias, slides = config.get("attention_bias", False), config.get("use_sliding_window", False)
    layers = [
        LayerSpec(
            attention=attention(
                config,
                window=config.get("sliding_window") if slides else None,
                qk_norm="head",
                qkv_bias=bias,
                o_bias=bias,
            ),
            mlp=mlp,
            norm=rms_norm(config),
        )
        for mlp in mlps(config)
    ]
    return decoder(config, names=QWEN, layers=layers)


def mlps(
    config: Config, *, default_num_experts: int = 128, default_top_k: int = 8
) -> list[MoE | Dense]:
    """Of each layer: with experts, but for those that the config excepts."""
    num_experts = config.get("num_experts", config.get("num_local_experts", default_num_experts))
    excepted, every = config.get("mlp_only_layers", []), config.get("decoder_sparse_step", 1)
    sparse = [
        num_experts > 0 and index not in excepted and (index + 1) % every == 0
        for index in range(num_layers(config))
    ]
    if not any(sparse):
        return [dense(config)] * len(sparse)
    router = Router(renormalizes=config.get("norm_topk_prob", False))
    mixture = experts(config, num_experts=num_experts, router=router, default_top_k=default_top_k)
    return [mixture if is_sparse else dense(config) for is_sparse in sparse]
