"""How many blocks are allocated, and what the user is told when too few fit."""

import pytest
import torch

from nanovllm.config import CacheConfig
from nanovllm.worker import kv_cache
from nanovllm.worker.attention.base import AttentionSpec
from nanovllm.worker.attention.torch_ref import TorchAttention

CPU = torch.device("cpu")


def fit(memory_bytes: int, *, max_model_len: int = 64, max_num_seqs: int = 4, **cache: int) -> int:
    return kv_cache.fit_blocks(
        CacheConfig(**{"block_size": 16, **cache}),
        bytes_per_block=1000,
        memory_bytes=memory_bytes,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
    )


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
    assert cache.nbytes == 5 * kv_cache.block_bytes(spec, num_layers=30)


def test_memory_decides() -> None:
    assert fit(9_999) == 9
    assert fit(5_000) == 5


def test_never_more_than_all_sequences_can_fill() -> None:
    assert fit(10**9) == 1 + 4 * 4
    assert fit(10**9, max_model_len=65, max_num_seqs=2) == 1 + 2 * 5


def test_explicit_sizes_win() -> None:
    assert fit(0, num_gpu_blocks_override=40) == 40
    assert fit(0, kv_cache_memory_bytes=30_500) == 30
    assert fit(0, kv_cache_memory_bytes=30_500, num_gpu_blocks_override=7) == 7


@pytest.mark.parametrize(
    ("memory_bytes", "cache", "most"),
    [
        (4_999, {}, 48),
        (1_500, {}, 0),
        (-5, {}, 0),
        (10**9, {"num_gpu_blocks_override": 4}, 48),
        (10**9, {"kv_cache_memory_bytes": 3_000}, 32),
    ],
)
def test_says_what_would_fit(memory_bytes: int, cache: dict[str, int], most: int) -> None:
    remedy = f"set max_model_len to at most {most}, or raise" if most else "raise"
    with pytest.raises(ValueError, match=rf"max_model_len: .* fit: {remedy} kv_cache_memory"):
        fit(memory_bytes, **cache)


def test_cpu_budget_is_bounded() -> None:
    assert 0 < kv_cache.cpu_memory_budget() <= kv_cache.CPU_MAX_BYTES
