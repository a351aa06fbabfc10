"""Gives every linear layer of a model its memory and its method; `startup` and `weights` ask.

What is quantized, `checkpoint.quantization` says; a method is a file here and a line in `METHODS`.
"""

from collections.abc import Callable

import torch

from nanovllm.checkpoint.quantization import Scheme
from nanovllm.config import Quantization
from nanovllm.worker.layers.linear import UNQUANTIZED, Linear
from nanovllm.worker.models.decoder import Decoder
from nanovllm.worker.quant import fp8

# method → the pass over one linear layer, which is still without memory
METHODS: dict[Quantization, Callable[[Linear, torch.device], None]] = {"fp8": fp8.quantize}


def allocate_linears(model: Decoder, scheme: Scheme | None) -> None:
    """Give every linear layer memory for its weights, in the form they will be kept in."""
    names = model.spec.names.safetensors
    for index, layer in enumerate(model.layers):
        for linear in layer.linears():
            modules = [names[part].format(index) for part in linear.shards]
            kept = None if scheme is None else scheme.format_of_all(modules)
            if kept is None:
                linear.allocate(model.device)
            else:
                METHODS[kept.method](linear, model.device)


def describe(model: Decoder, scheme: Scheme | None) -> list[str]:
    """Notes for the user: what came of it."""
    if scheme is None:
        return []
    linears = [linear for layer in model.layers for linear in layer.linears()]
    num_quantized = sum(linear.method is not UNQUANTIZED for linear in linears)
    native = any(linear.method is fp8.NATIVE_FP8 for linear in linears)
    is_stored = any(rule.format.stored for rule in scheme.rules)
    origin = "of the checkpoint" if is_stored else "quantized at load"
    effect = "FP8 tensor cores" if native else "plain torch, which saves memory and no time"
    return [f"FP8 weights {origin} in {num_quantized} linear layers, multiplied by {effect}"]
