"""OLMo 3 (2025): OLMo 2 with a window in three of four layers, and rope scaling in the fourth."""

from nanovllm.checkpoint.families.olmo2 import NAMES
from nanovllm.checkpoint.hf_config import (
    SLIDING,
    Config,
    attention,
    decoder,
    dense,
    layer_kinds,
    rms_norm,
    rope,
    whole,
)
from nanovllm.checkpoint.spec import DecoderSpec, LayerSpec


def spec(config: Config) -> DecoderSpec:
    bias = config.get("attention_bias", False)
    norm = rms_norm(config, default_eps=1e-5, rounds_last=True)
    window = None if config.is_null("sliding_window") else whole(config, "sliding_window", 4096)
    layers = [
        LayerSpec(
            attention=attention(
                config,
                rope=rope(config, kind, rope_theta=500_000.0),
                window=window if kind == SLIDING else None,
                qk_norm="full",
                qkv_bias=bias,
                o_bias=bias,
            ),
            mlp=dense(config),
            norm=norm,
            pre_norm=False,
            post_norm=True,
        )
        for kind in layer_kinds(config, every=4)
    ]
    return decoder(config, names=NAMES, layers=layers, norm=norm)
