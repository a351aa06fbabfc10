"""Llama 2 and 3, SmolLM2, and all that call themselves Llama (Touvron et al. 2023)."""

from nanovllm.worker.models.decoder import DecoderSpec
from nanovllm.worker.models.hf_config import Config, dense_decoder
from nanovllm.worker.models.weight_names import LLAMA


def spec(config: Config) -> DecoderSpec:
    bias = config.get("attention_bias", False)
    return dense_decoder(
        config,
        names=LLAMA,
        # llama.cpp calls Mistral "llama" too; only then does a Llama have a window.
        sliding_window=config.get("sliding_window"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.get("mlp_bias", False),
    )
