"""Products with packed weights beside bfloat16's, on one device in one run.

    python benchmarks/packed_products.py [--shapes 4096x4096 …] [--rows 1 8 64 512] [--formats …]

Per shape (outputs x inputs), format and number of tokens: the error to float32 of what the weights
mean, microseconds, and how much faster that is than the product that bfloat16 weights get in the
engine. Every call of a graph has weights of its own, so that none comes from the L2 cache. From 512
tokens on the same by unpacking all weights first ("unpacked"). Without a GPU, under
TRITON_INTERPRET=1 and with small shapes, it shows that all of it runs.
"""

import argparse
import math
import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nanovllm.checkpoint.quantization import WeightFormat
from nanovllm.worker.kernels.triton.packed_linear import packed_linear, unpacked
from nanovllm.worker.kernels.triton.products import products_of
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.quant.packed import Packed
from nanovllm.worker.quant.rounding import Rounded

FORMATS = {
    "int4 g128": WeightFormat("packed", "group", bits=4, group=128, has_zeros=True),
    "int4 g32": WeightFormat("packed", "group", bits=4, group=32, has_zeros=True),
    "int8 g128": WeightFormat("packed", "group", bits=8, group=128),
    "fp8 blocks": WeightFormat("packed", "block", group=128, is_float=True),
}
SHAPES = ["4096x4096", "6144x1024", "1024x3072"]  # and Qwen3-0.6B's gate and up, and down
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CACHE_BYTES = 2**28 if DEVICE.type == "cuda" else 1  # several times what any GPU's L2 holds
MIN_UNPACKED = 512
NUM_REPLAYS = 20


def packed_layer(kept: WeightFormat, values: Tensor) -> Linear:
    """Of rounded values [outputs, inputs]."""
    outputs, inputs = values.shape
    linear = Linear.empty(
        inputs,
        {"o": outputs},
        bias=False,
        shard_axis=1,
        dtype=DTYPE,
        device=torch.device("meta"),
    )
    linear.method = Packed(kept, Rounded(), DTYPE)
    linear.method.create(linear, DEVICE)
    for slot in linear.slots(None):
        slot.write(values)
    return linear


def plain_layer(values: Tensor) -> Linear:
    return Linear(values.to(DTYPE), None, {}, 1)


def copies(make: Callable[[], Linear]) -> list[Linear]:
    """So many that together they do not fit into the cache."""
    first = make()
    num_bytes = sum(tensor.nbytes for tensor in first.method.tensors(first))
    return [first, *(make() for _ in range(math.ceil(CACHE_BYTES / num_bytes) - 1))]


def microseconds(call: Callable[[Linear], object], layers: list[Linear]) -> float:
    """Of a call, the median over replays of a graph of one for each layer."""
    call(layers[0])  # compiles
    if DEVICE.type != "cuda":
        started = time.perf_counter()
        call(layers[0])
        return (time.perf_counter() - started) * 1e6
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            call(layer)
    graph.replay()
    found = []
    for _ in range(NUM_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3 / len(layers))
    return sorted(found)[NUM_REPLAYS // 2]


def multiply(x: Tensor, layer: Linear) -> Tensor:
    """As the engine would."""
    return products_of(layer).multiply(x, layer)


def multiply_unpacked(x: Tensor, layer: Linear) -> Tensor:
    assert isinstance(layer.method, Packed)
    return F.linear(x, unpacked(layer.method.weight, x.dtype))


def error_of(out: Tensor, x: Tensor, layer: Linear) -> float:
    """Relative, in the norm."""
    assert isinstance(layer.method, Packed)
    expected = x.float() @ layer.method.weight.dequantize().T
    return float((out.float() - expected).norm() / expected.norm())


@torch.inference_mode()
def compare(shape: str, formats: list[str], rows: list[int]) -> None:
    """Prints the lines of one shape."""
    outputs, inputs = map(int, shape.split("x"))
    values = torch.randn(outputs, inputs, device=DEVICE) * inputs**-0.5
    tokens = {count: torch.randn(count, inputs, device=DEVICE).to(DTYPE) for count in rows}
    plain = copies(lambda: plain_layer(values))
    base = {n: microseconds(lambda one, x=x: multiply(x, one), plain) for n, x in tokens.items()}  # type: ignore[misc]
    del plain
    for name in formats:
        layers = copies(lambda kept=FORMATS[name]: packed_layer(kept, values))  # type: ignore[misc]
        for count, x in tokens.items():
            ways = {"": packed_linear}
            if count >= MIN_UNPACKED:
                ways[" unpacked"] = multiply_unpacked
            for way, product in ways.items():
                error = error_of(product(x, layers[0]), x, layers[0])
                each = microseconds(lambda one, x=x, product=product: product(x, one), layers)  # type: ignore[misc]
                print(
                    f"{shape:>12} {name + way:20} {count:5} {error:9.1e} {each:9.2f} "
                    f"{base[count]:9.2f} {base[count] / each:7.2f}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    arguments = parser.parse_args()
    if DEVICE.type != "cuda" and "TRITON_INTERPRET" not in os.environ:
        raise SystemExit("no GPU is found: set TRITON_INTERPRET=1 to see that it runs")
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "interpreter"
    print(f"{name}, torch {torch.__version__}")
    print(f"{'shape':>12} {'weights':20} {'rows':>5} {'error':>9} {'µs':>9} {'bf16 µs':>9} faster")
    for shape in arguments.shapes:
        compare(shape, arguments.formats, arguments.rows)


if __name__ == "__main__":
    main()
