"""What surrounds the flash-attn packages, with plain torch in their place: they need CUDA."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.worker.attention import flash_attention
from nanovllm.worker.attention.flash_attention import FlashAttention
from nanovllm.worker.attention.triton_attention import TritonAttention
from nanovllm.worker.kernels.triton_kernels import TritonKernels
from tests.worker.test_triton_attention import (
    SPEC,
    TUNING,
    batch_of,
    dense,
    inputs_for,
    rotary_for,
)


class Package:
    """`flash_attn.cute`, of which one function is used. calls: how many keys each was given."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def flash_attn_varlen_func(
        self, q: Tensor, k: Tensor, v: Tensor, **options: Any
    ) -> tuple[Tensor, None]:
        """Rows without keys, as those that decode may be, are left as memory is found."""
        assert options["causal"]
        self.calls.append(len(k))
        out = torch.full_like(q, torch.nan).contiguous()
        group = q.shape[1] // k.shape[1]
        query_starts, key_starts = (options[f"cu_seqlens_{of}"].tolist() for of in "qk")
        for row in range(len(query_starts) - 1):
            queries = slice(query_starts[row], query_starts[row + 1])
            keys = slice(key_starts[row], key_starts[row + 1])
            num_queries, num_keys = queries.stop - queries.start, keys.stop - keys.start
            assert num_queries <= options["max_seqlen_q"]
            assert num_keys <= options["max_seqlen_k"]
            if num_keys == 0:
                continue
            visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
            out[queries] = torch.nn.functional.scaled_dot_product_attention(
                q[queries].transpose(0, 1),
                *(half[keys].repeat_interleave(group, 1).transpose(0, 1) for half in (k, v)),
                attn_mask=visible.tril(num_keys - num_queries),
                scale=options["softmax_scale"],
            ).transpose(0, 1)
        return out, None


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Package:
    package = Package()
    for name in ("flash_attn", "flash_attn.cute"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["flash_attn.cute"].__dict__["flash_attn_varlen_func"] = (
        package.flash_attn_varlen_func
    )
    monkeypatch.setattr(FlashAttention, "unsupported", staticmethod(TritonAttention.unsupported))
    monkeypatch.setattr(flash_attention, "MIN_TOKENS", 8)
    return package


@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "num_keys"),
    [
        pytest.param([37, 16], [37, 16], 53, id="fresh: the step's own keys"),
        pytest.param([1, 20, 1], [70, 20, 9], 22, id="fresh beside decodes"),
        pytest.param([9, 17], [42, 80], 122, id="chunks: gathered keys"),
        pytest.param([1, 20, 2], [70, 45, 2], 47, id="chunks beside decodes"),
        pytest.param([1, 1], [70, 9], None, id="decode: not the package's"),
        pytest.param([3, 2], [3, 2], None, id="few tokens: not the package's"),
    ],
)
def test_equals_dense_attention(
    package: Package, query_lens: list[int], seq_lens: list[int], num_keys: int | None
) -> None:
    torch.manual_seed(0)
    batch = batch_of(query_lens, seq_lens, SPEC.block_size)
    pairs = zip(query_lens, seq_lens, strict=True)
    batch.is_fresh = all(count in (1, length) for count, length in pairs)
    qkv, cache = inputs_for(SPEC, batch)
    expected = dense(SPEC, qkv, cache, batch)
    backend = FlashAttention(SPEC, TUNING)
    backend.prepare(batch)
    out = backend.forward(qkv, rotary_for(SPEC, TritonKernels()), cache, batch)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    assert package.calls == ([] if num_keys is None else [num_keys])
