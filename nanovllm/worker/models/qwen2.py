"""Qwen2 and Qwen2.5: Llama with biases on q, k and v (Yang et al. 2024)."""

from nanovllm.worker.models.decoder import DecoderSpec
from nanovllm.worker.models.hf_config import Config, dense_decoder, layer_window
from nanovllm.worker.models.weight_names import QWEN


def spec(config: Config) -> DecoderSpec:
    return dense_decoder(config, names=QWEN, qkv_bias=True, sliding_window=layer_window(config))
