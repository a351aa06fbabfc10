"""Small random dense models, which `conftest.TINY` has besides those written there.

At least two odd configurations of every family: nulls, tied and untied, other sizes of heads,
windows shorter than prompts. `OLD_SPELLING`: whose configs are written as before transformers 5.
"""

from collections.abc import Callable
from typing import Any

import transformers as hf

SLIDING, FULL = "sliding_attention", "full_attention"
MIXED = {"layer_types": [SLIDING, FULL, SLIDING], "sliding_window": 20}
PAD = {"pad_token_id": 0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.0, 4.0],
}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0}
MULTIPLIERS = {
    "embedding_multiplier": 6.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.2,
}
GROWING = {
    **YARN,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}


def seeing(**text: Any) -> hf.PreTrainedConfig:
    """A Gemma 3 that sees, whose text part is as `text` says."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    ids = {"image_token_index": 0, "boi_token_index": 1, "eoi_token_index": 2}  # in no prompt
    return hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)


Tiny = tuple[type[hf.PreTrainedModel], Callable[..., Any], dict[str, Any]]
GEMMA2 = hf.Gemma2ForCausalLM, hf.Gemma2Config
GEMMA3 = hf.Gemma3ForCausalLM, hf.Gemma3TextConfig
GEMMA4 = hf.Gemma4ForCausalLM, hf.Gemma4TextConfig
PHI3 = hf.Phi3ForCausalLM, hf.Phi3Config
GLM4 = hf.Glm4ForCausalLM, hf.Glm4Config
SMOLLM3 = hf.SmolLM3ForCausalLM, hf.SmolLM3Config
GRANITE = hf.GraniteForCausalLM, hf.GraniteConfig
OLMO3 = hf.Olmo3ForCausalLM, hf.Olmo3Config
COHERE2 = hf.Cohere2ForCausalLM, hf.Cohere2Config
MINISTRAL3 = hf.Ministral3ForCausalLM, hf.Ministral3Config
# Of heads in layers that see all, and of the vectors that layers are given: there are none.
WIDE = {"head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 0}
TINY_DENSE: dict[str, Tiny] = {
    "llama_yarn": (hf.LlamaForCausalLM, hf.LlamaConfig, {"rope_parameters": YARN}),
    "qwen2_yarn": (
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config,
        {"rope_parameters": {**YARN, "attention_factor": 0.8, "beta_fast": 8.0, "truncate": False}},
    ),
    "llama_dynamic": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig,
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 300.0, "factor": 4.0}},
    ),
    "gemma2": (
        *GEMMA2,
        {
            "head_dim": 16,
            "sliding_window": 20,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma2_uncapped": (
        *GEMMA2,
        {
            "head_dim": 12,
            "layer_types": [FULL, SLIDING, SLIDING],
            "sliding_window": 9,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "gemma4": (
        *GEMMA4,
        {
            **WIDE,
            **MIXED,
            "layer_types": [SLIDING, SLIDING, FULL],
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma4_moe": (  # beside a dense MLP
        *GEMMA4,
        {
            **WIDE,
            **MIXED,
            "layer_types": [SLIDING, FULL, FULL],
            "enable_moe_block": True,
            "num_experts": 5,
            "top_k_experts": 3,
            "moe_intermediate_size": 40,
            "tie_word_embeddings": False,
        },
    ),
    "gemma4_small": (  # as E2B: the last layers have no keys, and all are given a vector
        *GEMMA4,
        {
            **WIDE,
            # Scores are not scaled down: with larger weights two ways to round in fp32 lie apart.
            "initializer_range": 0.03,
            "num_hidden_layers": 5,
            "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL],  # can be cut behind the first
            "sliding_window": 9,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 160,
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 100.0},
                FULL: {
                    "rope_type": "proportional",
                    "rope_theta": 1000.0,
                    "partial_rotary_factor": 0.5,
                    "factor": 2.0,
                },
            },
        },
    ),
    "gemma3": (
        *GEMMA3,
        {
            **MIXED,
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 100.0},
                FULL: LINEAR,
            },
        },
    ),
    "gemma3_old": (
        *GEMMA3,
        {
            "head_dim": 24,
            "num_key_value_heads": 1,
            "layer_types": [SLIDING, FULL, SLIDING],
            "sliding_window": 9,
            "final_logit_softcapping": 2.0,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3_seeing": (
        hf.Gemma3ForConditionalGeneration,
        seeing,
        {**MIXED, "head_dim": 16},
    ),
    "phi3": (
        *PHI3,
        {
            **PAD,
            "sliding_window": 20,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "phi3_long": (
        *PHI3,
        {
            **PAD,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 512,
            "rope_parameters": {**LONG, "partial_rotary_factor": 0.5},
        },
    ),
    "glm4": (*GLM4, {**PAD, "head_dim": 16}),
    "glm4_tied": (
        *GLM4,
        {
            **PAD,
            "head_dim": 24,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.25,
            },
        },
    ),
    "glm": (hf.GlmForCausalLM, hf.GlmConfig, {**PAD, "head_dim": 20}),
    "smollm3": (*SMOLLM3, {**PAD, "no_rope_layers": [1, 0, 1], "attention_bias": True}),
    "smollm3_windows": (
        *SMOLLM3,
        {
            **PAD,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 20,
            "tie_word_embeddings": False,
            "mlp_bias": True,
        },
    ),
    "granite": (*GRANITE, MULTIPLIERS),
    "granite_tied": (
        *GRANITE,
        {
            **MULTIPLIERS,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "rms_norm_eps": 1e-2,
        },
    ),
    "olmo3": (
        *OLMO3,
        {**MIXED, "rope_parameters": {SLIDING: {"rope_theta": 500000.0}, FULL: YARN}},
    ),
    "olmo3_old": (*OLMO3, {"sliding_window": 9, "num_key_value_heads": 4, "attention_bias": True}),
    "cohere2": (*COHERE2, {**MIXED, "logit_scale": 0.25}),
    "cohere2_untied": (
        *COHERE2,
        {
            "layer_types": [FULL, SLIDING, SLIDING],
            "sliding_window": 9,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "layer_norm_eps": 1e-2,
            "logit_scale": 1.5,
        },
    ),
    "ministral3": (*MINISTRAL3, {"head_dim": 16, "rope_parameters": GROWING}),
    "ministral3_old": (
        *MINISTRAL3,
        {
            "head_dim": 12,
            "sliding_window": 20,
            "tie_word_embeddings": True,
            "rope_parameters": GROWING,
        },
    ),
}
# What replaces `rope_parameters` in the config.json of these, and what is left out.
OLD_SPELLING: dict[str, dict[str, Any]] = {
    "gemma3_old": {
        "layer_types": None,
        "sliding_window_pattern": 2,
        "rope_theta": 5000.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi3_long": {
        "rope_theta": 100.0,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {
            **{k: LONG[k] for k in ("short_factor", "long_factor")},
            "type": "longrope",
        },
    },
    "glm4": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "granite_tied": {"rope_theta": 700.0, "rope_scaling": None},
    "olmo3_old": {
        "layer_types": None,
        "rope_theta": 500000.0,
        "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"},
    },
    "cohere2_untied": {"rope_theta": 500.0},
    "ministral3_old": {"rope_scaling": GROWING},
    "qwen2_yarn": {
        "rope_theta": 500000.0,
        "rope_scaling": {**{k: v for k, v in YARN.items() if k != "rope_theta"}, "truncate": False},
    },
}
