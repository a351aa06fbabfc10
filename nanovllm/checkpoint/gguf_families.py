"""What GGUF metadata of each architecture means in the words of a Hugging Face config.json.

`gguf.hf_config` reads what all architectures have in common, and asks here for the rest. A family
is a function of few values and a line in `ARCHITECTURES`. Names of keys are llama.cpp's.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Fields = dict[str, Any]
NUM_LAYERS_OF_GEMMA2_27B, NUM_LAYERS_OF_GEMMA3_27B = 46, 62
SLIDING, FULL = "sliding_attention", "full_attention"


class Facts(Protocol):
    """The metadata and the tensors of one file."""

    def fact(self, key: str, default: Any = None) -> Any:
        """The value of the architecture's key. Raises `ValueError` if there is none at all."""

    def has(self, key: str) -> bool:
        """Whether the architecture's key is there."""

    def values(self, tensor: str) -> npt.NDArray[np.float32] | None:
        """A tensor of the file, if it is there."""


def _plain(facts: Facts, common: Fields) -> Fields:
    return {}


def _partial(facts: Facts, common: Fields) -> Fields:
    """Of heads that turn in part."""
    size = facts.fact("rope.dimension_count", common["head_dim"])
    return {"partial_rotary_factor": size / common["head_dim"]}


def _kinds(facts: Facts) -> Fields:
    """Which layers have a window; older files leave it to the architecture."""
    if not facts.has("attention.sliding_window_pattern"):
        return {}
    pattern = facts.fact("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        return {"layer_types": [SLIDING if slides else FULL for slides in pattern]}
    return {"sliding_window_pattern": pattern}


def _gemma(facts: Facts, common: Fields, *, large: int) -> Fields:
    """large: layers of the one size whose queries are scaled by the width of the model's heads."""
    is_large = common["num_hidden_layers"] == large
    width = common["hidden_size"] // common["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "norm_weights_include_one": True,
        "query_pre_attn_scalar": width if is_large else common["head_dim"],
        **_kinds(facts),
    }


def _gemma2(facts: Facts, common: Fields) -> Fields:
    return {
        **_gemma(facts, common, large=NUM_LAYERS_OF_GEMMA2_27B),
        "attn_logit_softcapping": facts.fact("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": facts.fact("final_logit_softcapping", 30.0),
    }


def _gemma3(facts: Facts, common: Fields) -> Fields:
    return {
        **_gemma(facts, common, large=NUM_LAYERS_OF_GEMMA3_27B),
        "rope_theta": facts.fact("rope.freq_base", 1_000_000.0),
        "rope_local_base_freq": facts.fact("rope.freq_base_swa", 10_000.0),
        "final_logit_softcapping": facts.fact("final_logit_softcapping", 0) or None,
    }


def _phi3(facts: Facts, common: Fields) -> Fields:
    """LongRoPE's divisors are tensors."""
    context = facts.fact("rope.scaling.original_context_length", common["max_position_embeddings"])
    fields = _partial(facts, common) | {"original_max_position_embeddings": context}
    short, long = (
        facts.values("rope_factors_short.weight"),
        facts.values("rope_factors_long.weight"),
    )
    if short is None or long is None:
        return fields
    scaling: Fields = {"type": "longrope", "short_factor": short.tolist()}
    scaling["long_factor"] = long.tolist()
    if attention_factor := facts.fact("rope.scaling.attn_factor", 0):
        scaling["attention_factor"] = attention_factor
    return fields | {"rope_scaling": scaling}


def _granite(facts: Facts, common: Fields) -> Fields:
    return {
        "attention_multiplier": facts.fact("attention.scale", common["head_dim"] ** -0.5),
        "embedding_multiplier": facts.fact("embedding_scale", 1.0),
        "residual_multiplier": facts.fact("residual_scale", 1.0),
        "logits_scaling": facts.fact("logit_scale", 1.0),
    }


def _cohere2(facts: Facts, common: Fields) -> Fields:
    return {
        "layer_norm_eps": facts.fact("attention.layer_norm_epsilon"),
        "logit_scale": facts.fact("logit_scale", 0.0625),
        **_kinds(facts),
    }


def _experts(facts: Facts, count: str = "num_experts") -> Fields:
    """count: what the family calls how many there are."""
    size = facts.fact("expert_feed_forward_length", facts.fact("feed_forward_length"))
    return {
        count: facts.fact("expert_count"),
        "num_experts_per_tok": facts.fact("expert_used_count"),
        "moe_intermediate_size": size,
    }


def _llama(facts: Facts, common: Fields) -> Fields:
    """Mixtral is called so, too."""
    if not facts.fact("expert_count", 0):
        return {}
    own = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    return {**own, **_experts(facts, "num_local_experts")}


def _qwen3_moe(facts: Facts, common: Fields) -> Fields:
    """llama.cpp always has weights of experts add up to 1 here."""
    return {**_experts(facts), "norm_topk_prob": True}


def _olmoe(facts: Facts, common: Fields) -> Fields:
    return _experts(facts)


def _olmo2(facts: Facts, common: Fields) -> Fields:
    """OLMo 3 is called so, too: it has windows, and scales the rope of layers without one."""
    if not facts.has("attention.sliding_window"):
        return {}
    own = {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3"}
    return {**own, **_kinds(facts)}


def _mistral3(facts: Facts, common: Fields) -> Fields:
    scaling = common["rope_scaling"]
    if scaling is None:
        return {}
    growth = facts.fact("attention.temperature_scale", 0)
    multiplier = facts.fact("rope.scaling.yarn_log_multiplier", 0)
    more: Fields = {"llama_4_scaling_beta": growth} if growth else {}
    if multiplier:
        more |= {"mscale": 1.0, "mscale_all_dim": multiplier}
    return {"rope_scaling": {**scaling, **more}}


def _gpt_oss(facts: Facts, common: Fields) -> Fields:
    """Its rope was made without rounding the ends of YaRN's ramp, whatever llama.cpp does."""
    scaling = common["rope_scaling"]
    if scaling is not None:
        scaling = {**scaling, "truncate": False}
    mixture = _experts(facts, "num_local_experts")
    return {
        **mixture,
        "intermediate_size": mixture["moe_intermediate_size"],
        "experts_are_apart": True,
        "rope_scaling": scaling,
        **_kinds(facts),
    }


class GGUFArchitecture(NamedTuple):
    """architecture and model_type: Hugging Face's; fields: what only this one has in its config."""

    architecture: str
    model_type: str
    fields: Callable[[Facts, Fields], Fields] = _plain


# general.architecture → what it is
ARCHITECTURES: Mapping[str, GGUFArchitecture] = {
    "cohere2": GGUFArchitecture("Cohere2ForCausalLM", "cohere2", _cohere2),
    "gemma2": GGUFArchitecture("Gemma2ForCausalLM", "gemma2", _gemma2),
    "gemma3": GGUFArchitecture("Gemma3ForCausalLM", "gemma3_text", _gemma3),
    "glm4": GGUFArchitecture("Glm4ForCausalLM", "glm4", _partial),
    "granite": GGUFArchitecture("GraniteForCausalLM", "granite", _granite),
    "gpt-oss": GGUFArchitecture("GptOssForCausalLM", "gpt_oss", _gpt_oss),
    "llama": GGUFArchitecture("LlamaForCausalLM", "llama", _llama),
    "mistral3": GGUFArchitecture("Ministral3ForCausalLM", "ministral3", _mistral3),
    "olmo2": GGUFArchitecture("Olmo2ForCausalLM", "olmo2", _olmo2),
    "olmoe": GGUFArchitecture("OlmoeForCausalLM", "olmoe", _olmoe),
    "phi3": GGUFArchitecture("Phi3ForCausalLM", "phi3", _phi3),
    "qwen2": GGUFArchitecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": GGUFArchitecture("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": GGUFArchitecture("Qwen3MoeForCausalLM", "qwen3_moe", _qwen3_moe),
    "smollm3": GGUFArchitecture("SmolLM3ForCausalLM", "smollm3"),
}
