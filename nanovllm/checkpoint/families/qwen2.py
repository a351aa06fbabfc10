"""Qwen2 and Qwen2.5: Llama with biases on q, k and v (Yang et al. 2024)."""

from nanovllm.checkpoint.hf_config import Config, attention, decoder, dense, rms_norm, windows
from nanovllm.checkpoint.spec import DecoderSpec, LayerSpec
from nanovllm.checkpoint.weight_names import QWEN


def spec(config: Config) -> DecoderSpec:
    layers = [
        LayerSpec(
            attention=attention(config, window=window, qkv_bias=True),
            mlp=dense(config),
            norm=rms_norm(config),
        )
        for window in windows(config)
    ]
    return decoder(config, names=QWEN, layers=layers)
