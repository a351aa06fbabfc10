"""Which method keeps the weights of a linear layer: a file here, and a line in a table.

What is quantized, and in which format, `checkpoint.quantization` says.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch

from nanovllm.checkpoint.quantization import Layout as LayoutName
from nanovllm.checkpoint.quantization import Method, Scheme, WeightFormat
from nanovllm.worker.layers.linear import UNQUANTIZED, Linear, LinearMethod
from nanovllm.worker.quant import fp8
from nanovllm.worker.quant.awq import Awq
from nanovllm.worker.quant.compressed_tensors import Fp8Weights, PackQuantized
from nanovllm.worker.quant.gguf_blocks import Gguf
from nanovllm.worker.quant.gptq import Gptq
from nanovllm.worker.quant.int8 import Int8
from nanovllm.worker.quant.mxfp4 import Mxfp4
from nanovllm.worker.quant.packed import Layout, Packed
from nanovllm.worker.quant.rounding import Rounded, fitting

LAYOUTS: Mapping[LayoutName, Layout] = {
    "compressed-tensors": PackQuantized(),
    "awq": Awq(),
    "gptq": Gptq(offset=1),
    "gptq_v2": Gptq(offset=0),
    "gguf": Gguf(),
}
FLOAT_LAYOUTS: Mapping[LayoutName, Layout] = {
    "compressed-tensors": Fp8Weights("weight_scale"),
    "fp8": Fp8Weights("weight_scale_inv"),
}


def _packed(kept: WeightFormat, linear: Linear, device: torch.device) -> LinearMethod:
    dtype = linear.weight.dtype
    if kept.layout is None:
        return Packed(fitting(kept, linear.inputs.size), Rounded(), dtype)
    if linear.inputs.start % kept.unit or linear.inputs.size % kept.unit:
        return UNQUANTIZED  # a rank's share, which begins within a block, comes dequantized
    layouts = FLOAT_LAYOUTS if kept.is_float else LAYOUTS
    return Packed(kept, layouts[kept.layout], dtype)


def _int8(kept: WeightFormat, linear: Linear, device: torch.device) -> LinearMethod:
    return Int8.of(kept)


def _mxfp4(kept: WeightFormat, linear: Linear, device: torch.device) -> LinearMethod:
    if linear.inputs.start % kept.unit or linear.inputs.size % kept.unit:
        return UNQUANTIZED  # as of `_packed`
    return Mxfp4(kept)


METHODS: dict[Method, Callable[[WeightFormat, Linear, torch.device], LinearMethod]] = {
    "fp8": fp8.method_for,
    "int8": _int8,
    "mxfp4": _mxfp4,
    "packed": _packed,
}


def method_for(kept: WeightFormat | None, linear: Linear, device: torch.device) -> LinearMethod:
    """For a layer that has no memory yet, and how its weights are to be kept; None: as they are."""
    return UNQUANTIZED if kept is None else METHODS[kept.method](kept, linear, device)


def describe(
    linears: Iterable[Linear], scheme: Scheme | None, *, has_kernels: bool = False
) -> list[str]:
    """Notes for the user: what came of it. has_kernels: there are some that read packed weights."""
    if scheme is None:
        return []
    origin = "of the checkpoint" if scheme.is_stored else "quantized at load"
    counts = Counter(
        what for linear in linears if (what := _what(linear.method, has_kernels)) is not None
    )
    return [
        f"{kept} {origin} in {count} linear layers, multiplied by {product}"
        for (kept, product), count in counts.items()
    ]


def _what(method: LinearMethod, has_kernels: bool) -> tuple[str, str] | None:
    """What weights are kept as, and who multiplies by them; None: they are not quantized."""
    plain = "plain torch, which saves memory and no time"
    match method:
        case fp8.NativeFp8():
            return "FP8 weights", "FP8 tensor cores"
        case fp8.Fp8():
            return "FP8 weights", plain
        case Packed():
            return str(method.kept), "kernels that read them packed" if has_kernels else plain
        case Int8():
            return "INT8 weights", plain
    return None
