"""Allocates the paged KV cache, one tensor for the whole model.

`worker` does so once, for as many blocks as `memory_plan` lets it have. Block 0 is never handed
out: padding reads and writes it.
"""

import math

import numpy as np
import torch
from torch import Tensor


def allocate(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The cache, zeroed, of a backend's `kv_shape`.

    Zeros, not whatever memory held: padding multiplies block 0 by 0, and 0 · NaN is NaN.
    """
    if device.type == "cpu":
        # Zero pages that the system provides when they are touched: writing 4 GiB takes seconds.
        num_bytes = math.prod(shape) * dtype.itemsize
        return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)
