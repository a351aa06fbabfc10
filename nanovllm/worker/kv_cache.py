"""Allocates the paged KV cache, one tensor for the whole model.

`worker` does so once, for as many blocks as `memory_plan` lets it have. Block 0 is never handed
out: padding reads and writes it.
"""

import math
import mmap

import torch
from torch import Tensor


def allocate(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The cache, zeroed, of a backend's `kv_shape`.

    Zeros, not whatever memory held: padding multiplies block 0 by 0, and 0 · NaN is NaN.
    """
    if device.type == "cpu":
        # Zero pages that the system provides when they are touched: writing 4 GiB takes seconds.
        # Small pages: of a few blocks in each layer, huge ones would make 2 MiB a layer.
        num_bytes = math.prod(shape) * dtype.itemsize
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_NOHUGEPAGE)
        return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)
