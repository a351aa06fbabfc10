"""Sizes and allocates the paged KV cache, one tensor for the whole model.

`worker` asks how many blocks fit, once, after the weights are in. Block 0 is never handed out:
padding reads and writes it.
"""

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanovllm.config import CacheConfig
from nanovllm.worker.attention.base import AttentionSpec

CPU_MAX_BYTES = 4 * 2**30
CPU_SHARE_OF_FREE = 0.25
NUM_RESERVED = 1  # block 0


def block_bytes(spec: AttentionSpec, *, num_layers: int) -> int:
    """Bytes of one block: keys and values of `block_size` tokens in every layer."""
    values = 2 * num_layers * spec.block_size * spec.num_kv_heads * spec.head_dim
    return values * spec.cache_dtype.itemsize


def cpu_memory_budget() -> int:
    """Bytes a CPU engine gives to KV by default: a quarter of free memory, at most 4 GiB.

    The system takes memory only as blocks are first written, so this is a limit, not a cost.
    """
    return min(CPU_MAX_BYTES, int(_free_memory() * CPU_SHARE_OF_FREE))


def fit_blocks(
    config: CacheConfig,
    *,
    bytes_per_block: int,
    memory_bytes: int,
    max_model_len: int,
    max_num_seqs: int,
) -> int:
    """How many blocks to allocate, block 0 included.

    memory_bytes: what may be used if `config` does not say it; never more is taken than
    `max_num_seqs` sequences of `max_model_len` tokens could fill. Raises `ValueError` if not one
    sequence of `max_model_len` fits, saying what would.
    """
    blocks_per_sequence = math.ceil(max_model_len / config.block_size)
    if config.num_gpu_blocks_override is not None:
        num_blocks = config.num_gpu_blocks_override
    elif config.kv_cache_memory_bytes is not None:
        num_blocks = config.kv_cache_memory_bytes // bytes_per_block
    else:
        num_blocks = max(0, memory_bytes) // bytes_per_block
        num_blocks = min(num_blocks, NUM_RESERVED + max_num_seqs * blocks_per_sequence)
    usable = num_blocks - NUM_RESERVED
    if usable < blocks_per_sequence:
        num_bytes = bytes_per_block * (blocks_per_sequence + NUM_RESERVED)
        fits = max(0, usable) * config.block_size
        shorter = f"set max_model_len to at most {fits}, or " if fits >= 2 else ""
        raise ValueError(
            f"max_model_len: a sequence of {max_model_len} tokens needs {blocks_per_sequence} KV "
            f"blocks (with the reserved one {num_bytes:,} bytes), and {max(0, usable)} fit: "
            f"{shorter}raise kv_cache_memory_bytes, gpu_memory_utilization or "
            "num_gpu_blocks_override"
        )
    return num_blocks


def allocate(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The cache, zeroed, of a backend's `kv_shape`.

    Zeros, not whatever memory held: padding multiplies block 0 by 0, and 0 · NaN is NaN.
    """
    if device.type == "cpu":
        # Zero pages that the system provides when they are touched: writing 4 GiB takes seconds.
        num_bytes = math.prod(shape) * dtype.itemsize
        return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)


def _free_memory() -> int:
    """Bytes that programs could still take; all the machine's where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            name, _, amount = line.partition(":")
            if name == "MemAvailable":
                return int(amount.removesuffix("kB")) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
