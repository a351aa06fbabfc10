"""Which products are ours and how they are cut, as measured; `skinny_linear` launches by them."""

from dataclasses import dataclass, replace

import triton
from torch import Tensor

from nanovllm.worker.kernels.triton.launch import has_tensor_memory_accelerator

MAX_TOKENS = 128
MAX_FP8_TOKENS = 16  # that products quantize themselves, each program anew
MAX_GROUPED_TOKENS = 32  # that come to products quantized in groups of inputs
MAX_ROW_TOKENS = 64  # that come with a scale each
SMALL, TINY = 2**23, 2**21  # weights of a layer: read in a few µs, and in less than one
FULL = 128  # programs that run at once on an H100, each with much of its shared memory


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes: block_n outputs over num_tiles * block_k inputs.

    Of block_m tokens, where there are several; None: as few as hold all, and at most 64.
    """

    block_n: int
    block_k: int
    num_tiles: int  # along the inputs
    warps: int
    stages: int = 3
    block_m: int | None = None


def beats_cublas(num_tokens: int, weight: Tensor, *, gated: bool = False) -> bool:
    """Whether `skinny_linear` is the faster one, as measured on an H100 and an H200.

    With several tokens it needs the copy engine, and so rows of whole 16 bytes.
    """
    if num_tokens == 1:
        return True
    is_whole = weight.stride(0) * weight.itemsize % 16 == 0
    if num_tokens > MAX_TOKENS or not (is_whole and has_tensor_memory_accelerator(weight.device)):
        return False
    if weight.itemsize == 1:
        return num_tokens <= MAX_FP8_TOKENS
    if num_tokens <= 16:
        return True
    if weight.itemsize > 2:
        return False
    # More tokens: layers that are read in a few µs, where launches and their gaps weigh most.
    if not gated:
        return weight.numel() < SMALL
    return is_tiny(weight) or num_tokens <= (64 if weight.numel() < SMALL else 32)


def is_tiny(weight: Tensor) -> bool:
    """Whether launches are what its products cost, with as many tokens as are ours."""
    return weight.numel() < TINY


def are_grouped(num_tokens: int, weight: Tensor) -> bool:
    """Whether `fp8_linear` is the fastest one for these e4m3 weights, as measured on an H200.

    A layer of Qwen3-8B's products took 91 µs with 32 tokens where cuBLAS and its quantizing took
    103, but 116 and 105 µs with 64, 162 and 105 µs with 128.
    """
    can = has_tensor_memory_accelerator(weight.device)
    return can and MAX_FP8_TOKENS < num_tokens <= MAX_GROUPED_TOKENS and weight.numel() >= 2**23


def are_rows(num_tokens: int, weight: Tensor) -> bool:
    """The same of `fp8_linear` with a scale for each token."""
    can = has_tensor_memory_accelerator(weight.device) and weight.shape[1] % 16 == 0
    return can and MAX_GROUPED_TOKENS < num_tokens <= MAX_ROW_TOKENS and weight.numel() >= 2**23


def tile_for(num_tokens: int, num_outputs: int, num_inputs: int, *, gated: bool) -> Tile:
    """Measured on an H100 and an H200 with the layers of Qwen3-0.6B and 8B, of 8B's halves that two
    ranks share and 32B's half gates, and of Gemma-3-4B, which has 2,560 inputs (gpu_kernels.py)."""
    if num_tokens == 1:
        return _tile_for_one(num_outputs, num_inputs, gated=gated)
    if num_tokens > 16:
        of_many = _gated_tile_for_many if gated else _tile_for_many
        return of_many(num_tokens, num_outputs, num_inputs)
    if num_inputs == 4096 and num_outputs * num_inputs >= 2**23:  # halves of layers of 8B
        if gated and num_outputs <= 6144:
            return Tile(32, 512, 2, warps=4, stages=3)
        if not gated and num_outputs <= 3072:
            return Tile(64, 512, 1, warps=4, stages=2)
    if num_outputs * num_inputs >= 2**23:
        block_n = 32 if gated else 64
        # Some waves of programs hide each other's ends; more splits would be added up for nothing.
        splits = min(4, max(1, 3 * FULL // triton.cdiv(num_outputs, block_n)))
        return Tile(block_n, 512, triton.cdiv(num_inputs, 512 * splits), warps=4, stages=2)
    # All programs fit on the device at once, so each has its weights on the way at once.
    if num_inputs <= 1024:
        return Tile(32, 512 if gated else 1024, 1, warps=4, stages=2)
    return Tile(64, 512, 1, warps=4, stages=2)


def _tile_for_one(num_outputs: int, num_inputs: int, *, gated: bool) -> Tile:
    """Of a single token."""
    if num_inputs == 2560 and gated:  # tiles of 2,048 would leave much of the second one empty
        return Tile(16, 512, 5, warps=8)
    if num_inputs == 2560 and num_outputs <= 6144:
        return Tile(8, 1024, 3, warps=4)
    if num_inputs == 4096 and gated:
        return Tile(4, 4096, 1, warps=8)
    if num_inputs == 5120 and gated:
        return Tile(4, 1024, 5, warps=4)
    if num_inputs == 2048 and num_outputs >= 4096 and not gated:
        return Tile(4, 1024, 2, warps=4)
    block_k = 1024 if num_inputs <= 1024 else 2048
    warps = 8 if num_inputs <= 4096 else 4
    return Tile(8192 // block_k, block_k, -(-num_inputs // block_k), warps)


def _tile_for_many(num_tokens: int, num_outputs: int, num_inputs: int) -> Tile:
    """Of 17 to 128 tokens, measured on an H100 in whole steps of Qwen3-0.6B; on an H200 the layers
    of SmolLM2-135M, so small that programs of 16 tokens each are few enough."""
    if num_tokens <= 32 and num_inputs > 1024:
        return Tile(32, 512, 1, warps=4, stages=2)
    whole = Tile(32, 1024, 1, warps=4, stages=2)  # all inputs of a split at once
    if num_tokens <= 32:
        some = [replace(whole, block_m=16)]
    else:
        some = [replace(whole, block_n=16), whole]
        if num_outputs <= num_inputs:
            block_k = 1024 if num_inputs <= 1024 else 512
            some.insert(0, Tile(64, block_k, 1, warps=4, stages=2, block_m=16))
    fitting = (tile for tile in some if _fits(tile, num_tokens, num_outputs, num_inputs))
    if (tile := next(fitting, None)) is not None or num_tokens <= 32:
        return tile or whole
    block_n, stages = (64, 4) if num_outputs > num_inputs else (32, 5)
    # More splits would spend the time they save on adding up.
    splits = max(1, FULL // (triton.cdiv(num_tokens, 64) * triton.cdiv(num_outputs, block_n)))
    return Tile(block_n, 128, triton.cdiv(num_inputs, 128 * splits), warps=4, stages=stages)


def _gated_tile_for_many(num_tokens: int, num_outputs: int, num_inputs: int) -> Tile:
    """The same of gates, measured as those are; gates of 8B on an H100, of Gemma-3-4B and
    SmolLM2-135M on an H200."""
    if num_outputs * num_inputs >= 2**23:
        if num_tokens <= 32 and num_inputs == 2560:
            return Tile(64, 64, 40, warps=4, stages=4)
        return Tile(64, 128, triton.cdiv(num_inputs, 128), warps=4, stages=3)
    if num_tokens > 32:
        return Tile(32, 128, triton.cdiv(num_inputs, 128), warps=4, stages=5)
    whole = Tile(32, 1024, 1, warps=4, stages=2, block_m=16)
    if num_inputs <= 1024 and _fits(whole, num_tokens, num_outputs, num_inputs):
        return whole
    return Tile(16, 256, triton.cdiv(num_inputs, 256), warps=4, stages=4)


def _fits(tile: Tile, num_tokens: int, num_outputs: int, num_inputs: int) -> bool:
    """Whether all programs of a product run at once."""
    num_m, num_n = (
        triton.cdiv(num_tokens, tile.block_m or 64),
        triton.cdiv(num_outputs, tile.block_n),
    )
    num_programs: int = num_m * num_n * triton.cdiv(num_inputs, tile.block_k * tile.num_tiles)
    return num_programs <= FULL


def fp8_tile_for(num_tokens: int, num_outputs: int, num_inputs: int, *, gated: bool) -> Tile:
    """Measured on an H100 with the same layers, several tokens in whole steps."""
    if num_tokens == 1 and num_inputs > 4096:
        return Tile(8, 1024, -(-num_inputs // 1024), warps=4)
    if num_tokens == 1:
        block_k = triton.next_power_of_2(num_inputs)
        return Tile(8 if block_k <= 1024 else 4, block_k, 1, warps=8)
    if num_outputs * num_inputs >= 2**23:
        block_k, num_n = 128 if gated else 256, triton.cdiv(num_outputs, 128)
        num_tiles = triton.cdiv(num_inputs, block_k * max(1, FULL // num_n))
        return Tile(128, block_k, num_tiles, warps=8, stages=4 if gated else 3)
    if triton.cdiv(num_outputs, 128) * triton.cdiv(num_inputs, 512) < 48:
        return Tile(64, 512, 1, warps=4, stages=2)
    return Tile(128, 512, 1, warps=8, stages=2)


def fp8_group_tile_for(num_outputs: int, num_inputs: int, *, gated: bool) -> Tile:
    """Of tokens that come quantized in groups of 128 inputs, measured on an H200 with Qwen3-8B."""
    splits = 1 if gated else max(1, FULL // triton.cdiv(num_outputs, 128))
    num_tiles = triton.cdiv(num_inputs, 128 * splits)
    return Tile(128, 128, num_tiles, warps=8, stages=3 if gated else 4)


def fp8_row_tile_for(num_outputs: int, num_inputs: int, *, gated: bool) -> Tile:
    """Of tokens that come quantized with a scale each, measured on an H200 with Qwen3-8B."""
    num_n = triton.cdiv(num_outputs, 64)
    splits = 1 if gated else max(1, FULL // num_n)
    block_k = 128 if gated else 256
    num_tiles = triton.cdiv(num_inputs, block_k * splits)
    return Tile(64, block_k, num_tiles, warps=4, stages=4, block_m=64)
