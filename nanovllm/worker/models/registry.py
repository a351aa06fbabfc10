"""The table of supported architectures: a model is one file and one line here.

`worker` asks it what to build for a checkpoint's config.
"""

from collections.abc import Callable
from typing import Any

import torch

from nanovllm.worker.models import llama, mistral, qwen2, qwen3
from nanovllm.worker.models.decoder import DecoderSpec

ARCHITECTURES: dict[str, Callable[[dict[str, Any]], DecoderSpec]] = {
    "LlamaForCausalLM": llama.spec,
    "MistralForCausalLM": mistral.spec,
    "Qwen2ForCausalLM": qwen2.spec,
    "Qwen3ForCausalLM": qwen3.spec,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def spec_from_config(config: dict[str, Any]) -> DecoderSpec:
    """What to build for a config.json. Raises `ValueError` naming what is not supported."""
    for name in config.get("architectures") or []:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name](config)
    raise ValueError(
        f"config.json: architectures {config.get('architectures')} are not supported: "
        f"supported are {', '.join(ARCHITECTURES)}"
    )


def dtype_from_config(config: dict[str, Any]) -> torch.dtype | None:
    """The precision the checkpoint was saved in (`dtype`, before transformers 5 `torch_dtype`)."""
    return DTYPES.get(config.get("dtype") or config.get("torch_dtype") or "")
