"""OLMo 2: norms behind attention and MLP, none ahead, and one over all heads of q and of k
(Walsh et al. 2024)."""

from nanovllm.checkpoint.hf_config import Config, attention, decoder, dense, num_layers, rms_norm
from nanovllm.checkpoint.spec import DecoderSpec, LayerSpec
from nanovllm.checkpoint.weight_names import GGUF, SAFETENSORS, WeightNames

NAMES = WeightNames(
    SAFETENSORS
    | {
        "attention_post_norm": "model.layers.{}.post_attention_layernorm",
        "mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
    },
    GGUF
    | {
        "attention_post_norm": "blk.{}.post_attention_norm",
        "mlp_post_norm": "blk.{}.post_ffw_norm",
    },
)


def spec(config: Config) -> DecoderSpec:
    bias = config.get("attention_bias", False)
    norm = rms_norm(config, default_eps=1e-5, rounds_last=True)
    layer = LayerSpec(
        attention=attention(config, qk_norm="full", qkv_bias=bias, o_bias=bias),
        mlp=dense(config),
        norm=norm,
        pre_norm=False,
        post_norm=True,
    )
    return decoder(config, names=NAMES, layers=[layer] * num_layers(config), norm=norm)
