"""Granite 3's mixtures of experts (IBM 2024): Granite's multipliers, experts stacked on disk."""

from nanovllm.checkpoint.families.granite import attention_of, multipliers, norm_of
from nanovllm.checkpoint.hf_config import (
    Config,
    decoder,
    experts,
    num_layers,
    whole,
)
from nanovllm.checkpoint.spec import DecoderSpec, LayerSpec, Router
from nanovllm.checkpoint.weight_names import GGUF, SAFETENSORS, WeightNames

BLOCK = "model.layers.{}.block_sparse_moe"
NAMES = WeightNames(
    SAFETENSORS
    | {
        "router": f"{BLOCK}.router.layer",
        "expert_gate": f"{BLOCK}.input_linear",
        "expert_up": f"{BLOCK}.input_linear",
        "expert_down": f"{BLOCK}.output_linear",
    },
    GGUF,
    gguf_interleaved=True,
)


def spec(config: Config) -> DecoderSpec:
    layer = LayerSpec(
        attention=attention_of(config),
        mlp=experts(
            config,
            num_experts=whole(config, "num_local_experts", 8),
            router=Router(renormalizes=True),
            size_field="intermediate_size",
            default_top_k=2,
        ),
        norm=norm_of(config),
    )
    return decoder(config, names=NAMES, layers=[layer] * num_layers(config), **multipliers(config))
