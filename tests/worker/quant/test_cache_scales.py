"""Calibrated scales of an FP8 KV cache, as compressed-tensors checkpoints bring them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.checkpoint.quantization import choose_scheme
from nanovllm.worker.quant.fp8 import E4M3
from tests.worker.attention.decoding import Driver
from tests.worker.models.test_decoder import PROMPT, load_reference, reference_logits
from tests.worker.quant.compressed import FLOAT8, quantization_config

GROWTH = 4096.0  # of keys and values: beyond what e4m3 holds without a scale
SCHEME = FLOAT8 | {"strategy": "tensor", "dynamic": False}
BY = {"k_proj": GROWTH, "q_proj": 1 / GROWTH, "v_proj": GROWTH, "o_proj": 1 / GROWTH}
NORMS = {"k_norm": GROWTH, "q_norm": 1 / GROWTH}


def write_scaled(source: Path, target: Path, *, scale: float) -> Checkpoint:
    """The same model, in which keys and values are larger and queries and `o` as much smaller; no
    weight is quantized."""
    tensors = load_file(source / "model.safetensors")
    has_norms = any("k_norm" in name for name in tensors)
    grown = {"v_proj": BY["v_proj"], "o_proj": BY["o_proj"], **NORMS} if has_norms else BY
    for name in list(tensors):
        module = name.rsplit(".", 2)[-2]
        tensors[name] = tensors[name] * grown.get(module, 1.0)
        if module == "k_proj":
            place = name.removesuffix("k_proj.weight")
            tensors[f"{place}k_scale"] = torch.tensor([scale])
            tensors[f"{place}v_scale"] = torch.tensor(scale * 1.5)
    save_file(tensors, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization_config(ignore=["re:.*"], kv_cache_scheme=SCHEME)
    (target / "config.json").write_text(json.dumps(config))
    return Checkpoint(target, "safetensors")


def logits_of(checkpoint: Checkpoint, kv_dtype: torch.dtype | None) -> Tensor:
    """Prompt, then tokens one by one, which read what is cached."""
    scheme = choose_scheme(None, checkpoint.config())
    assert scheme is not None and scheme.has_kv_scales
    driver = Driver.load(checkpoint, scheme=scheme, kv_dtype=kv_dtype)
    parts = [driver.run({"a": PROMPT[:30]})["a"]]
    parts += [driver.run({"a": [token]})["a"] for token in PROMPT[30:40]]
    return torch.cat(parts)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_scales_keep_large_keys_in_range(
    name: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    source = tiny_checkpoint(name)
    expected = reference_logits(load_reference(source), PROMPT[:40])
    checkpoint = write_scaled(source, tmp_path, scale=GROWTH * 0.7)
    exact = logits_of(checkpoint, None)
    torch.testing.assert_close(exact, expected, rtol=1e-3, atol=1e-3)
    errors = (logits_of(checkpoint, E4M3) - expected).abs().mean()
    plain = write_scaled(source, tmp_path, scale=1.0)
    unscaled = (logits_of(plain, E4M3) - expected).abs().nan_to_num(torch.inf).mean()
    assert errors < 0.1 * expected.std() and unscaled > 3 * errors


def test_scales_must_be_numbers(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = write_scaled(tiny_checkpoint("llama"), tmp_path, scale=-1.0)
    with pytest.raises(ValueError, match=r"k_scale is -1\.0"):
        logits_of(checkpoint, E4M3)


@pytest.mark.parametrize("changes", [{"strategy": "channel"}, {"num_bits": 4}, {"dynamic": True}])
def test_other_caches_are_refused(changes: dict[str, object]) -> None:
    fields = {"quantization_config": quantization_config(kv_cache_scheme=SCHEME | changes)}
    with pytest.raises(ValueError, match="kv_cache_scheme"):
        choose_scheme(None, fields)
