"""Compile Triton kernels to machine code of a GPU that need not be there.

`python tests/worker/warmup/compile_for_gpu.py sampler` (or `gated`) prints a JSON object:
case → what it uses. A program of its own, since Triton decides when it is imported whether to
compile or to interpret.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanovllm.worker.kernels.triton import fused_sampler, gated_linear

HOPPER = GPUTarget("cuda", 90, 32)
VOCAB_SIZE = 151_936


def usage(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], **options: int
) -> dict[str, int]:
    """Registers per thread and bytes spilled, as ptxas says, bytes of shared memory, and whether
    products wait for each other. Raises if it does not compile. types: of the arguments, by name;
    the others are `constants`."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    # Pointers come from torch's allocator: 16-byte aligned, as a launch would have found out.
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (index,): aligned
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, dict(constants), attributes)
    compiled = triton.compile(source, target=HOPPER, options=options)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.ptx")
        path.write_text(compiled.asm["ptx"])
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(path), "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", told)
    spills = re.findall(r"(\d+) bytes spill", told)
    return {
        "registers": int(registers),
        "spilled": sum(map(int, spills)),
        "shared": compiled.metadata.shared,
        "serialized": int("wgmma" in told),
    }


def sampler() -> dict[str, dict[str, int]]:
    """Both kernels as `sample_tokens` launches them, over a vocabulary of usual size."""
    num_segments = triton.cdiv(VOCAB_SIZE, fused_sampler.SEGMENT)
    segment = {"SEGMENT": fused_sampler.SEGMENT, "PDL": True}
    floats = dict.fromkeys(
        ("temperature", "top_p", "min_p", "maxima", "masses", "chosen_masses"), "*fp32"
    )
    longs = dict.fromkeys(("seeds", "token_ids"), "*i64")
    ints = dict.fromkeys(("rows", "positions", "top_k", "chosen", "known"), "*i32")
    counts = dict.fromkeys(
        (
            "logits_stride",
            "column_stride",
            "seed_stride",
            "known_stride",
            "vocab_size",
            "num_segments",
        ),
        "i32",
    )
    types = {**floats, **longs, **ints, **counts}
    found = {}
    for dtype in ("fp32", "bf16"):
        found[f"segments {dtype}"] = usage(
            fused_sampler._segments_kernel,
            {**types, "logits": "*" + dtype},
            {**segment, "NUM": fused_sampler.SEGMENTS_PER_PROGRAM},
            num_warps=4,
        )
        for truncates, num_warps in ((False, 8), (True, 16)):
            constants = {
                "BLOCK": triton.next_power_of_2(num_segments),
                "LOOK": fused_sampler.SEGMENTS_PER_LOOK,
                "TRUNCATE": truncates,
            }
            found[f"choose {dtype} {truncates}"] = usage(
                fused_sampler._choose_kernel,
                {**types, "logits": "*" + dtype},
                {**segment, **constants},
                num_warps=num_warps,
            )
    return found


def gated() -> dict[str, dict[str, int]]:
    """As `gated_linear` launches it for Qwen3-0.6B."""
    tile = gated_linear.CHOSEN
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    boxes = {
        "x_desc": [tile.block_m, tile.block_k],
        "weight_desc": [2, tile.block_n, tile.block_k],
        "out_desc": [tile.block_m, tile.block_n],
    }
    return {
        dtype: usage(
            gated_linear._gated_kernel,
            {name: f"tensordesc<{dtype}{box}>" for name, box in boxes.items()}
            | {"num_tokens": "i32", "num_outputs": "i32"},
            blocks | {"K": 1024, "GROUP": 8, "PDL": True},
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        for dtype in ("bf16", "fp16")
    }


if __name__ == "__main__":
    print(json.dumps({"sampler": sampler, "gated": gated}[sys.argv[1]]()))
