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
from nanovllm.checkpoint.spec import DecoderSpec, LayerSpec
from nanovllm.checkpoint.weight_names import QWEN


def spec(config: Config) -> DecoderSpec:
    bias, slides = config.get("attention_bias", False), config.get("use_sliding_window", False)
    num_experts = config.get("num_experts", config.get("num_local_experts", 128))
    mixture = experts(
        config, num_experts=num_experts, renormalizes=config.get("norm_topk_prob", False)
    )
    only_dense, every = config.get("mlp_only_layers", []), config.get("decoder_sparse_step", 1)
    is_sparse = [
        num_experts > 0 and index not in only_dense and (index + 1) % every == 0
        for index in range(num_layers(config))
    ]
    layers = [
        LayerSpec(
            attention=attention(
                config,
                window=config.get("sliding_window") if slides else None,
                qk_norm="head",
                qkv_bias=bias,
                o_bias=bias,
            ),
            mlp=mixture if sparse else dense(config),
            norm=rms_norm(config),
        )
        for sparse in is_sparse
    ]
    return decoder(config, names=QWEN, layers=layers)
