"""GLM-4.5's mixtures of experts (GLM team 2025): corrected sigmoids pick experts, perhaps of some
groups alone; the first layers are dense."""

from msgspec.structs import replace

from nanovllm.checkpoint.hf_config import (
    Config,
    attention,
    decoder,
    dense,
    experts,
    num_layers,
    number,
    rms_norm,
    rope,
    whole,
)
from nanovllm.checkpoint.spec import DecoderSpec, LayerSpec, Router
from nanovllm.checkpoint.weight_names import GGUF, SAFETENSORS, WeightNames

MLP = "model.layers.{}.mlp"
SAFETENSORS_NAMES = SAFETENSORS | {
    "router_correction": f"{MLP}.gate.e_score_correction*",
    "shared_gate": f"{MLP}.shared_experts.gate_proj",
    "shared_up": f"{MLP}.shared_experts.up_proj",
    "shared_down": f"{MLP}.shared_experts.down_proj",
}


def spec(config: Config) -> DecoderSpec:
    count, norm = num_layers(config), rms_norm(config, default_eps=1e-5)
    kind = attention(
        config,
        rope=rope(config, share=0.5),
        qk_norm="head" if config.get("use_qk_norm", False) else None,
        qkv_bias=config.get("attention_bias", False),
    )
    router = Router(
        scores="sigmoid",
        corrects=True,
        renormalizes=config.get("norm_topk_prob", True),
        num_groups=whole(config, "n_group", 1),
        top_groups=whole(config, "topk_group", 1),
        scale=number(config, "routed_scaling_factor", 1.0),
    )
    num_experts = whole(config, "n_routed_experts", 128)
    mixture = experts(config, num_experts=num_experts, router=router, default_top_k=8)
    shared = mixture.intermediate_size * whole(config, "n_shared_experts", 1)
    mixture = replace(mixture, shared_size=shared)
    first = config.get("first_k_dense_replace", 1)
    layers = [
        LayerSpec(attention=kind, mlp=dense(config) if index < first else mixture, norm=norm)
        for index in range(count)
    ]
    # Layers that predict further tokens lie behind those of the model.
    more = range(count, count + config.get("num_nextn_predict_layers", 0))
    ignored = tuple(f"model.layers.{index}." for index in more)
    names = WeightNames(SAFETENSORS_NAMES, GGUF, ignored=ignored)
    return decoder(config, names=names, layers=layers, norm=norm)
