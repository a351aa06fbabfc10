"""Quantized experts that are spread over ranks and not cut: each is what one rank has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.checkpoint.quantization import Scheme, choose_scheme
from nanovllm.config import Quantization
from tests.conftest import SIZES
from tests.worker.quant.layouts import FORMATS, write
from tests.worker.quant.whole_experts import assert_experts_are_those_of_one_rank

SHAPES: dict[str, Any] = {
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 4,
    "head_dim": 16,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose shares are whole groups of 32."""
    path = tmp_path_factory.mktemp("experts")
    torch.manual_seed(1)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | SHAPES)).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "name",
    [
        *("awq 32", "gptq 8 32", "compressed 4 32 zeros", "compressed fp8 blocks"),
        *("fp8 blocks 32", "compressed fp8 channel, plain tokens"),
    ],
)
def test_of_a_quantized_checkpoint(name: str, plain: Path, tmp_path: Path) -> None:
    write(plain, tmp_path, *FORMATS[name])
    checkpoint = Checkpoint(tmp_path, "safetensors")
    scheme = choose_scheme(None, checkpoint.config())
    assert_experts_are_those_of_one_rank(checkpoint, scheme)


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_quantized_at_load(name: Quantization, plain: Path) -> None:
    checkpoint = Checkpoint(plain, "safetensors")
    assert_experts_are_those_of_one_rank(checkpoint, Scheme.at_load(name), size=4)


def test_with_biases(tiny_checkpoint: Callable[[str], Path]) -> None:
    """Each rank adds those of its own experts, not the first one those of all."""
    checkpoint = Checkpoint(tiny_checkpoint("gpt_oss"), "safetensors")
    assert_experts_are_those_of_one_rank(checkpoint, Scheme.at_load("fp8"))
