"""Qwen3, dense: RMS norms on the heads of q and k instead of biases (Yang et al. 2025)."""

from nanovllm.worker.models.decoder import DecoderSpec
from nanovllm.worker.models.hf_config import Config, dense_decoder, layer_window
from nanovllm.worker.models.weight_names import QWEN


def spec(config: Config) -> DecoderSpec:
    bias = config.get("attention_bias", False)
    return dense_decoder(
        config,
        names=QWEN,
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        sliding_window=layer_window(config),
    )
