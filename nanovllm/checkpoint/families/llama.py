"""Llama 2 and 3, SmolLM2, and all that call themselves Llama (Touvron et al. 2023)."""

from nanovllm.checkpoint.hf_config import Config, attention, decoder, dense, num_layers, rms_norm
from nanovllm.checkpoint.spec import DecoderSpec, LayerSpec
from nanovllm.checkpoint.weight_names import LLAMA


def spec(config: Config) -> DecoderSpec:
    bias = config.get("attention_bias", False)
    layer = LayerSpec(
        attention=attention(
            config,
            # llama.cpp calls Mistral "llama" too; only then does a Llama have a window.
            window=config.get("sliding_window"),
            qkv_bias=bias,
            o_bias=bias,
        ),
        mlp=dense(config, bias=config.get("mlp_bias", False)),
        norm=rms_norm(config),
    )
    return decoder(config, names=LLAMA, layers=[layer] * num_layers(config))
