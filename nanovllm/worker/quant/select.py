"""Which linear layers of a model are kept quantized, and how; `worker` and `weights` ask.

A scheme comes from the user (`quantization`) or from the checkpoint (`quantization_config`); a
method is a line in `METHODS`. Embeddings and the head stay as they are.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nanovllm.config import Quantization
from nanovllm.worker.layers.linear import UNQUANTIZED, Linear
from nanovllm.worker.models.decoder import Decoder
from nanovllm.worker.quant import fp8

# method → the pass over one linear layer, which is still without memory
METHODS: dict[Quantization, Callable[[Linear, torch.device], None]] = {"fp8": fp8.quantize}
SUPPORTED = "an unquantized checkpoint, a GGUF file, or FP8 in compressed-tensors format"
FLOAT8 = {"type": "float", "num_bits": 8, "symmetric": True}


@dataclass(frozen=True, slots=True)
class Scheme:
    """What to quantize. Modules are named as in safetensors checkpoints, and may be patterns.

    stored: the checkpoint holds quantized weights already, with their scales.
    """

    method: Quantization
    stored: bool = False
    targets: tuple[str, ...] = ("Linear",)
    ignored: tuple[str, ...] = ()

    def covers(self, module: str) -> bool:
        """Whether that linear layer is quantized."""
        if any(_matches(pattern, module) for pattern in self.ignored):
            return False
        return any(pattern == "Linear" or _matches(pattern, module) for pattern in self.targets)

    def covers_all(self, modules: list[str]) -> bool:
        """Of one merged layer: all or none. Raises `ValueError` otherwise."""
        covered = [module for module in modules if self.covers(module)]
        if covered and len(covered) < len(modules):
            odd = next(module for module in modules if module not in covered)
            raise ValueError(
                f"config.json: quantization_config quantizes {covered[0]} but not {odd}, which are "
                f"multiplied as one: use {SUPPORTED}"
            )
        return bool(covered)


def choose_scheme(wanted: Quantization | None, checkpoint_config: dict[str, Any]) -> Scheme | None:
    """The checkpoint's scheme, else the user's, else None.

    Raises `ValueError` naming field and remedy if the checkpoint is quantized in another way.
    """
    found = checkpoint_config.get("quantization_config")
    if found is None:
        return None if wanted is None else Scheme(wanted)
    if found.get("quant_method") != "compressed-tensors":
        _refuse(f"quant_method {found.get('quant_method')}")
    if found.get("format") != "float-quantized":
        _refuse(f"compressed-tensors, format {found.get('format')}")
    if found.get("kv_cache_scheme") is not None:
        _refuse("compressed-tensors with a kv_cache_scheme")
    groups = list((found.get("config_groups") or {}).values())
    if not groups:
        _refuse("compressed-tensors without config_groups")
    for group in groups:
        _check_group(group)
    targets = tuple(target for group in groups for target in group.get("targets", ["Linear"]))
    ignored = tuple(found.get("ignore") or ())
    return Scheme("fp8", stored=True, targets=targets, ignored=ignored)


def allocate_linears(model: Decoder, scheme: Scheme | None) -> None:
    """Give every linear layer memory for its weights, in the form they will be kept in."""
    names = model.spec.names.safetensors
    for index, layer in enumerate(model.layers):
        for linear in layer.linears():
            modules = [names[part].format(index) for part in linear.shards]
            if scheme is not None and scheme.covers_all(modules):
                METHODS[scheme.method](linear, model.device)
            else:
                linear.allocate(model.device)


def describe(model: Decoder, scheme: Scheme | None) -> list[str]:
    """Notes for the user: what came of it."""
    if scheme is None:
        return []
    linears = [linear for layer in model.layers for linear in layer.linears()]
    num_quantized = sum(linear.method is not UNQUANTIZED for linear in linears)
    native = any(linear.method is fp8.NATIVE_FP8 for linear in linears)
    origin = "of the checkpoint" if scheme.stored else "quantized at load"
    effect = "FP8 tensor cores" if native else "plain torch, which saves memory and no time"
    return [f"FP8 weights {origin} in {num_quantized} linear layers, multiplied by {effect}"]


def _matches(pattern: str, module: str) -> bool:
    """As compressed-tensors means it: a name, or a regular expression after "re:"."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern == module


def _check_group(group: dict[str, Any]) -> None:
    weights, activations = group.get("weights") or {}, group.get("input_activations")
    by_row = weights.get("strategy") in ("channel", "tensor")
    if not (FLOAT8.items() <= weights.items() and by_row):
        _refuse("compressed-tensors, weights other than FP8 per channel or per tensor")
    if weights.get("dynamic") or group.get("output_activations") is not None:
        _refuse("compressed-tensors with quantized outputs or dynamic weights")
    dynamic_tokens = FLOAT8 | {"strategy": "token", "dynamic": True}
    if activations is None or not dynamic_tokens.items() <= activations.items():
        _refuse("compressed-tensors, activations other than FP8 per token, dynamic")


def _refuse(what: str) -> None:
    raise ValueError(f"config.json: quantization_config ({what}) is not supported: use {SUPPORTED}")
