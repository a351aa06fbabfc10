"""What a checkpoint is, read once for everybody: the memory plan, the worker, the compiler ahead.

A family of models is a file in `families` and a line here. No torch.
"""

from collections.abc import Callable, Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any

from nanovllm.checkpoint.damage import blaming
from nanovllm.checkpoint.families import (
    cohere2,
    gemma2,
    gemma3,
    gemma4,
    glm4,
    glm4_moe,
    gpt_oss,
    granite,
    granite_moe,
    llama,
    ministral3,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
)
from nanovllm.checkpoint.hf_config import Config, architectures, maths_in
from nanovllm.checkpoint.spec import DecoderSpec

FAMILIES: dict[str, Callable[[Config], DecoderSpec]] = {
    "Cohere2ForCausalLM": cohere2.spec,
    "Gemma2ForCausalLM": gemma2.spec,
    "Gemma3ForCausalLM": gemma3.spec,
    "Gemma3ForConditionalGeneration": gemma3.spec,
    "Gemma4ForCausalLM": gemma4.spec,
    "Gemma4ForConditionalGeneration": gemma4.spec,
    "Glm4ForCausalLM": glm4.spec,
    "Glm4MoeForCausalLM": glm4_moe.spec,
    "GlmForCausalLM": glm4.spec,
    "GraniteForCausalLM": granite.spec,
    "GraniteMoeForCausalLM": granite_moe.spec,
    "GptOssForCausalLM": gpt_oss.spec,
    "LlamaForCausalLM": llama.spec,
    "Ministral3ForCausalLM": ministral3.spec,
    "Mistral3ForConditionalGeneration": ministral3.spec,
    "MistralForCausalLM": mistral.spec,
    "MixtralForCausalLM": mixtral.spec,
    "Olmo2ForCausalLM": olmo2.spec,
    "Olmo3ForCausalLM": olmo3.spec,
    "OlmoeForCausalLM": olmoe.spec,
    "Phi3ForCausalLM": phi3.spec,
    "Qwen2ForCausalLM": qwen2.spec,
    "Qwen2MoeForCausalLM": qwen2_moe.spec,
    "Qwen3ForCausalLM": qwen3.spec,
    "Qwen3MoeForCausalLM": qwen3_moe.spec,
    "SmolLM3ForCausalLM": smollm3.spec,
}
# What no family here does yet → how fields of config.json begin that ask for it.
MISSING = {
    "recurrent layers": ("mamba_", "ssm_", "linear_", "lru_", "rnn_", "conv_L_", "recurrent_"),
    "latent attention (MLA)": ("kv_lora_rank", "q_lora_rank"),
    "vision": ("vision_config", "vision_tower", "image_token_"),
    "audio": ("audio_config", "audio_token_"),
    "an encoder": ("is_encoder_decoder", "num_encoder_layers"),
}
MISSING_FIELDS = tuple(beginning for found in MISSING.values() for beginning in found)
RECURRENT_KINDS = {"linear_attention", "mamba", "recurrent", "conv"}  # of layer_types


def spec_from_config(fields: Mapping[str, Any]) -> DecoderSpec:
    """What to build for a config.json, or for GGUF metadata in that form.

    Raises `ValueError` naming what is missing, or what is not supported.
    """
    config = Config(fields)
    with blaming("config.json"):
        named = architectures(config)
        for name in named:
            if name in FAMILIES:
                config = config.of_text_part()
                spec = FAMILIES[name](config)
                config.check_all_maths_was_read()
                return spec
    kind = config.get("model_type")
    nearest = _nearest((named or [str(kind)])[0])
    lacks = ", ".join(_missing(config)) or "what its config does not tell"
    raise ValueError(
        f"config.json: architectures {named or None} are not supported (model_type {kind!r}). The "
        f"nearest supported one is {nearest}, which lacks {lacks}. "
        f"Supported are {', '.join(FAMILIES)}"
    )


def _nearest(name: str) -> str:
    """The supported architecture whose name is most like this one."""
    return max(FAMILIES, key=lambda known: SequenceMatcher(None, known, name).ratio())


def _missing(config: Config) -> Iterator[str]:
    """What a config asks for that a plain decoder does not do, in words and in fields."""
    for what, beginnings in MISSING.items():
        asked = [name for name in config if name.startswith(beginnings) and config[name]]
        kinds = RECURRENT_KINDS.intersection(config.get("layer_types") or ())
        if asked or (kinds and what == "recurrent layers"):
            yield f"{what} ({', '.join([*asked, *sorted(kinds)][:3])})"
    told = [field for field in maths_in(config) if not field.startswith(MISSING_FIELDS)]
    if told:
        yield f"perhaps what these fields say: {', '.join(sorted(told))}"
