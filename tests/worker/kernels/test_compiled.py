"""What only a compiler can get wrong, and no interpreter shows: kernels as engines have them."""

from dataclasses import replace

import pytest
import torch

from nanovllm.worker.attention.triton.attention_tuning import tuning_for
from tests.worker.attention.attending import SPEC, check
from tests.worker.planning import NEEDS_GPU

pytestmark = NEEDS_GPU


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("query_lens", "seq_lens"),
    [
        pytest.param([70, 44], [70, 44], id="prompts"),
        pytest.param([20, 9], [170, 44], id="chunks"),
        pytest.param([40], [3000], id="a context in pieces"),
        pytest.param([1, 1], [170, 44], id="decode"),
        pytest.param([1] * 150, [90] * 150, id="many decode"),
        pytest.param([1, 20, 1], [70, 44, 9], id="mixed"),
    ],
)
def test_attention_in_bfloat16(
    query_lens: list[int], seq_lens: list[int], head_dim: int, kv_dtype: torch.dtype | None
) -> None:
    spec = replace(SPEC, dtype=torch.bfloat16, kv_dtype=kv_dtype, head_dim=head_dim)
    tuning = tuning_for(spec)
    check(spec, query_lens, seq_lens, tuning)
    if max(query_lens) > 1:  # as in larger steps
        check(spec, query_lens, seq_lens, replace(tuning, small=None))
