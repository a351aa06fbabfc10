"""Ministral 3 (2025), also the text part of its multimodal checkpoints: Mistral whose queries grow
with their position."""

from nanovllm.checkpoint.families import mistral
from nanovllm.checkpoint.hf_config import (
    Config,
    attention,
    decoder,
    dense,
    num_layers,
    number,
    rms_norm,
    rope,
)
from nanovllm.checkpoint.spec import DecoderSpec, LayerSpec, QueryGrowth, YarnScaling
from nanovllm.checkpoint.weight_names import LLAMA, of_text_part

BETA = "llama_4_scaling_beta"


def spec(config: Config) -> DecoderSpec:
    if config.get("model_type") == "mistral":  # as in Mistral Small 3, which sees, too
        return mistral.spec(config)
    told = config.get("rope_scaling") or config.get("rope_parameters") or {}
    turning = rope(config, also=frozenset((BETA, "max_position_embeddings")))
    growth = None
    if told.get(BETA) is not None:
        if not isinstance(turning.scaling, YarnScaling):
            raise ValueError(f"config.json: {BETA} is not supported without rope_type 'yarn'")
        growth = QueryGrowth(number(told, BETA), turning.scaling.original_context)
    norm = rms_norm(config, default_eps=1e-5)
    layer = LayerSpec(
        attention=attention(
            config,
            default_head_dim=128,
            rope=turning,
            window=config.get("sliding_window"),
            query_growth=growth,
        ),
        mlp=dense(config),
        norm=norm,
    )
    return decoder(
        config, names=of_text_part(LLAMA), layers=[layer] * num_layers(config), norm=norm
    )
