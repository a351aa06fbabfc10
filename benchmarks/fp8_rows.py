"""FP8 products of 8 to 64 tokens beside bf16's, as chains of layers in a CUDA graph.

    python benchmarks/fp8_rows.py

For layers as wide as Qwen3's of 0.6B, 1.7B, 4B and 8B: microseconds a layer (all but attention and
RoPE) in bf16; in FP8 by our products of a few tokens and cuBLAS's of more, whose tokens kernels of
their own quantize ("cuBLAS"); and as the engine multiplies FP8, with tokens that come quantized in
groups to `fp8_linear` and with bf16 copies of small layers. Each chain's first layer is compared
with fp32 of the dequantized weights before it is timed. A GPU with FP8 units, one minute: kernels
are compiled first, by processes of their own. It ends by itself, with a table of what is there.
"""

import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from gpu_kernels import median_time
from torch import Tensor
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime.jit import JITFunction

from nanovllm.checkpoint.quantization import WeightFormat, is_copied
from nanovllm.worker.kernels.base import Residual
from nanovllm.worker.kernels.triton import products
from nanovllm.worker.kernels.triton.launch import Gpu
from nanovllm.worker.kernels.triton.layer_kernels import TritonKernels
from nanovllm.worker.kernels.triton.linear_tuning import are_grouped, are_rows
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.quant.fp8 import E4M3, NATIVE_FP8, quantize_rows
from nanovllm.worker.warmup.triton_precompile import has_driver, leave_launches_out

NUM_COMPILERS = 14
COMPILING_S, MOST_S = 45, 100  # of compiling ahead, and of everything, whatever hangs
DEVICE, HOPPER = "cuda", Gpu((9, 0), 132)
KERNELS = TritonKernels()
EPS = 1e-6
ROWS = (8, 17, 32, 64, 128)
WAYS = ("bf16", "cuBLAS", "engine")
MAX_ERROR = {"bf16": 2e-2, "cuBLAS": 8e-2, "engine": 8e-2}  # of what a layer adds, in the mean


@dataclass(frozen=True)
class Model:
    """Sizes of a layer, and how many make a chain whose weights no cache holds."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    num_layers: int

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each product, in their order."""
        queries = self.heads * 128
        return {
            "qkv": (queries + 2 * self.kv_heads * 128, self.hidden),
            "o": (self.hidden, queries),
            "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }


MODELS = {
    "0.6B": Model(1024, 3072, 16, 8, 28),
    "1.7B": Model(2048, 6144, 16, 8, 20),
    "4B": Model(2560, 9728, 32, 8, 12),
    "8B": Model(4096, 12288, 32, 8, 8),
}
Layer = dict[str, Linear]


# ---------------------------------------------------------------- layers


def fp8_layer(model: Model, device: str) -> Layer:
    """Without copies. On the device "meta" without numbers, too."""
    layer = {}
    for name, (n, k) in model.sizes.items():
        if device == "meta":
            weight, scale = (
                torch.empty(n, k, dtype=E4M3, device=device),
                torch.empty(n, device=device),
            )
        else:
            rows = quantize_rows(torch.randn(n, k, device=device) * k**-0.5)
            weight, scale = rows.values, rows.scale[:, 0].contiguous()
        layer[name] = Linear(weight, None, {}, 0, NATIVE_FP8, scale)
    return layer


def plain_layer(layer: Layer) -> Layer:
    """The same numbers, as bfloat16 has them."""
    return {
        name: Linear(dequantized(linear).bfloat16(), None, {}, 0) for name, linear in layer.items()
    }


def engine_layer(layer: Layer, plain: Layer) -> Layer:
    """With a copy of what the engine keeps one of."""
    kept = WeightFormat("fp8")
    return {
        name: replace(linear, copy=plain[name])
        if is_copied(kept, [name], linear.weight.numel())
        else linear
        for name, linear in layer.items()
    }


def dequantized(linear: Linear) -> Tensor:
    assert linear.scale is not None
    return linear.weight.float() * linear.scale[:, None]


def chain(model: Model, layers: list[Layer], start: Tensor, norm: RMSNorm) -> Tensor:
    """Layers as the engine runs them; for heads it takes what lies first in qkv."""
    rows, queries = len(start), model.heads * 128
    residual = Residual(start.clone())
    for layer in layers:
        qkv = KERNELS.norm_linear(residual, norm, layer["qkv"])
        heads = qkv.view(-1)[: rows * queries].view(rows, queries)
        residual = KERNELS.linear_add(heads, layer["o"], residual.hidden, next_norm=norm)
        residual = KERNELS.mlp(residual, norm, layer["gate_up"], layer["down"], next_norm=norm)
    return residual.hidden


def exact(model: Model, layer: Layer, start: Tensor, norm: RMSNorm) -> Tensor:
    """One layer in fp32."""
    rows, queries = len(start), model.heads * 128
    weights = {name: dequantized(linear) for name, linear in layer.items()}

    def normed(x: Tensor) -> Tensor:
        return F.rms_norm(x, (model.hidden,), norm.weight.float(), EPS)

    residual = start.float()
    qkv = normed(residual) @ weights["qkv"].t()
    residual = residual + qkv.view(-1)[: rows * queries].view(rows, queries) @ weights["o"].t()
    gate, up = (normed(residual) @ weights["gate_up"].t()).chunk(2, 1)
    return residual + (F.silu(gate) * up) @ weights["down"].t()


def take(way: str) -> None:
    """Group tokens from now on as the engine does, or never."""
    products.are_grouped = are_grouped if way == "engine" else lambda num_tokens, weight: False
    products.are_rows = are_rows if way == "engine" else lambda num_tokens, weight: False


# ---------------------------------------------------------------- compiling ahead


def launch_chain(model: Model, way: str, rows: int) -> None:
    """Launches every kernel of a chain on tensors without memory; of two layers, as what the first
    norm reads comes from no product."""
    layer = fp8_layer(model, "meta")
    plain = plain_layer(layer)
    layer = {"bf16": plain, "cuBLAS": layer, "engine": engine_layer(layer, plain)}[way]
    start = torch.empty(rows, model.hidden, dtype=torch.bfloat16, device="meta")
    take(way)
    chain(model, [layer, layer], start, RMSNorm(start[0], EPS))


def jobs() -> Iterator[Callable[[], object]]:
    for rows, model, way in itertools.product(ROWS, MODELS.values(), WAYS):
        yield partial(launch_chain, model, way, rows)


def compile_share(part: int) -> None:
    """In a child. What it compiles lies in Triton's cache then, and what launches that."""
    leave_launches_out(HOPPER)
    run, launches, seen = JITFunction.run, has_driver(), set[str]()

    def compile_both(self: JITFunction, *arguments: object, **options: object) -> object:
        kernel = run(self, *arguments, **options)
        if launches and kernel.hash not in seen:
            seen.add(kernel.hash)
            CudaLauncher(kernel.src, kernel.metadata)
        return kernel

    JITFunction.run = compile_both
    for job in itertools.islice(jobs(), part, None, NUM_COMPILERS):
        try:
            job()
        except Exception as failure:
            print(f"{job}: {str(failure)[:200]!r}", flush=True)


def compile_all() -> None:
    """Before this process knows of a GPU, so that children may be forked."""
    torch.zeros(1, device="meta") + 1
    children = []
    for part in range(NUM_COMPILERS):
        child = os.fork()
        if child == 0:
            signal.alarm(COMPILING_S)
            try:
                compile_share(part)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


# ---------------------------------------------------------------- measuring


Table = dict[tuple[str, int], dict[str, float]]


def measure(label: str, model: Model, table: Table) -> None:
    """Rows of the table, nan where a layer's contribution is wrong."""
    fp8 = [fp8_layer(model, DEVICE) for _ in range(model.num_layers)]
    plain = [plain_layer(layer) for layer in fp8]
    engine = [engine_layer(*pair) for pair in zip(fp8, plain, strict=True)]
    norm = RMSNorm(torch.rand(model.hidden, device=DEVICE).add_(0.5).bfloat16(), EPS)
    for rows in ROWS:
        start = torch.randn(rows, model.hidden, device=DEVICE).bfloat16()
        wanted = exact(model, fp8[0], start, norm) - start.float()
        for way, layers in zip(WAYS, (plain, fp8, engine), strict=True):
            take(way)
            found = chain(model, layers[:1], start, norm).float() - start.float()
            error = float((found - wanted).norm() / wanted.norm())
            time_us = median_time(partial(chain, model, layers, start, norm), len(layers)) * 1e6
            is_right = error < MAX_ERROR[way]
            table.setdefault((label, rows), {})[way] = time_us if is_right else math.nan
            print(f"{label:5} {rows:5} {way:7} {time_us:8.2f} µs  error {error:.1e}"
                  f"{'' if is_right else '  WRONG'}", flush=True)  # fmt: skip


def print_table(table: Table) -> None:
    print("\nµs a layer, and what bf16 and cuBLAS take for the engine's time")
    print("model  rows     bf16   cuBLAS   engine  bf16/engine  cuBLAS/engine")
    for (label, rows), found in table.items():
        bf16, cublas, engine = (found.get(way, math.nan) for way in WAYS)
        print(f"{label:5} {rows:5} {bf16:8.2f} {cublas:8.2f} {engine:8.2f}"
              f" {bf16 / engine:12.2f} {cublas / engine:14.2f}", flush=True)  # fmt: skip


@torch.inference_mode()
def main() -> None:
    started = time.perf_counter()
    compile_all()
    print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
    table: Table = {}

    def give_up() -> None:
        print_table(table)
        print(f"given up after {MOST_S} s", flush=True)
        os._exit(1)

    timer = threading.Timer(MOST_S - (time.perf_counter() - started), give_up)
    timer.daemon = True
    timer.start()
    torch.manual_seed(0)
    try:
        for label, model in MODELS.items():
            measure(label, model, table)
    finally:
        print_table(table)
        print(f"{time.perf_counter() - started:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
