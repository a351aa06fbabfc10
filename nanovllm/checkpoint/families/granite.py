"""Granite 3, dense (IBM 2024): Llama with four multipliers."""

from typing import Any

from msgspec.structs import replace

from nanovllm.checkpoint.hf_config import (
    Config,
    attention,
    decoder,
    dense,
    num_layers,
    number,
    rms_norm,
)
from nanovllm.checkpoint.spec import Attention, DecoderSpec, LayerSpec, Norm
from nanovllm.checkpoint.weight_names import LLAMA


def norm_of(config: Config) -> Norm:
    """Of a residual stream that is divided by residual_multiplier.

    Granite adds m * block(norm(x)) to x. With x / m in place of x, m is gone from every layer: the
    embedding gives 1 / m of it, and a norm gives the same if its eps is divided by m².
    """
    norm = rms_norm(config)
    return replace(norm, eps=norm.eps / number(config, "residual_multiplier", 1.0) ** 2)


def multipliers(config: Config) -> dict[str, Any]:
    """Fields of `DecoderSpec`."""
    embedding = number(config, "embedding_multiplier", 1.0)
    return {
        "norm": norm_of(config),
        "embedding_multiplier": embedding / number(config, "residual_multiplier", 1.0),
        "logit_scale": 1 / number(config, "logits_scaling", 1.0),
    }


def attention_of(config: Config) -> Attention:
    bias = config.get("attention_bias", False)
    scale = number(config, "attention_multiplier", 1.0)
    return attention(config, scale=scale, qkv_bias=bias, o_bias=bias)


def spec(config: Config) -> DecoderSpec:
    layer = LayerSpec(
        attention=attention_of(config),
        mlp=dense(config, bias=config.get("mlp_bias", False)),
        norm=norm_of(config),
    )
    return decoder(config, names=LLAMA, layers=[layer] * num_layers(config), **multipliers(config))
