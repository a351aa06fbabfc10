"""Small random mixtures of experts, which `conftest.TINY` has besides dense models.

At least two odd configurations of every family: what is null, tied, renormalized, or another size.
"""

from collections.abc import Callable
from typing import Any

from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
FEW = {"num_experts_per_tok": 2}
QWEN3 = {**FEW, "head_dim": 16, "num_experts": 6, "moe_intermediate_size": 40}
TINY_MOE: dict[str, tuple[type[PreTrainedModel], Callable[..., Any], dict[str, Any]]] = {
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {**QWEN3, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "qwen3_moe_steps": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {**QWEN3, "decoder_sparse_step": 2, "num_experts_per_tok": 5, "tie_word_embeddings": True},
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        {**FEW, "num_local_experts": 6, "sliding_window": 20},
    ),
    "mixtral_one": (
        MixtralForCausalLM,
        MixtralConfig,
        {
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "head_dim": 20,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 6, "num_experts_per_tok": 3}),
    "olmoe_renormalized": (
        OlmoeForCausalLM,
        OlmoeConfig,
        {**FEW, "num_experts": 5, "norm_topk_prob": True, "rms_norm_eps": 1e-3},
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {
            **FEW,
            "num_local_experts": 5,
            "head_dim": 16,
            "sliding_window": 20,
            "rope_parameters": YARN,
        },
    ),
    "gpt_oss_odd": (
        GptOssForCausalLM,
        GptOssConfig,
        {
            "num_experts_per_tok": 4,
            "num_local_experts": 6,
            "head_dim": 12,
            "sliding_window": 7,
            "attention_bias": False,
            "swiglu_limit": 0.5,
            "swiglu_alpha": 1.1,
            "tie_word_embeddings": True,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "rope_parameters": PLAIN_ROPE,
        },
    ),
    "gpt_oss_blocks": (  # whose weights can be in MXFP4
        GptOssForCausalLM,
        GptOssConfig,
        {
            **FEW,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_local_experts": 5,
            "head_dim": 16,
            "sliding_window": 20,
            "rope_parameters": PLAIN_ROPE,
        },
    ),
    "granite_moe": (
        GraniteMoeForCausalLM,
        GraniteMoeConfig,
        {
            **FEW,
            "num_local_experts": 6,
            "embedding_multiplier": 12.0,
            "logits_scaling": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
        },
    ),
    "granite_moe_plain": (
        GraniteMoeForCausalLM,
        GraniteMoeConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 4, "tie_word_embeddings": True},
    ),
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {
            **FEW,
            "num_experts": 6,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56,
        },
    ),
    "qwen2_moe_renormalized": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {
            **FEW,
            "num_experts": 5,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
            "tie_word_embeddings": True,
        },
    ),
    "glm4_moe": (
        Glm4MoeForCausalLM,
        Glm4MoeConfig,
        {
            **FEW,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 40,
            "head_dim": 16,
            "use_qk_norm": True,
            "attention_bias": True,
            "routed_scaling_factor": 2.5,
        },
    ),
    "glm4_moe_odd": (
        Glm4MoeForCausalLM,
        Glm4MoeConfig,
        {
            "num_experts_per_tok": 3,
            "n_routed_experts": 5,
            "n_shared_experts": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 2,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
        },
    ),
}
