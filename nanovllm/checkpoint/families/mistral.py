"""Mistral 7B and its kin: Llama with a sliding window, until version 0.2 (Jiang et al. 2023)."""

from nanovllm.checkpoint.hf_config import Config, attention, decoder, dense, num_layers, rms_norm
from nanovllm.checkpoint.spec import DecoderSpec, LayerSpec
from nanovllm.checkpoint.weight_names import LLAMA, of_text_part

FIRST_WINDOW = 4096  # the first release's, which its config does not tell; later ones say null


def spec(config: Config) -> DecoderSpec:
    window = None if config.is_null("sliding_window") else FIRST_WINDOW
    layer = LayerSpec(
        attention=attention(config, window=config.get("sliding_window", window)),
        mlp=dense(config),
        norm=rms_norm(config),
    )
    return decoder(config, names=of_text_part(LLAMA), layers=[layer] * num_layers(config))
