"""Mixtral (Jiang et al. 2024): Mistral with 8 MLPs in each layer, of which a token takes 2."""

from nanovllm.checkpoint.hf_config import (
    Config,
    attention,
    decoder,
    experts,
    num_layers,
    rms_norm,
    rope,
    whole,
)
from nanovllm.checkpoint.spec import DecoderSpec, LayerSpec, Router
from nanovllm.checkpoint.weight_names import GGUF, SAFETENSORS, WeightNames

BLOCK = "model.layers.{}.block_sparse_moe"
NAMES = WeightNames(
    SAFETENSORS
    | {
        "router": f"{BLOCK}.gate",
        "expert_gate": f"{BLOCK}.experts.{{}}.w1",
        "expert_up": f"{BLOCK}.experts.{{}}.w3",
        "expert_down": f"{BLOCK}.experts.{{}}.w2",
    },
    GGUF,
    gguf_interleaved=True,
)
THETA = 1e6  # transformers' default


def spec(config: Config) -> DecoderSpec:
    mixture = experts(
        config,
        num_experts=whole(config, "num_local_experts", 8),
        router=Router(renormalizes=True),
        size_field="intermediate_size",
        default_top_k=2,
    )
    norm = rms_norm(config, default_eps=1e-5)
    layer = LayerSpec(
        attention=attention(
            config,
            window=config.get("sliding_window"),
            rope=rope(config, rope_theta=THETA),
        ),
        mlp=mixture,
        norm=norm,
    )
    return decoder(config, names=NAMES, layers=[layer] * num_layers(config), norm=norm)
