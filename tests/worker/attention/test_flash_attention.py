"""What surrounds the flash-attn packages, with plain torch in their place: they need CUDA."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.worker.attention import flash_attention
from nanovllm.worker.attention.flash_attention import (
    FLASH_ATTN_2,
    FLASH_ATTN_4,
    FlashAttention,
    installed_package,
)
from nanovllm.worker.attention.triton.backend import TritonAttention
from nanovllm.worker.kernels.triton.layer_kernels import TritonKernels
from tests.worker.attention.attending import (
    SPEC,
    TUNING,
    batch_of,
    dense,
    inputs_for,
    rotary_for,
)


class Package:
    """The one function that is used of a package. calls: queries of each row it attended for."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def flash_attn_varlen_func(
        self, q: Tensor, k: Tensor, v: Tensor, **options: Any
    ) -> tuple[Tensor, None] | Tensor:
        """k, v: [num_blocks, block_size, num_kv_heads, head_dim]. Tokens of rows it is not to
        attend for are left as memory is found."""
        assert options["causal"]
        out = torch.full_like(q, torch.nan).contiguous()
        starts = options["cu_seqlens_q"]
        is_4 = "page_table" in options
        counts = options["seqused_q"] if is_4 else starts.diff()
        lens = options["seqused_k"] if is_4 else options["cu_seqlens_k"].diff()
        table = options["page_table" if is_4 else "block_table"]
        assert {counts.dtype, lens.dtype, table.dtype} == {torch.int32}
        for row, (start, count, length) in enumerate(
            zip(starts.tolist(), counts.tolist(), lens.tolist(), strict=False)
        ):
            assert count <= options["max_seqlen_q"] and length <= options["max_seqlen_k"]
            if count:
                keys, values = (
                    half[table[row].long()].flatten(0, 1)[:length]
                    .repeat_interleave(q.shape[1] // half.shape[2], 1).transpose(0, 1)
                    for half in (k, v)
                )  # fmt: skip
                visible = torch.ones(count, length, dtype=torch.bool, device=q.device)
                out[start : start + count] = torch.nn.functional.scaled_dot_product_attention(
                    q[start : start + count].transpose(0, 1),
                    keys,
                    values,
                    attn_mask=visible.tril(length - count),
                    scale=options["softmax_scale"],
                ).transpose(0, 1)
        self.calls.append(counts.tolist())
        return (out, None) if is_4 else out


@pytest.fixture(params=[FLASH_ATTN_4, FLASH_ATTN_2])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Package:
    package = Package()
    for name in ("flash_attn", request.param):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules[request.param].__dict__["flash_attn_varlen_func"] = package.flash_attn_varlen_func
    monkeypatch.setattr(FlashAttention, "unsupported", staticmethod(TritonAttention.unsupported))
    monkeypatch.setattr(flash_attention, "MIN_TOKENS", 8)
    assert installed_package() == request.param
    return package


@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "attended"),
    [
        pytest.param([37, 16], [37, 16], [37, 16], id="whole prompts"),
        pytest.param([9, 17], [42, 80], [9, 17], id="chunks"),
        pytest.param([1, 20, 2], [70, 45, 2], [0, 20, 2], id="beside decodes"),
        pytest.param([12, 0, 0], [12, 0, 0], [12, 0, 0], id="padding rows"),
        pytest.param([1, 1], [70, 9], None, id="decode: not the package's"),
        pytest.param([3, 2], [3, 2], None, id="few tokens: not the package's"),
    ],
)
def test_equals_dense_attention(
    package: Package, query_lens: list[int], seq_lens: list[int], attended: list[int] | None
) -> None:
    """attended: by flash-attn-4, for each row; flash-attn 2 cannot be told to leave one out."""
    torch.manual_seed(0)
    batch = batch_of(query_lens, seq_lens, SPEC.block_size)
    qkv, cache = inputs_for(SPEC, batch)
    expected = dense(SPEC, qkv, cache, batch)
    backend = FlashAttention(SPEC, TUNING)
    backend.prepare(batch)
    out = backend.forward(qkv, rotary_for(SPEC, TritonKernels()), cache, batch)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    if attended is not None and installed_package() == FLASH_ATTN_2:
        attended = query_lens
    assert package.calls == ([] if attended is None else [attended])
