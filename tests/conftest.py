"""Models that tests share: small random ones of every architecture, and SmolLM2 where it is."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nanovllm.checkpoint.locate import locate
from tests.dense_models import OLD_SPELLING, TINY_DENSE
from tests.moe_models import TINY_MOE

# Head sizes that do not follow from the hidden size, grouped queries, windows shorter than prompts.
SIZES = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
TINY: dict[str, tuple[type[PreTrainedModel], Callable[..., Any], dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"head_dim": 16}),
    "llama3": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "llama_linear": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": LINEAR_ROPE, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"head_dim": 16, "sliding_window": 20}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
    "qwen2_windows": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {"rms_norm_eps": 1e-5}),
    **TINY_DENSE,
    **TINY_MOE,
}


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture (a key of `TINY`) → directory of a small random model, saved in fp32."""
    root = tmp_path_factory.mktemp("checkpoints")

    def build(name: str) -> Path:
        path = root / name
        if not path.exists():
            model_class, config_class, changes = TINY[name]
            torch.manual_seed(0)
            model = model_class(config_class(**SIZES | changes))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:  # norms begin as ones, biases as zeros
                        parameter.add_(torch.randn_like(parameter), alpha=0.2)
            model.save_pretrained(path)
            if name in OLD_SPELLING:
                fields = json.loads((path / "config.json").read_text())
                del fields["rope_parameters"]
                (path / "config.json").write_text(json.dumps(fields | OLD_SPELLING[name]))
        return path

    return build


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return locate("smollm2").path


@pytest.fixture(scope="session")
def hf_smollm2(smollm2_path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """transformers' own reading of the same GGUF file, in fp32; takes about 20 s."""
    files: dict[str, Any] = {"gguf_file": smollm2_path.name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(smollm2_path.parent, **files)
        model = AutoModelForCausalLM.from_pretrained(
            smollm2_path.parent, dtype=torch.float32, **files
        )
    return model.eval(), tokenizer
