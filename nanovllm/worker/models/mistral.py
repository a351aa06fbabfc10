"""Mistral 7B and its kin: Llama with a sliding window, until version 0.2 (Jiang et al. 2023)."""

from nanovllm.worker.models.decoder import DecoderSpec
from nanovllm.worker.models.hf_config import Config, dense_decoder
from nanovllm.worker.models.weight_names import LLAMA


def spec(config: Config) -> DecoderSpec:
    window = config.get("sliding_window", 4096)  # absent means the first release's
    return dense_decoder(config, names=LLAMA, sliding_window=window)
