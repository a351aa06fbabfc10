"""Attention in Gluon: beside dense attention on a Hopper GPU, and its machine code anywhere.

Nothing interprets Gluon. What surrounds it, and Triton's kernel that means the same, is tested in
`test_triton`.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from nanovllm.worker.attention.base import AttentionSpec
from nanovllm.worker.attention.triton.attention_tuning import Long, can_attend_long, tuning_for
from tests.worker.attention.attending import attend, batch_of, dense, inputs_for
from tests.worker.kernels.triton_device import DEVICE
from tests.worker.warmup.compiling import run_compiling

SPEC = AttentionSpec(
    num_heads=4,
    num_kv_heads=2,
    head_dim=128,
    scale=0.1,
    block_size=16,
    sliding_window=None,
    dtype=torch.bfloat16,
    device=DEVICE,
)
SPECS = {
    "pages of 16": SPEC,
    "of 64": replace(SPEC, block_size=64),
    "of 256": replace(SPEC, block_size=256),
    "of 48": replace(SPEC, block_size=48),
    "half precision": replace(SPEC, dtype=torch.float16),
    "a head each": replace(SPEC, num_kv_heads=4),
    "groups of 3": replace(SPEC, num_heads=3, num_kv_heads=1),
    "groups of 5": replace(SPEC, num_heads=5, num_kv_heads=1),
    "sinks": replace(SPEC, sinks=True),
}
CASES = {
    "prompts": ([300, 16, 128, 129, 2], [300, 16, 128, 129, 2]),
    "chunks": ([200, 17, 64, 128], [1000, 80, 192, 129]),
    "decoding rows among them": ([1, 90, 1, 2, 1], [70, 600, 5, 34, 129]),
    "a long context": ([130], [4000]),
}


@pytest.fixture
def tuning_of():
    """Which attends so however few tokens a step has; elsewhere than on Hopper there is none."""
    if DEVICE.type == "cpu" or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs an NVIDIA GPU of compute capability 9.x")
    return lambda spec: replace(tuning_for(spec), long=Long(min_tokens=0))


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(("query_lens", "seq_lens"), CASES.values(), ids=CASES)
def test_equals_dense_attention(
    spec: AttentionSpec, query_lens: list[int], seq_lens: list[int], tuning_of
) -> None:
    torch.manual_seed(0)
    batch = batch_of(query_lens, seq_lens, spec.block_size)
    qkv, cache = inputs_for(spec, batch)
    expected = dense(spec, qkv, cache, batch)
    out = attend(spec, qkv, cache, batch, tuning_of(spec)).double()
    for begin, end in pairwise(batch.query_start_loc.tolist()):
        error = (out - expected)[begin:end].norm() / expected[begin:end].norm()
        assert error < 4e-3


def test_elsewhere_it_is_not_asked_for() -> None:
    narrow = replace(SPEC, head_dim=64)
    others = (replace(SPEC, sliding_window=64), replace(SPEC, softcap=30.0), narrow)
    assert not any(map(can_attend_long, others))
    if DEVICE.type == "cpu":
        assert tuning_for(SPEC).long is None


def test_it_fits_a_multiprocessor_and_its_products_overlap() -> None:
    for usage in run_compiling("compile_for_gpu.py", "long").values():
        assert usage["spilled"] == usage["serialized"] == 0
        assert usage["registers"] == 168  # for three warpgroups, which then share them out
        assert usage["shared"] <= 227 * 1024
