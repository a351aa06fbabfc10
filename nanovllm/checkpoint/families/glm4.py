"""GLM-4, dense (GLM team 2024): half of each head turns, in neighbouring pairs; gate and up are
fused on disk; the models of 2025 have norms behind attention and MLP, too."""

from nanovllm.checkpoint.hf_config import (
    Config,
    architectures,
    attention,
    decoder,
    dense,
    num_layers,
    rms_norm,
    rope,
)
from nanovllm.checkpoint.spec import DecoderSpec, LayerSpec
from nanovllm.checkpoint.weight_names import GGUF, SAFETENSORS, WeightNames

NAMES = WeightNames(
    SAFETENSORS
    | dict.fromkeys(("gate", "up"), "model.layers.{}.mlp.gate_up_proj")
    | {
        "attention_post_norm": "model.layers.{}.post_self_attn_layernorm",
        "mlp_post_norm": "model.layers.{}.post_mlp_layernorm",
    },
    GGUF
    | dict.fromkeys(("gate", "up"), "blk.{}.ffn_up")
    | {
        "attention_post_norm": "blk.{}.post_attention_norm",
        "mlp_post_norm": "blk.{}.post_ffw_norm",
    },
)


def spec(config: Config) -> DecoderSpec:
    norm = rms_norm(config, default_eps=1.5625e-07)
    layer = LayerSpec(
        attention=attention(
            config,
            default_head_dim=128,
            rope=rope(config, share=0.5, interleaved=True),
            qkv_bias=config.get("attention_bias", True),
        ),
        mlp=dense(config),
        norm=norm,
        post_norm="Glm4ForCausalLM" in architectures(config),
    )
    return decoder(config, names=NAMES, layers=[layer] * num_layers(config), norm=norm)
