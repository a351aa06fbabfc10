"""Qwen3, dense: RMS norms on the heads of q and k instead of biases (Yang et al. 2025)."""

from nanovllm.checkpoint.hf_config import Config, attention, decoder, dense, rms_norm, windows
from nanovllm.checkpoint.spec import DecoderSpec, LayerSpec
from nanovllm.checkpoint.weight_names import QWEN


def spec(config: Config) -> DecoderSpec:
    bias = config.get("attention_bias", False)
    layers = [
        LayerSpec(
            attention=attention(
                config,
                default_head_dim=128,
                window=window,
                qk_norm="head",
                qkv_bias=bias,
                o_bias=bias,
            ),
            mlp=dense(config),
            norm=rms_norm(config),
        )
        for window in windows(config)
    ]
    return decoder(config, names=QWEN, layers=layers)
