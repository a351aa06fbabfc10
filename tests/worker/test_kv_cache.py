"""The cache that is allocated."""

import torch

from nanovllm.worker import kv_cache
from nanovllm.worker.attention.base import AttentionSpec
from nanovllm.worker.attention.torch_ref import TorchAttention

CPU = torch.device("cpu")


def test_block_bytes_are_those_of_the_tensor() -> None:
    spec = AttentionSpec(
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        scale=0.125,
        block_size=16,
        sliding_window=None,
        dtype=torch.bfloat16,
        device=CPU,
    )
    shape = TorchAttention.kv_shape(spec, num_layers=30, num_blocks=5)
    cache = kv_cache.allocate(shape, dtype=spec.dtype, device=spec.device)
    assert cache.shape == (2, 30, 5, 16, 3, 64) and cache.count_nonzero() == 0
    assert cache.nbytes == 5 * kv_cache.block_bytes(spec, num_layers=30)
