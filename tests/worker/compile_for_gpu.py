"""Compile Triton kernels to machine code of a GPU that need not be there.

`python tests/worker/compile_for_gpu.py` prints a JSON object: case → registers, bytes spilled. A
program of its own, since Triton decides when it is imported whether to compile or to interpret.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanovllm.worker.kernels import triton_sampler

HOPPER = GPUTarget("cuda", 90, 32)
VOCAB_SIZE = 151_936


def usage(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], *, num_warps: int
) -> dict[str, int]:
    """What ptxas says of it: registers per thread, and bytes spilled. Raises if it does not
    compile. types: of the arguments, by name; the others are `constants`."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    # Pointers come from torch's allocator: 16-byte aligned, as a launch would have found out.
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (index,): aligned
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, dict(constants), attributes)
    compiled = triton.compile(source, target=HOPPER, options={"num_warps": num_warps})
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.ptx")
        path.write_text(compiled.asm["ptx"])
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(path), "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", told)
    spills = re.findall(r"(\d+) bytes spill", told)
    return {"registers": int(registers), "spilled": sum(map(int, spills))}


def sampler() -> dict[str, dict[str, int]]:
    """Both kernels as `sample_tokens` launches them, over a vocabulary of usual size."""
    num_segments = triton.cdiv(VOCAB_SIZE, triton_sampler.SEGMENT)
    segment = {"SEGMENT": triton_sampler.SEGMENT, "PDL": True}
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
            triton_sampler._segments_kernel,
            {**types, "logits": "*" + dtype},
            {**segment, "NUM": triton_sampler.SEGMENTS_PER_PROGRAM},
            num_warps=4,
        )
        for truncates, num_warps in ((False, 8), (True, 16)):
            constants = {
                "BLOCK": triton.next_power_of_2(num_segments),
                "LOOK": triton_sampler.SEGMENTS_PER_LOOK,
                "TRUNCATE": truncates,
            }
            found[f"choose {dtype} {truncates}"] = usage(
                triton_sampler._choose_kernel,
                {**types, "logits": "*" + dtype},
                {**segment, **constants},
                num_warps=num_warps,
            )
    return found


if __name__ == "__main__":
    print(json.dumps(sampler()))
