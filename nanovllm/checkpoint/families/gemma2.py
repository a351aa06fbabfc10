"""Gemma 2 (2024): four norms with (1 + weight), soft caps, every second layer with a window."""

from nanovllm.checkpoint import hf_config as hf
from nanovllm.checkpoint.hf_config import Config
from nanovllm.checkpoint.spec import DecoderSpec, Dense, LayerSpec, Norm
from nanovllm.checkpoint.weight_names import GGUF, SAFETENSORS, WeightNames

NAMES = WeightNames(
    SAFETENSORS
    | {
        "attention_post_norm": "model.layers.{}.post_attention_layernorm",
        "mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
        "mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
    },
    GGUF,
)


def norm_of(config: Config) -> Norm:
    """GGUF files hold 1 + weight."""
    holds_one = config.get("norm_weights_include_one", False)
    return hf.rms_norm(config, rounds_last=True, adds_one=not holds_one)


def mlp_of(config: Config) -> Dense:
    kind = hf.activation(config, "hidden_activation", default="gelu_pytorch_tanh")
    return hf.dense(config, activation=kind)


def spec(config: Config) -> DecoderSpec:
    bias, norm = config.get("attention_bias", False), norm_of(config)
    window = None if config.is_null("sliding_window") else hf.whole(config, "sliding_window", 4096)
    layers = [
        LayerSpec(
            attention=hf.attention(
                config,
                default_head_dim=256,
                scale=hf.number(config, "query_pre_attn_scalar", 256) ** -0.5,
                window=window if kind == hf.SLIDING else None,
                softcap=hf.number_or_none(config, "attn_logit_softcapping", 50.0),
                qkv_bias=bias,
                o_bias=bias,
            ),
            mlp=mlp_of(config),
            norm=norm,
            post_norm=True,
        )
        for kind in hf.layer_kinds(config, every=2)
    ]
    return hf.decoder(
        config,
        names=NAMES,
        layers=layers,
        norm=norm,
        tied_embeddings=config.get("tie_word_embeddings", True),
        embedding_multiplier=hf.whole(config, "hidden_size") ** 0.5,
        final_softcap=hf.number_or_none(config, "final_logit_softcapping", 30.0),
    )
