"""OLMoE (Muennighoff et al. 2024): 64 small experts in each layer, and a norm over all heads."""

from nanovllm.checkpoint.hf_config import (
    Config,
    attention,
    decoder,
    experts,
    num_layers,
    rms_norm,
    whole,
)
from nanovllm.checkpoint.spec import DecoderSpec, LayerSpec, Router
from nanovllm.checkpoint.weight_names import QWEN


def spec(config: Config) -> DecoderSpec:
    mixture = experts(
        config,
        num_experts=whole(config, "num_experts", 64),
        router=Router(renormalizes=config.get("norm_topk_prob", False)),
        size_field="intermediate_size",
        default_top_k=8,
    )
    bias, norm = config.get("attention_bias", False), rms_norm(config, default_eps=1e-5)
    layer = LayerSpec(
        attention=attention(config, qk_norm="full", qkv_bias=bias, o_bias=bias),
        mlp=mixture,
        norm=norm,
    )
    return decoder(config, names=QWEN, layers=[layer] * num_layers(config), norm=norm)
