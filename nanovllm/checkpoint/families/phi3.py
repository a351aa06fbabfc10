"""Phi-3, Phi-3.5 and Phi-4 (2024): Llama with tensors that are fused on disk, LongRoPE and, in the
small ones, heads that turn in part."""

from nanovllm.checkpoint.hf_config import (
    Config,
    attention,
    decoder,
    dense,
    num_layers,
    rms_norm,
    rope,
)
from nanovllm.checkpoint.spec import DecoderSpec, LayerSpec
from nanovllm.checkpoint.weight_names import GGUF, SAFETENSORS, WeightNames

FUSED = dict.fromkeys(("q", "k", "v"), "model.layers.{}.self_attn.qkv_proj") | dict.fromkeys(
    ("gate", "up"), "model.layers.{}.mlp.gate_up_proj"
)
FUSED_IN_GGUF = dict.fromkeys(("q", "k", "v"), "blk.{}.attn_qkv") | dict.fromkeys(
    ("gate", "up"), "blk.{}.ffn_up"
)
NAMES = WeightNames(SAFETENSORS | FUSED, GGUF | FUSED_IN_GGUF)


def spec(config: Config) -> DecoderSpec:
    layer = LayerSpec(
        attention=attention(
            config,
            rope=rope(config, share=1.0),
            window=config.get("sliding_window"),
        ),
        mlp=dense(config),
        norm=rms_norm(config, default_eps=1e-5),
    )
    return decoder(
        config,
        names=NAMES,
        layers=[layer] * num_layers(config),
        norm=rms_norm(config, default_eps=1e-5),
    )
