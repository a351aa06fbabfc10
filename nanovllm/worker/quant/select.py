"""Which method keeps the weights of a linear layer: a file here, and a line in `METHODS`.

What is quantized, and in which format, `checkpoint.quantization` says.
"""

from collections.abc import Callable, Iterable

import torch

from nanovllm.checkpoint.quantization import Scheme, WeightFormat
from nanovllm.config import Quantization
from nanovllm.worker.layers.linear import UNQUANTIZED, Linear, LinearMethod
from nanovllm.worker.quant import fp8

METHODS: dict[Quantization, Callable[[WeightFormat, Linear, torch.device], LinearMethod]] = {
    "fp8": fp8.method_for,
}


def method_for(kept: WeightFormat | None, linear: Linear, device: torch.device) -> LinearMethod:
    """For a layer that has no memory yet, and how its weights are to be kept; None: as they are."""
    return UNQUANTIZED if kept is None else METHODS[kept.method](kept, linear, device)


def describe(linears: Iterable[Linear], scheme: Scheme | None) -> list[str]:
    """Notes for the user: what came of it."""
    if scheme is None:
        return []
    methods = [linear.method for linear in linears]
    num_quantized = sum(method.kind == fp8.KIND for method in methods)
    native = any(isinstance(method, fp8.NativeFp8) for method in methods)
    is_stored = any(rule.format.stored for rule in scheme.rules)
    origin = "of the checkpoint" if is_stored else "quantized at load"
    effect = "FP8 tensor cores" if native else "plain torch, which saves memory and no time"
    return [f"FP8 weights {origin} in {num_quantized} linear layers, multiplied by {effect}"]
