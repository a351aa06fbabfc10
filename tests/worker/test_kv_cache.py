"""The cache that is allocated."""

import pytest
import torch

from nanovllm.worker import kv_cache
from nanovllm.worker.attention.base import AttentionSpec
from nanovllm.worker.attention.torch_ref import TorchAttention

CPU = torch.device("cpu")


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
def test_block_bytes_are_those_of_the_tensor(kv_dtype: torch.dtype | None) -> None:
    spec = AttentionSpec(
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        scale=0.125,
        block_size=16,
        sliding_window=None,
        dtype=torch.bfloat16,
        device=CPU,
        kv_dtype=kv_dtype,
    )
    shape = TorchAttention.kv_shape(spec, num_layers=30, num_blocks=5)
    cache = kv_cache.allocate(shape, dtype=spec.cache_dtype, device=spec.device)
    assert cache.shape == (2, 30, 5, 16, 3, 64) and cache.float().count_nonzero() == 0
    assert cache.nbytes == 5 * 30 * spec.bytes_per_block
