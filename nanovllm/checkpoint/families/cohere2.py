"""Command R7B and Command A (Cohere 2024): layer norms, attention and MLP side by side, scaled
logits; three of four layers have a window and rope in neighbouring pairs, the fourth neither."""

from nanovllm.checkpoint.hf_config import (
    SLIDING,
    Config,
    attention,
    decoder,
    dense,
    layer_kinds,
    number,
    rope,
    whole,
)
from nanovllm.checkpoint.spec import DecoderSpec, LayerSpec, Norm
from nanovllm.checkpoint.weight_names import QWEN


def spec(config: Config) -> DecoderSpec:
    bias = config.get("attention_bias", False)
    norm = Norm(eps=number(config, "layer_norm_eps", 1e-5), rounds_last=True, centers=True)
    window = None if config.is_null("sliding_window") else whole(config, "sliding_window", 4096)
    layers = [
        LayerSpec(
            attention=attention(
                config,
                rope=rope(config, interleaved=True) if kind == SLIDING and window else None,
                window=window if kind == SLIDING else None,
                qkv_bias=bias,
                o_bias=bias,
            ),
            mlp=dense(config),
            norm=norm,
            parallel=True,
        )
        for kind in layer_kinds(config, every=4, field="sliding_window_pattern")
    ]
    return decoder(
        config,
        names=QWEN,
        layers=layers,
        norm=norm,
        tied_embeddings=config.get("tie_word_embeddings", True),
        logit_scale=number(config, "logit_scale", 0.0625),
    )
