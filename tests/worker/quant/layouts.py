"""Small checkpoints in the layouts that quantizers publish, and what their weights mean.

compressed-tensors' are written and read back by the package itself. AWQ's and GPTQ's are packed
here, code by code as their packages do, and mean what the published formula makes of the codes.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor

TensorFile = dict[str, Tensor]
# What one layer becomes: tensors by the ends of their names, and what they mean together.
Quantize = Callable[[str, Tensor], tuple[TensorFile, Tensor]]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def write(source: Path, target: Path, config: dict[str, Any], quantize: Quantize) -> TensorFile:
    """Rewrite a plain checkpoint; returns what all its tensors mean, by their plain names."""
    fields = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))
    tensors: TensorFile = {}
    means: TensorFile = {}
    for name, values in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        means[name] = values
        if not module.endswith("_proj") or values.dim() != 2:
            tensors[name] = values
            continue
        found, means[name] = quantize(module, values)
        tensors |= {f"{module}.{end}": tensor.contiguous() for end, tensor in found.items()}
    save_file(tensors, target / "model.safetensors")
    return means


def codes_of(
    values: Tensor, *, bits: int, group: int, symmetric: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [outputs, inputs], scales and zeros [outputs, groups], int32 and float16."""
    grouped = values.float().unflatten(1, (-1, group))
    low, high, most = grouped.amin(-1), grouped.amax(-1), 2**bits - 1
    if symmetric:
        high = grouped.abs().amax(-1)
        low = -high
    scale = ((high - low) / most).half()
    zero = (-low / scale.float()).round().clamp(0, most)
    codes = (grouped / scale.float()[:, :, None]).round() + zero[:, :, None]
    return codes.clamp(0, most).flatten(1).int(), scale, zero.int()


def pack(codes: Tensor, bits: int, order: list[int] | None = None) -> Tensor:
    """codes: [n, size] → int32 [n, size * bits / 32]: place i of a word holds code order[i]."""
    count = 32 // bits
    words = torch.zeros(len(codes), codes.shape[1] // count, dtype=torch.int64)
    for column in range(words.shape[1]):
        for place, index in enumerate(order or range(count)):
            words[:, column] |= codes[:, column * count + index].long() << bits * place
    return torch.where(words >= 2**31, words - 2**32, words).int()


def awq(group: int) -> tuple[dict[str, Any], Quantize]:
    def quantize(module: str, values: Tensor) -> tuple[TensorFile, Tensor]:
        codes, scale, zero = codes_of(values, bits=4, group=group)
        found = {
            "qweight": pack(codes.t(), 4, AWQ_ORDER),
            "qzeros": pack(zero.t(), 4, AWQ_ORDER),
            "scales": scale.t(),
        }
        return found, meaning(codes, scale, zero, torch.arange(values.shape[1]) // group)

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    return config | {"zero_point": True, "modules_to_not_convert": None}, quantize


def gptq(
    *, bits: int, group: int, desc_act: bool = False, version: int = 1, symmetric: bool = False
) -> tuple[dict[str, Any], Quantize]:
    """group: -1 for all inputs. With `desc_act` one order for all layers of as many inputs."""

    def quantize(module: str, values: Tensor) -> tuple[TensorFile, Tensor]:
        inputs = values.shape[1]
        size = inputs if group == -1 else group
        order = torch.arange(inputs)
        if desc_act:
            order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))
        codes, scale, zero = codes_of(values[:, order], bits=bits, group=size, symmetric=symmetric)
        codes, group_of = codes[:, order.argsort()], order.argsort() // size
        stored = (zero - 1) & 2**bits - 1 if version == 1 else zero
        found = {
            "qweight": pack(codes, bits).t(),
            "qzeros": pack(stored.t(), bits),
            "scales": scale.t(),
            "g_idx": group_of.int(),
            "bias": torch.zeros(len(values), dtype=torch.float16),
        }
        if not desc_act:
            del found["g_idx"]
        return found, meaning(codes, scale, zero, group_of)

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": desc_act}
    return config | {"checkpoint_format": "gptq" if version == 1 else "gptq_v2"}, quantize


def meaning(codes: Tensor, scale: Tensor, zero: Tensor, group_of: Tensor) -> Tensor:
    """As both packages compute it, in float16."""
    return scale[:, group_of] * (codes - zero[:, group_of]).half()


def compressed(
    form: str, weights: dict[str, Any], tokens: dict[str, Any] | None = None, **changes: Any
) -> tuple[dict[str, Any], Quantize]:
    """By the package's own compressor of that format; scales are bfloat16."""
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=None if tokens is None else QuantizationArgs(**tokens),
    )
    compressor = BaseCompressor.get_value_from_registry(form)
    assert scheme.weights is not None

    def quantize(module: str, values: Tensor) -> tuple[TensorFile, Tensor]:
        scale, zero = calculate_qparams(*extremes(values.bfloat16(), weights), scheme.weights)
        state = {"weight": values.bfloat16(), "weight_scale": scale, "weight_zero_point": zero}
        if tokens is not None and not tokens["dynamic"]:
            state["input_scale"] = torch.ones(1)
        stored = compressor.compress(state, scheme)
        mean = compressor.decompress(dict(stored), scheme)["weight"]
        return stored, mean

    group = {"weights": weights, "input_activations": tokens, "targets": ["Linear"]}
    config = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
    return config | {"config_groups": {"group_0": group}} | changes, quantize


def extremes(values: Tensor, weights: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Of what shares a scale, in the shape of scales."""
    match weights["strategy"]:
        case "group":
            grouped = values.unflatten(1, (-1, weights["group_size"]))
        case "channel":
            grouped = values[:, None]
        case "tensor":
            return values.min()[None], values.max()[None]
        case "block":
            return block_extremes(values, *weights["block_structure"])
    return grouped.amin(-1), grouped.amax(-1)


def block_extremes(values: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    rows = [list(row.split(width, 1)) for row in values.split(height, 0)]
    low, high = ([[find(one) for one in row] for row in rows] for find in (torch.min, torch.max))
    return torch.tensor(low, dtype=values.dtype), torch.tensor(high, dtype=values.dtype)


def fp8_blocks(size: int) -> tuple[dict[str, Any], Quantize]:
    """DeepSeek's and Qwen's own: the inverse of what a block was multiplied by, in float32."""

    def quantize(module: str, values: Tensor) -> tuple[TensorFile, Tensor]:
        low, high = block_extremes(values, size, size)
        scale = torch.maximum(-low, high) / 448
        wide = scale.repeat_interleave(size, 0)[: len(values)]
        wide = wide.repeat_interleave(size, 1)[:, : values.shape[1]]
        codes = (values / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale_inv": scale}, codes.float() * wide

    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [size, size]}
    return config | {"activation_scheme": "dynamic"}, quantize


def integers(bits: int, strategy: str, *, symmetric: bool, **changes: Any) -> dict[str, Any]:
    fields = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    return fields | {"dynamic": False} | changes


def formats() -> Iterator[tuple[str, tuple[dict[str, Any], Quantize]]]:
    """Those whose tokens stay as they are, by name. Layers are 64 and 96 wide."""
    for group in (16, 32):
        yield f"awq {group}", awq(group)
        for bits in (4, 8):
            yield f"gptq {bits} {group}", gptq(bits=bits, group=group)
            for symmetric in (True, False):
                weights = integers(bits, "group", symmetric=symmetric, group_size=group)
                name = f"compressed {bits} {group} {'symmetric' if symmetric else 'zeros'}"
                yield name, compressed("pack-quantized", weights)
    for bits in (4, 8):
        yield f"gptq {bits} ordered", gptq(bits=bits, group=32, desc_act=True)
        yield f"gptq {bits} all inputs", gptq(bits=bits, group=-1)
        yield f"gptq {bits} v2", gptq(bits=bits, group=32, version=2, symmetric=True)
        weights = integers(bits, "channel", symmetric=True)
        yield f"compressed {bits} channel", compressed("pack-quantized", weights)
    floats = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    block = floats | {"strategy": "block", "block_structure": [32, 32]}
    tokens = floats | {"strategy": "group", "group_size": 32, "dynamic": True}
    yield "compressed fp8 blocks", compressed("float-quantized", block, tokens)
    for strategy in ("channel", "tensor"):
        weights = floats | {"strategy": strategy}
        yield f"compressed fp8 {strategy}, plain tokens", compressed("naive-quantized", weights)
    for size in (16, 32):
        yield f"fp8 blocks {size}", fp8_blocks(size)


FORMATS = dict(formats())
