"""Compile Triton kernels to machine code of a GPU that need not be there.

`python tests/worker/warmup/compile_for_gpu.py sampler` (or another of `CASES`) prints a JSON
object: case → what it uses. A program of its own, since Triton decides when it is imported whether
to compile or to interpret.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from nanovllm.checkpoint.spec import Activation
from nanovllm.worker.attention.triton import attention_tuning, long_kernel, small_step_kernel
from nanovllm.worker.attention.triton.attention_tuning import Long
from nanovllm.worker.kernels.triton import (
    edit_logits,
    fp8_linear,
    fused_sampler,
    gated_linear,
    linear_tuning,
    token_logprobs,
)

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
    source_type = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_type(kernel, signature, dict(constants), attributes)
    compiled = triton.compile(source, target=HOPPER, options=options)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.ptx")
        path.write_text(compiled.asm["ptx"])
        # Not to /dev/null: ptxas removes its output if it fails, and root may remove that one too.
        output = path.with_suffix(".cubin")
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(path), "-o", str(output)]
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
    ints = dict.fromkeys(("rows", "positions", "top_k", "chosen", "known", "lines"), "*i32")
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
            fused_sampler.segments_kernel,
            {**types, "logits": "*" + dtype},
            {**segment, "NUM": fused_sampler.SEGMENTS_PER_PROGRAM},
            num_warps=4,
        )
        constants = {
            "BLOCK": triton.next_power_of_2(num_segments),
            "LOOK": fused_sampler.SEGMENTS_PER_LOOK,
        }
        found[f"choose {dtype}"] = usage(
            fused_sampler._choose_kernel,
            {**types, "logits": "*" + dtype},
            {**segment, **constants},
            num_warps=16,
        )
    return found


def asking() -> dict[str, dict[str, int]]:
    """What the entries of a step launch that ask for something, all at once."""
    words = dict.fromkeys(("words", "left", "counts", "num_prompt_tokens"), "*i32")
    words |= dict.fromkeys(("known", "larger", "packed"), "*i32")
    names = ("edited", "repetition", "presence", "frequency", "temperature", "maxima", "masses")
    floats = dict.fromkeys((*names, "sums"), "*fp32")
    longs = {"token_ids": "*i64", "candidates": "*i64"}
    counts = dict.fromkeys(
        (
            *("size", "stride", "column_stride", "known_stride", "mask_stride", "vocab_size"),
            *("num_segments", "num_top", "num_pieces"),
        ),
        "i32",
    )
    types = {**words, **floats, **longs, **counts}
    num_pieces = triton.cdiv(VOCAB_SIZE, token_logprobs.PIECE)
    segments = {"SEGMENT": fused_sampler.SEGMENT, "NUM": edit_logits.SEGMENTS}
    joining = {"NUM_FIXED": 3, "PIECES": triton.next_power_of_2(num_pieces)}
    launches: dict[str, tuple[Any, dict[str, Any], int]] = {
        "allow": (edit_logits._allow_kernel, {}, 8),
        "single ids": (edit_logits._single_ids_kernel, {}, 4),
        "left": (edit_logits._left_kernel, {}, 8),
        "finish": (edit_logits._finish_kernel, segments | {"PDL": True}, 8),
        "pieces": (token_logprobs._pieces_kernel, {"PIECE": token_logprobs.PIECE}, 4),
        "join": (token_logprobs._join_kernel, joining, 4),
    }
    found = {}
    for name, (kernel, constants, num_warps) in launches.items():
        typed = {"TYPE": tl.bfloat16} if "TYPE" in kernel.arg_names else {}
        found[name] = usage(kernel, types, constants | typed, num_warps=num_warps)
    for name in ("pieces", "join"):  # of prompts
        kernel, constants, num_warps = launches[name]
        own = {key: kind for key, kind in types.items() if key != "words"} | {"logits": "*bf16"}
        found[f"{name} of prompts"] = usage(kernel, own, constants, num_warps=num_warps)
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
        f"{dtype} {activation}": usage(
            gated_linear._gated_kernel,
            {name: f"tensordesc<{dtype}{box}>" for name, box in boxes.items()}
            | {"num_tokens": "i32", "num_outputs": "i32"},
            blocks | {"K": 1024, "GROUP": 8, "ACTIVATION": activation, "PDL": True},
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        for dtype in ("bf16", "fp16")
        for activation in get_args(Activation)
    }


def grouped() -> dict[str, dict[str, int]]:
    """As `fp8_linear` launches it for the layers of Qwen3-8B."""
    pointers = dict.fromkeys(("x_scale", "channel_scale", "squares", "next_squares"), "*fp32")
    pointers |= dict.fromkeys(("group_scale", "partial"), "*fp32")
    pointers |= {"weight": "*fp8e4nv", "weighed": "*fp8e4nv", "arrivals": "*i32"}
    numbers = {"num_tokens": "i32", "num_outputs": "i32", "eps": "fp32"}
    surroundings: dict[str, dict[str, str]] = {
        "qkv": {"out": "*bf16"},
        "down": {"out": "*bf16", "residual": "*bf16", "next_weight": "*bf16"},
        "gate_up": {"out": "*fp8e4nv"},
    }
    sizes = {"qkv": (6144, 4096), "down": (4096, 12288), "gate_up": (12288, 4096)}
    unused = {"qkv": ("weighed", "group_scale", "next_squares"), "down": ("squares",)}
    unused["gate_up"] = ("weighed", "next_squares")
    found = {}
    for grouped, name in itertools.product((True, False), sizes):
        (num_outputs, num_inputs), gated = sizes[name], name == "gate_up"
        if grouped:
            tile = linear_tuning.fp8_group_tile_for(num_outputs, num_inputs, gated=gated)
        else:
            tile = linear_tuning.fp8_row_tile_for(num_outputs, num_inputs, gated=gated)
        block_m = tile.block_m or fp8_linear.BLOCK_M
        splits = -(-num_inputs // (tile.block_k * tile.num_tiles))
        boxes = {"x_desc": [block_m, tile.block_k], "weight_desc": [tile.block_n, tile.block_k]}
        types = {key: f"tensordesc<fp8e4nv{box}>" for key, box in boxes.items()}
        types |= {key: kind for key, kind in pointers.items() if key not in unused[name]}
        if not grouped:  # a plain product, which leaves nothing for the next norm
            plain = ("squares", "next_squares", "group_scale", "weighed", "next_weight")
            types = {key: kind for key, kind in types.items() if key not in plain}
        constants = {"K": num_inputs, "PARTS": num_inputs // 128, "NUM_TILES": tile.num_tiles}
        constants |= {"SPLITS": splits, "BLOCK_M": block_m, "BLOCK_N": tile.block_n}
        constants |= {"BLOCK_K": tile.block_k, "STAGES": tile.stages, "AHEAD": fp8_linear.AHEAD}
        constants["GROUPED"] = grouped
        outer = surroundings[name] if grouped else {**surroundings[name], "out": "*bf16"}
        if not grouped:
            constants["PARTS"] = 0
            outer.pop("next_weight", None)
        found[f"{name} {'groups' if grouped else 'rows'}"] = usage(
            fp8_linear._group_kernel,
            types | outer | numbers,
            constants | {"GATE": "silu" if gated else None, "PDL": True},
            num_warps=tile.warps,
        )
    return found


def long() -> dict[str, dict[str, int]]:
    """As `TritonAttention` launches it for models with the heads of Qwen3-0.6B and 8B."""
    tile, layout = Long(), long_kernel.TILE_LAYOUT.value
    pages = f"tensordesc<bf16[16, 64],{layout}>"
    descriptors = {
        "own": f"tensordesc<bf16[{tile.keys}, 128],{layout}>",
        "keys": pages,
        "values": pages,
    }
    pointers = dict.fromkeys(("qkv", "out", "q_weight"), "*bf16")
    pointers |= dict.fromkeys(("block_tables", "seq_lens", "query_start_loc", "tile_rows"), "*i32")
    pointers |= {"cos_sin": "*fp32", "sinks": "*fp32"}
    numbers = {"query_stride": "i32", "table_stride": "i32", "scale": "fp32", "eps": "fp32"}
    constants = {"KV_HEADS": 8, "BLOCK_SIZE": 16, "PAGE": 16, "BLOCK_N": tile.keys, "PDL": True}
    constants |= {"STAGES": tile.stages, "NORM": True, "SINKS": True}
    return {
        f"groups of {group}": usage(
            long_kernel.long_kernel,
            {**descriptors, **pointers, **numbers},
            {**constants, "GROUP": group},
            num_warps=4,
        )
        for group in (2, 4)
    }


def small() -> dict[str, dict[str, int]]:
    """As `TritonAttention` launches it for models with the heads of SmolLM2-135M and Qwen3-0.6B."""
    words = ("arrivals", "work", "num_work", "block_tables")
    types = dict.fromkeys(words, "*i32") | dict.fromkeys(("partial", "cos_sin"), "*fp32")
    types |= dict.fromkeys(("qkv", "out"), "*bf16") | {"value_offset": "i64"}
    types |= {"qkv_stride": "i32", "table_stride": "i32", "scale": "fp32", "eps": "fp32"}
    found = {}
    for (heads, kv_heads, head_dim), cached in itertools.product(
        ((9, 3, 64), (16, 8, 128)), ("bf16", "fp8e4nv")
    ):
        chosen = attention_tuning.small_tuning(
            num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim
        )
        assert chosen is not None
        normed = head_dim == 128
        norms = dict.fromkeys(("q_weight", "k_weight"), "*bf16") if normed else {}
        found[f"{heads} heads over {cached}"] = usage(
            small_step_kernel.small_step_kernel,
            types | norms | {"cache": f"*{cached}"},
            {
                **{"KV_HEADS": kv_heads, "GROUP": heads // kv_heads, "HEAD_DIM": head_dim},
                **{"BLOCK_D": head_dim, "BLOCK_SIZE": 16, "WINDOW": 0, "SOFTCAP": 0.0},
                **{"SINKS": False, "NORM": normed, "PDL": True, "AT_ONCE": 4},
                **{"BLOCK_M": chosen.lines, "BLOCK_N": chosen.tiling.keys, "OWN": chosen.own},
            },
            num_warps=chosen.tiling.warps,
            num_stages=chosen.tiling.stages,
        )
    return found


CASES = {
    "sampler": sampler,
    "asking": asking,
    "gated": gated,
    "grouped": grouped,
    "long": long,
    "small": small,
}

if __name__ == "__main__":
    print(json.dumps(CASES[sys.argv[1]]()))
