"""FP8 checkpoints in compressed-tensors layout, as llm-compressor writes them."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.worker.quant.fp8 import E4M3, E4M3_MAX, quantize_rows

FLOAT8 = {
    "actorder": None,
    "block_structure": None,
    "group_size": None,
    "num_bits": 8,
    "observer_kwargs": {},
    "symmetric": True,
    "type": "float",
}
TOKENS = FLOAT8 | {"dynamic": True, "observer": None, "strategy": "token"}
CHANNELS = FLOAT8 | {"dynamic": False, "observer": "minmax", "strategy": "channel"}


def quantization_config(
    *,
    weights: dict[str, Any] = CHANNELS,
    activations: dict[str, Any] | None = TOKENS,
    **changes: Any,
) -> dict[str, Any]:
    """What stands in config.json."""
    group = {
        "input_activations": activations,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": "float-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    } | changes


def write_compressed(
    source: Path, target: Path, *, strategy: str, ignore: tuple[str, ...] = ("lm_head",)
) -> dict[str, Tensor]:
    """Quantize a plain checkpoint; returns what its tensors mean now, by their plain names."""
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization_config(
        weights=CHANNELS | {"strategy": strategy}, ignore=list(ignore)
    )
    (target / "config.json").write_text(json.dumps(config))
    tensors, means = {}, {}
    for name, values in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        means[name] = tensors[name] = values
        if not module.endswith("_proj") or module in ignore or values.dim() != 2:
            continue
        if strategy == "channel":
            quantized, scale = quantize_rows(values)
        else:
            scale = (values.abs().max() / E4M3_MAX)[None]
            quantized = (values / scale).to(E4M3)
        scale = scale.bfloat16()  # as they are mostly stored
        tensors |= {name: quantized, f"{module}.weight_scale": scale}
        means[name] = quantized.float() * scale.float()
    save_file(tensors, target / "model.safetensors")
    return means


def dequantized(target: Tensor, scale: Tensor | None) -> Tensor:
    """What a loaded parameter means."""
    return target if scale is None else target.float() * scale[:, None]
