"""What a checkpoint is, read once for everybody: the memory plan, the worker, the compiler ahead.

A family of models is a file in `families` and a line here. No torch.
"""

from collections.abc import Callable, Mapping
from typing import Any

from nanovllm.checkpoint.damage import blaming
from nanovllm.checkpoint.families import (
    llama,
    mistral,
    mixtral,
    olmo2,
    olmoe,
    qwen2,
    qwen3,
    qwen3_moe,
)
from nanovllm.checkpoint.hf_config import Config, architectures
from nanovllm.checkpoint.spec import DecoderSpec

FAMILIES: dict[str, Callable[[Config], DecoderSpec]] = {
    "LlamaForCausalLM": llama.spec,
    "MistralForCausalLM": mistral.spec,
    "MixtralForCausalLM": mixtral.spec,
    "Olmo2ForCausalLM": olmo2.spec,
    "OlmoeForCausalLM": olmoe.spec,
    "Qwen2ForCausalLM": qwen2.spec,
    "Qwen3ForCausalLM": qwen3.spec,
    "Qwen3MoeForCausalLM": qwen3_moe.spec,
}


def spec_from_config(fields: Mapping[str, Any]) -> DecoderSpec:
    """What to build for a config.json, or for GGUF metadata in that form.

    Raises `ValueError` naming what is missing, or what is not supported.
    """
    config = Config(fields)
    with blaming("config.json"):
        named = architectures(config)
        for name in named:
            if name in FAMILIES:
                spec = FAMILIES[name](config)
                config.check_all_maths_was_read()
                return spec
    raise ValueError(
        f"config.json: architectures {named or None} are not supported "
        f"(model_type {config.get('model_type')!r}): supported are {', '.join(FAMILIES)}"
    )
