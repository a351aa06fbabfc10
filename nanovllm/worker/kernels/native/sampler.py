"""The sampler's draws on a CPU: what `sampling.distribution` means, in one native call a step.

`select` offers it where the library is built; `sampling.sampler` then draws by it.
"""

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from nanovllm.worker.kernels.native import library as native


def sample_tokens(
    logits: Tensor,
    *,
    rows: Tensor,
    positions: Tensor,
    columns: Mapping[str, Tensor],
    seeds: Tensor,
) -> Tensor:
    """Choose one token for each line of `logits` ([n, vocab_size] float32). Returns [n] int64.

    rows, positions: [n] int64. columns: temperature (0: greedy), top_p and min_p float32, top_k
    int32 (0: off), all of one stride; a row's entries are `columns[…][row]` and `seeds[row]`.
    """
    logits, rows, positions = logits.contiguous(), rows.contiguous(), positions.contiguous()
    stride = columns["temperature"].stride(0)
    names = ("temperature", "top_p", "min_p", "top_k")
    assert all(columns[name].stride(0) == stride for name in names)
    assert logits.dtype == torch.float32 and rows.dtype == positions.dtype == torch.int64
    table = native.Columns(
        *(columns[name].data_ptr() for name in names), seeds.data_ptr(), stride, seeds.stride(0)
    )
    token_ids = torch.empty(len(rows), dtype=torch.int64)
    native.library().nv_sample(
        logits.data_ptr(),
        len(rows),
        logits.shape[1],
        rows.data_ptr(),
        positions.data_ptr(),
        ctypes.byref(table),
        token_ids.data_ptr(),
    )
    return token_ids
