"""Checks and times the fused experts of a layer on the GPU at hand, without a model around them.

    python benchmarks/experts.py [--model qwen3-30b-a3b,gpt-oss-20b] [--kind plain,fp8,mxfp4]
        [--tokens 1,8,64,512,4096] [--sweep]

Every case is compared with plain torch in fp32 (relative error of the residual's increment), then
timed as a CUDA graph over calls whose routers pick differently (median of replays). The floor is
the weights of the experts that were hit over what a large copy reaches here, or the operations
over 790 TFLOP/s, whichever is more. --sweep tries other tiles where there are several tokens.
`--model tiny` is for a machine without a GPU: checked in Triton's interpreter, and not timed.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product

import torch
from torch import Tensor

from nanovllm.checkpoint.spec import ClampedSwiGLU, MoE, Router
from nanovllm.worker.kernels.torch.layer_kernels import TorchKernels
from nanovllm.worker.kernels.triton.expert_tuning import ExpertTile, tiles_for
from nanovllm.worker.kernels.triton.experts import fused_experts
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.layers.moe import Experts, choose
from nanovllm.worker.quant import mxfp4
from nanovllm.worker.quant.fp8 import E4M3

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # what the interpreter can do
RATE = 790e12
NUM_CALLS = 8  # in a graph, each with logits of its own
MOST_ERROR = 0.02


@dataclass(frozen=True)
class Shape:
    hidden: int
    spec: MoE


RENORMALIZES = Router(renormalizes=True)
SHAPES = {
    "qwen3-30b-a3b": Shape(
        2048, MoE(num_experts=128, top_k=8, intermediate_size=768, router=RENORMALIZES)
    ),
    "gpt-oss-20b": Shape(
        2880,
        MoE(
            num_experts=32,
            top_k=4,
            intermediate_size=2880,
            router=RENORMALIZES,
            bias=True,
            takes_turns=True,
            clamped=ClampedSwiGLU(1.702, 7.0),
        ),
    ),
    "tiny": Shape(64, MoE(num_experts=8, top_k=2, intermediate_size=96, router=RENORMALIZES)),
}


def make_stack(num_rows: int, num_inputs: int, kind: str, *, bias: bool) -> Linear:
    """Random weights of all experts in one form."""
    added = torch.randn(num_rows, device=DEVICE).to(DTYPE) if bias else None
    weight = torch.empty(num_rows, num_inputs, device=DEVICE, dtype=DTYPE)
    for rows in weight.split(2**16):
        rows.normal_(0, num_inputs**-0.5)
    linear = Linear(weight, added, {}, 0)
    if kind == "fp8":
        linear.scale = torch.full((num_rows,), 1 / 448, device=DEVICE)
        linear.weight = (weight * 448).to(E4M3)
    if kind == "mxfp4":
        parts = [mxfp4.round_to_nearest(rows) for rows in weight.split(2**14)]
        linear.weight, linear.scale = (torch.cat(one) for one in zip(*parts, strict=True))
    return linear


def dequantized(linear: Linear, rows: slice) -> Linear:
    """Some rows in fp32, as an oracle takes them."""
    weight, scale = linear.weight[rows], linear.scale
    if scale is not None and scale.dtype == torch.uint8:
        wide = mxfp4.dequantize(weight, scale[rows], torch.float32)
    else:
        wide = weight.float() if scale is None else weight.float() * scale[rows, None]
    return Linear(wide, None if linear.bias is None else linear.bias[rows].float(), {}, 0)


class OneByOne(list[tuple[Linear, Linear]]):
    """Experts in fp32, each made when it is asked for."""

    def __init__(self, stacks: tuple[Linear, Linear], count: int) -> None:
        super().__init__()
        self._stacks, self._count = stacks, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Linear, Linear]:  # type: ignore[override]
        first, second = self._stacks
        sizes = len(first.weight) // self._count, len(second.weight) // self._count
        rows = [slice(index * size, (index + 1) * size) for size in sizes]
        return dequantized(first, rows[0]), dequantized(second, rows[1])


def time_graph(run: Callable[[], None]) -> float:
    """Seconds of one call of `run`, which must have run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(10)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    spans = sorted(a.elapsed_time(b) for a, b in pairwise(events))
    return spans[len(spans) // 2] * 1e-3


def copy_bandwidth() -> float:
    """Bytes per second, reads and writes counted, of a copy of a gigabyte."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / time_graph(lambda: target.copy_(source))


def other_tiles(num_tokens: int, spec: MoE) -> Iterator[tuple[ExpertTile, ExpertTile]]:
    """What might be faster, of the same number of pairs."""
    first, second = tiles_for(num_tokens * spec.top_k / spec.num_experts)  # as of bfloat16
    heights = {first.block_m, max(16, first.block_m // 2), min(128, first.block_m * 2)}
    cuts = list(product(sorted(heights), (1.0, 2.0), (64, 128), (4,)))
    if first.block_m == 16:  # reading weights is all there is: how many bytes are on their way?
        cuts = list(product((16,), (0.5, 1.0, 2.0), (64, 128, 256), (3, 6)))
    for block_m, width, block_k, stages in cuts:
        warps = 8 if block_m == 128 or width == 2.0 else 4
        if block_m == 128 and (block_k == 128 or width == 2.0):
            stages = 3
        one, other = (
            ExpertTile(block_m, int(tile.block_n * width), block_k, warps, stages)
            for tile in (first, second)
        )
        stage_bytes = 2 * block_k * (block_m + other.block_n)
        if stages * stage_bytes <= 220 * 1024 and (one, other) != (first, second):
            yield one, other


def measure(
    name: str, kind: str, stacks: tuple[Linear, Linear], num_tokens: int, bandwidth: float,
    *, sweeps: bool,
) -> None:  # fmt: skip
    shape = SHAPES[name]
    spec = shape.spec
    experts = Experts(spec, OneByOne(stacks, spec.num_experts), stacks)
    hidden = torch.randn(num_tokens, shape.hidden, device=DEVICE, dtype=DTYPE)
    logits = [
        torch.randn(num_tokens, spec.num_experts, device=DEVICE, dtype=DTYPE)
        for _ in range(NUM_CALLS)
    ]
    few = slice(0, 64)
    expected = TorchKernels().experts(hidden[few].float(), logits[0][few].float(), experts)
    hit = [choose(one, spec.router, spec.top_k, None)[1].unique().numel() for one in logits]
    num_bytes = sum(bytes_of(stack) for stack in stacks) / spec.num_experts
    num_bytes *= sum(hit) / NUM_CALLS
    operations = 6 * num_tokens * spec.top_k * shape.hidden * spec.intermediate_size
    floor = max(num_bytes / bandwidth, operations / RATE)
    tilings: list[tuple[ExpertTile, ExpertTile] | None] = [None]
    if sweeps and num_tokens > 1:
        tilings += other_tiles(num_tokens, spec)
    for tiles in tilings:
        label = "chosen" if tiles is None else "; ".join(map(str, tiles))
        found = fused_experts(hidden, logits[0], experts, tiles=tiles)[few]
        error = float((found.float() - expected).norm() / expected.norm())
        verdict = "ok" if error < MOST_ERROR else "WRONG"
        seconds = 0.0
        if DEVICE.type == "cuda":
            seconds = time_graph(partial(run_all, hidden, logits, experts, tiles)) / NUM_CALLS
        print(
            f"{name:14s} {kind:6s} {num_tokens:5d} tokens {seconds * 1e6:9.1f} us "
            f"floor {floor / seconds if seconds else 0:5.2f} error {error:.1e} {verdict}  {label}",
            flush=True,
        )


def bytes_of(linear: Linear) -> int:
    return linear.weight.nbytes + (0 if linear.scale is None else linear.scale.nbytes)


def run_all(
    hidden: Tensor,
    logits: list[Tensor],
    experts: Experts,
    tiles: tuple[ExpertTile, ExpertTile] | None,
) -> None:
    for one in logits:
        fused_experts(hidden, one, experts, tiles=tiles)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="qwen3-30b-a3b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--kind", default="plain", help="of plain, fp8, mxfp4")
    parser.add_argument("--tokens", default="1,8,64,512,4096")
    parser.add_argument("--sweep", action="store_true", help="other tiles, too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth() if DEVICE.type == "cuda" else 1.0
    print(f"{DEVICE}: {bandwidth / 1e12:.2f} TB/s")
    for name in arguments.model.split(","):
        shape = SHAPES[name]
        spec, hidden = shape.spec, shape.hidden
        for kind in arguments.kind.split(","):
            stacks = (
                make_stack(
                    spec.num_experts * 2 * spec.intermediate_size, hidden, kind, bias=spec.bias
                ),
                make_stack(spec.num_experts * hidden, spec.intermediate_size, kind, bias=spec.bias),
            )
            for num_tokens in map(int, arguments.tokens.split(",")):
                measure(name, kind, stacks, num_tokens, bandwidth, sweeps=arguments.sweep)


if __name__ == "__main__":
    main()
