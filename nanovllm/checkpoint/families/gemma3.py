"""Gemma 3 (2025), also the text part of its multimodal checkpoints: Gemma 2 with norms of queries
and keys instead of soft caps, and a rope of their own for the layers with a window."""

from msgspec.structs import replace

from nanovllm.checkpoint import hf_config as hf
from nanovllm.checkpoint.families.gemma2 import NAMES, mlp_of, norm_of
from nanovllm.checkpoint.hf_config import Config
from nanovllm.checkpoint.spec import DecoderSpec, LayerSpec
from nanovllm.checkpoint.weight_names import of_text_part

# kind of layer → the field of its base before `rope_parameters`, and the base itself
BASES = {
    "sliding_attention": ("rope_local_base_freq", 10_000.0),
    "full_attention": ("rope_theta", 1_000_000.0),
}


def spec(config: Config) -> DecoderSpec:
    bias, norm = config.get("attention_bias", False), norm_of(config)
    window = None if config.is_null("sliding_window") else hf.whole(config, "sliding_window", 4096)
    layers = []
    for kind in hf.layer_kinds(config, every=6, field="sliding_window_pattern"):
        field, theta = BASES[kind]
        layer = LayerSpec(
            attention=hf.attention(
                config,
                default_head_dim=256,
                scale=hf.number(config, "query_pre_attn_scalar", 256) ** -0.5,
                rope=hf.rope(config, kind, rope_theta=theta, theta_field=field),
                window=window if kind == hf.SLIDING else None,
                softcap=hf.number_or_none(config, "attn_logit_softcapping"),
                qk_norm="head",
                qkv_bias=bias,
                o_bias=bias,
            ),
            mlp=mlp_of(config),
            norm=norm,
            post_norm=True,
        )
        layers.append(layer)
    made = hf.decoder(
        config,
        names=of_text_part(NAMES),
        layers=layers,
        norm=norm,
        tied_embeddings=config.get("tie_word_embeddings", True),
        embedding_multiplier=hf.whole(config, "hidden_size") ** 0.5,
        final_softcap=hf.number_or_none(config, "final_logit_softcapping"),
    )
    # Its configs tell of all positions, where others tell of those before linear scaling.
    return replace(
        made, max_position_embeddings=hf.whole(config, "max_position_embeddings", 131_072)
    )
