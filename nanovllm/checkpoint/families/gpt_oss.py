"""gpt-oss (OpenAI 2025): sinks, windows in every other layer, and experts in MXFP4."""

from nanovllm.checkpoint.hf_config import (
    SLIDING,
    Config,
    attention,
    decoder,
    experts,
    layer_kinds,
    number,
    rms_norm,
    rope,
    whole,
)
from nanovllm.checkpoint.spec import ClampedSwiGLU, DecoderSpec, LayerSpec, Router
from nanovllm.checkpoint.weight_names import GGUF, SAFETENSORS, WeightNames

NAMES = {
    "router": "model.layers.{}.mlp.router",
    "expert_gate_up": "model.layers.{}.mlp.experts.gate_up_proj*",
    "expert_down": "model.layers.{}.mlp.experts.down_proj*",
}

GGUF_NAMES = GGUF | {"mlp_norm": "blk.{}.post_attention_norm"}


def spec(config: Config) -> DecoderSpec:
    bias = config.get("attention_bias", True)
    norm = rms_norm(config, default_eps=1e-5, rounds_last=True)
    clamps = number(config, "swiglu_alpha", 1.702), number(config, "swiglu_limit", 7.0)
    mixture = experts(
        config,
        num_experts=whole(config, "num_local_experts", 128),
        router=Router(renormalizes=True, bias=True),
        size_field="intermediate_size",
        default_top_k=4,
        bias=True,
        takes_turns=not config.get("experts_are_apart", False),  # as they are in GGUF files
        clamped=ClampedSwiGLU(*clamps),
    )
    window = None if config.is_null("sliding_window") else whole(config, "sliding_window", 128)
    turning = rope(config, rope_theta=150000.0)
    layers = [
        LayerSpec(
            attention=attention(
                config,
                default_head_dim=64,
                rope=turning,
                window=window if kind == SLIDING else None,
                sinks=True,
                qkv_bias=bias,
                o_bias=bias,
            ),
            mlp=mixture,
            norm=norm,
        )
        for kind in layer_kinds(config, every=2)
    ]
    return decoder(
        config, names=WeightNames(SAFETENSORS | NAMES, GGUF_NAMES), layers=layers, norm=norm
    )
