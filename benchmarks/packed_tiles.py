"""The quickest tiles for products with packed weights, on one device in one run.

    python benchmarks/packed_tiles.py [--shapes 4096x4096 …] [--rows 1 8 32 64] [--formats …]

Per shape (outputs x inputs), format and number of tokens the three quickest: microseconds, those of
the product that bfloat16 weights get in the engine, how much faster that is, and the tile. Weights
come from memory, as in packed_products.py. Other processes compile and check all tiles first; wrong
ones are told.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from packed_products import (
    DEVICE,
    DTYPE,
    FORMATS,
    copies,
    microseconds,
    multiply,
    packed_layer,
    plain_layer,
)
from torch import Tensor

from nanovllm.checkpoint.spec import Activation
from nanovllm.worker.kernels.triton.packed_linear import PackedTile, packed_linear
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.quant.packed import Packed

GATED_SHAPES = ("24576x4096", "6144x1024")  # gates and ups, as the engine multiplies by them
SHAPES = ["4096x4096", "6144x4096", "24576x4096", "4096x12288", "6144x1024"]
MAX_ERROR = 1e-2
NUM_COMPILERS = 14
NUM_SHOWN = 3


@dataclass(frozen=True)
class Case:
    """A product to be cut into tiles."""

    outputs: int
    inputs: int
    rows: int
    gated: bool

    def vectors(self) -> Iterator[PackedTile]:
        """Tiles of one token."""
        for block_k in (1024, 2048, 4096):
            for block_n in (1, 2, 4, 8):
                for warps in (4, 8):
                    codes = block_k * block_n * (1 + self.gated) // warps
                    if block_k < 2 * self.inputs and 2**9 <= codes <= 2**12:
                        yield PackedTile(block_n, block_k, warps)

    def matrices(self) -> Iterator[PackedTile]:
        """Tiles of several tokens, whose programs fill a GPU."""
        block_m = min(max(8, 1 << (self.rows - 1).bit_length()), 64)
        for block_n, warps in ((64, 4),) if self.gated else ((64, 4), (128, 4), (128, 8)):
            num_n = -(-self.outputs // ((1 + self.gated) * block_n))
            for splits in (1, 2, 4, 8):
                is_filled = 60 <= num_n * -(-self.rows // block_m) * splits <= 800
                if is_filled and self.inputs // splits >= 512:
                    stages = 6 if block_m <= 32 else 4
                    yield PackedTile(block_n, 128, warps, splits, stages, block_m)

    @property
    def gate(self) -> Activation | None:
        return "silu" if self.gated else None

    def tiles(self) -> Iterator[PackedTile]:
        yield from self.vectors() if self.rows == 1 else self.matrices()


def error_of(out: Tensor, x: Tensor, layer: Linear, *, gated: bool) -> float:
    """Relative, in the norm."""
    assert isinstance(layer.method, Packed)
    expected = x.float() @ layer.method.weight.dequantize().T
    if gated:
        gate, up = expected.chunk(2, 1)
        expected = F.silu(gate) * up
    return float((out.float() - expected).norm() / expected.norm())


def check(case: Case, x: Tensor, layer: Linear, part: int) -> None:
    """Compiles one of NUM_COMPILERS parts of the tiles, and tells of wrong ones."""
    for turn, tile in enumerate(case.tiles()):
        if turn % NUM_COMPILERS == part:
            out = packed_linear(x, layer, gate=case.gate, tile=tile)
            error = error_of(out, x, layer, gated=case.gated)
            if not error < MAX_ERROR:
                print(f"WRONG {error:.1e}: {case} {tile}", flush=True)


def measure(name: str, case: Case, x: Tensor, layers: list[Linear], base: float) -> None:
    """Prints the quickest tiles. base: microseconds of bfloat16 weights."""
    found = []
    for tile in case.tiles():
        each = microseconds(
            lambda one, tile=tile: packed_linear(x, one, gate=case.gate, tile=tile),  # type: ignore[misc]
            layers,
        )
        found.append((each, tile))
    for each, tile in sorted(found, key=lambda pair: pair[0])[:NUM_SHOWN]:
        print(
            f"{name} {case.rows:5} {each:8.2f} {base:8.2f} {base / each:6.2f}  {tile}", flush=True
        )


@torch.inference_mode()
def sweep(shape: str, formats: list[str], rows: list[int], part: int | None) -> None:
    """All products of one shape. part: compile and check this part of the tiles alone."""
    outputs, inputs = map(int, shape.split("x"))
    values = torch.randn(outputs, inputs, device=DEVICE) * inputs**-0.5
    tokens = {count: torch.randn(count, inputs, device=DEVICE).to(DTYPE) for count in rows}
    base = {}
    if part is None:
        plain = copies(lambda: plain_layer(values))
        for count, x in tokens.items():
            base[count] = microseconds(lambda one, x=x: multiply(x, one), plain)  # type: ignore[misc]
        del plain
    for name in formats:
        kept = FORMATS[name]
        layers = [] if part is not None else copies(lambda kept=kept: packed_layer(kept, values))  # type: ignore[misc]
        for count, x in tokens.items():
            case = Case(outputs, inputs, count, shape in GATED_SHAPES)
            if part is None:
                measure(f"{shape:>12} {name:12}", case, x, layers, base[count])
            else:
                check(case, x, packed_layer(kept, values), part)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is None and DEVICE.type == "cuda":
        started = time.perf_counter()
        command = [sys.executable, *sys.argv, "--part"]
        children = [subprocess.Popen([*command, str(part)]) for part in range(NUM_COMPILERS)]
        for child in children:
            child.wait()
        print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
    for shape in arguments.shapes:
        sweep(shape, arguments.formats, arguments.rows, arguments.part)


if __name__ == "__main__":
    main()
