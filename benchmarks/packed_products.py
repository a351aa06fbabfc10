"""Products with packed weights beside bfloat16's, on one device in one run.

    python benchmarks/packed_products.py [--shapes 4096x4096 …] [--rows 1 8 64 512] [--formats …]

Per shape (outputs x inputs), format and number of tokens: the error to float32 of what the weights
mean, microseconds, and how much faster that is than the product that bfloat16 weights get in the
engine. Every call of a graph has weights of its own, so that none comes from the L2 cache. From 512
tokens on the same by unpacking all weights first ("unpacked"). Without a GPU, under
TRITON_INTERPRET=1 and with small shapes, it shows that all of it runs.

With --sweep: the quickest tiles of each shape, format and number of tokens instead; other processes
compile and check them all first.
"""

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nanovllm.checkpoint.quantization import WeightFormat
from nanovllm.worker.kernels.triton.packed_linear import PackedTile, packed_linear, unpacked
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
GATED_SHAPES = ("24576x4096", "6144x1024")  # gates and ups, as the engine multiplies by them
MAX_ERROR = 1e-2
NUM_COMPILERS = 14


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


def candidates(outputs: int, inputs: int, rows: int, *, gated: bool) -> Iterator[PackedTile]:
    """Tiles that might be the quickest."""
    outputs = outputs // 2 if gated else outputs
    if rows == 1:
        for block_k in (1024, 2048, 4096):
            if block_k < 2 * inputs:
                for block_n in (1, 2, 4, 8):
                    for warps in (4, 8):
                        if 2**9 <= block_k * block_n * (1 + gated) // warps <= 2**12:
                            yield PackedTile(block_n, block_k, warps)
    block_m = min(max(8, 1 << (rows - 1).bit_length()), 128)
    block_k = 128
    for block_m in {block_m, min(block_m, 64)}:
        for block_n, warps in ((64, 4), (128, 4), (128, 8)):
            if gated and block_n * block_m > 64 * 64:
                continue
            num_programs = -(-outputs // block_n) * -(-rows // block_m)
            for splits in (1, 2, 4, 8):
                if not 60 <= num_programs * splits <= 800 or inputs // splits < 4 * block_k:
                    continue
                for stages in (6,) if block_m <= 32 else (4,):
                    if stages * (block_n * 64 * (1 + gated) + block_m * 256) < 220000:
                        yield PackedTile(block_n, block_k, warps, splits, stages, block_m)


def sweep(shapes: list[str], formats: list[str], rows: list[int], part: int | None) -> None:
    """Prints the quickest tiles. part: compile and check this one of NUM_COMPILERS alone."""
    turn = 0
    for shape in shapes:
        outputs, inputs = map(int, shape.split("x"))
        gated = shape in GATED_SHAPES
        values = torch.randn(outputs, inputs, device=DEVICE) * inputs**-0.5
        tokens = {count: torch.randn(count, inputs, device=DEVICE).to(DTYPE) for count in rows}
        base = {}
        if part is None:
            plain = copies(lambda values=values: plain_layer(values))  # type: ignore[misc]
            for count, x in tokens.items():
                base[count] = microseconds(lambda one, x=x: multiply(x, one), plain)  # type: ignore[misc]
            del plain
        for name in formats:
            make = lambda kept=FORMATS[name], values=values: packed_layer(kept, values)  # type: ignore[misc]  # noqa: E731
            layers = copies(make) if part is None else [make()]
            for count, x in tokens.items():
                found = []
                for tile in candidates(outputs, inputs, count, gated=gated):
                    turn += 1
                    if part is not None and turn % NUM_COMPILERS != part:
                        continue

                    def call(one: Linear, x: Tensor = x, tile: PackedTile = tile) -> Tensor:
                        return packed_linear(x, one, gated=gated, tile=tile)  # noqa: B023

                    try:
                        if part is None:
                            found.append((microseconds(call, layers), tile))
                        else:
                            check(call(layers[0]), x, layers[0], f"{shape} {name} {tile}", gated)
                    except Exception as error:  # noqa: BLE001
                        print(f"{shape} {name} {tile}: {str(error)[:120]}", flush=True)
                if part is None:
                    print_quickest(f"{shape:>12} {name:12} {count:5}", found, base[count])


def check(out: Tensor, x: Tensor, layer: Linear, name: str, gated: bool) -> None:
    assert isinstance(layer.method, Packed)
    expected = x.float() @ layer.method.weight.dequantize().T
    if gated:
        gate, up = expected.chunk(2, 1)
        expected = F.silu(gate) * up
    error = float((out.float() - expected).norm() / expected.norm())
    if not error < MAX_ERROR:
        print(f"WRONG {error:.1e}: {len(x)} tokens, {name}", flush=True)


def print_quickest(name: str, found: list[tuple[float, PackedTile]], base: float) -> None:
    """The three quickest, and the quickest of the other kind."""
    found.sort(key=lambda pair: pair[0])
    shown = found[:3] + [pair for pair in found[3:] if pair[1].block_m == 1][:1]
    if all(pair[1].block_m == 1 for pair in shown):
        shown += [pair for pair in found if pair[1].block_m > 1][:1]
    for each, tile in shown:
        cut = (
            f"n{tile.block_n} k{tile.block_k} w{tile.warps} x{tile.splits} s{tile.stages} "
            f"m{tile.block_m}"
        )
        print(f"{name} {each:8.2f} {base:8.2f} {base / each:6.2f}  {cut}", flush=True)


def sweep_all(shapes: list[str], formats: list[str], rows: list[int]) -> None:
    started = time.perf_counter()
    if DEVICE.type == "cuda":
        children = [
            subprocess.Popen([sys.executable, *sys.argv, "--part", str(part)])
            for part in range(NUM_COMPILERS)
        ]
        for child in children:
            child.wait()
    print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
    sweep(shapes, formats, rows, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--sweep", action="store_true", help="try all tiles")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if DEVICE.type != "cuda" and "TRITON_INTERPRET" not in os.environ:
        raise SystemExit("no GPU is found: set TRITON_INTERPRET=1 to see that it runs")
    if arguments.sweep:
        which = arguments.shapes, arguments.formats, arguments.rows
        with torch.inference_mode():
            sweep_all(*which) if arguments.part is None else sweep(*which, arguments.part)
        return
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "interpreter"
    print(f"{name}, torch {torch.__version__}")
    print(f"{'shape':>12} {'weights':20} {'rows':>5} {'error':>9} {'µs':>9} {'bf16 µs':>9} faster")
    for shape in arguments.shapes:
        compare(shape, arguments.formats, arguments.rows)


if __name__ == "__main__":
    main()
