"""The decoder against transformers: same weights, same logits, same greedy ids."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedModel

from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.worker.kernels.triton.layer_kernels import TritonKernels
from tests.conftest import TINY
from tests.moe_models import TINY_MOE
from tests.worker.attention.decoding import Driver
from tests.worker.kernels.triton_device import DEVICE

# Each has norms, caps, queries or blocks that the plain ones have not; the interpreter is slow.
FUSED_DENSE = ["gemma2", "gemma3", "cohere2", "ministral3"]
PROMPT = torch.randint(3, 160, (75,), generator=torch.Generator().manual_seed(1)).tolist()


def assert_near(logits: Tensor, expected: Tensor) -> None:
    """Equal but for fp32 rounding, whatever BLAS each side uses."""
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=3e-5)


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """[tokens, vocab_size], all at once and without a cache."""
    logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def load_reference(path: Path, **how: Any) -> PreTrainedModel:
    """Of transformers, whose attention knows soft caps in every version if it is the eager one."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", **how
    )
    return model.eval()


@pytest.fixture(scope="module", params=TINY)
def pair(
    request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]
) -> tuple[Driver, PreTrainedModel]:
    if request.param == "gpt_oss_odd" and not hasattr(GptOssConfig, "swiglu_alpha"):
        pytest.skip("this transformers takes swiglu_alpha and swiglu_limit for granted")
    path = tiny_checkpoint(request.param)
    return Driver.load(Checkpoint(path, "safetensors")), load_reference(path)


Pair = tuple[Driver, PreTrainedModel]


def test_one_prefill(pair: Pair) -> None:
    driver, reference = pair
    logits = driver.run({"prefill": PROMPT})["prefill"]
    assert logits.dtype == torch.float32
    assert_near(logits, reference_logits(reference, PROMPT))


def test_wanted_tokens_only(pair: Pair) -> None:
    """What the last layer leaves out is nobody's business."""
    driver, reference = pair
    wanted = torch.tensor([0, 41, len(PROMPT) - 1])
    logits = driver.run_batch({"wanted": PROMPT}, wanted=wanted)
    assert_near(logits, reference_logits(reference, PROMPT)[wanted])


@pytest.mark.parametrize("size", [1, 7, 64])
def test_chunks(pair: Pair, size: int) -> None:
    driver, reference = pair
    chunks = [PROMPT[start : start + size] for start in range(0, len(PROMPT), size)]
    logits = [driver.run({f"chunks of {size}": chunk})[f"chunks of {size}"] for chunk in chunks]
    assert_near(torch.cat(logits), reference_logits(reference, PROMPT))


def test_greedy_decoding_in_mixed_batches(pair: Pair) -> None:
    """Three sequences of different lengths, one of them still in its prompt while others decode."""
    driver, reference = pair
    ids = {"a": PROMPT[:40], "b": PROMPT[40:], "c": PROMPT[:1]}
    start = dict(ids)
    waiting = {"a": ids["a"], "c": ids["c"]}
    late = [ids["b"][i : i + 9] for i in range(0, len(ids["b"]), 9)]
    for _ in range(30):
        new = waiting | ({"b": late.pop(0)} if late else {})
        logits = driver.run(new)
        waiting = {name: [int(rows[-1].argmax())] for name, rows in logits.items()}
        if late:
            del waiting["b"]
        ids = {name: ids[name] + waiting.get(name, []) for name in ids}
    for name in ids:
        expected = reference_logits(reference, ids[name][:-1]).argmax(-1)
        num_prompt = len(start[name])
        assert ids[name][num_prompt:] == expected[num_prompt - 1 :].tolist(), name


def test_shared_blocks_are_a_prefix(pair: Pair) -> None:
    driver, reference = pair
    driver.run({"owner": PROMPT[:32]})
    blocks = driver.model.layout.blocks  # that each group has of the same tokens
    owned = zip(driver.tables["owner"], blocks, strict=True)
    driver.tables["guest"] = [table[: 5 * count] for table, count in owned]
    driver.lengths["guest"] = 5 * driver.block_size
    logits = driver.run({"guest": PROMPT[20:50]})["guest"]
    assert_near(logits, reference_logits(reference, PROMPT[:50])[20:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_half_precision_stays_near(
    name: str, dtype: torch.dtype, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """Not further from fp32 than transformers in the same precision, with some room for luck."""
    path = tiny_checkpoint(name)
    driver = Driver.load(Checkpoint(path, "safetensors"), dtype=dtype)
    exact = reference_logits(load_reference(path), PROMPT)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    their_error = (reference_logits(theirs, PROMPT).float() - exact).square().mean()
    logits = driver.run({"prefill": PROMPT[:-1]})["prefill"]
    last = driver.run({"prefill": PROMPT[-1:]})["prefill"]
    our_error = (torch.cat((logits, last)) - exact).square().mean()
    assert our_error < 1.5 * their_error


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="kernels run on the CPU if interpreted only")
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", *FUSED_DENSE, *TINY_MOE])
def test_fused_kernels(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    """Norms ahead of products, from layer to layer, with one token, with few and with many."""
    path = tiny_checkpoint(name)
    driver = Driver.load(Checkpoint(path, "safetensors"), kernels=TritonKernels())
    prompt = PROMPT[:49]  # the interpreter takes as long for each token
    expected, start = reference_logits(load_reference(path), prompt), 0
    for size in (33, 9, 1):
        logits = driver.run({"chunk": prompt[start : start + size]})["chunk"]
        assert_near(logits, expected[start : start + size])
        start += size
    wanted = torch.tensor([0, len(prompt) - start - 1])
    logits = driver.run_batch({"chunk": prompt[start:]}, wanted=wanted)
    assert_near(logits, expected[start + wanted])


@pytest.mark.model
def test_smollm2_from_gguf(smollm2_path: Path, hf_smollm2: Any) -> None:
    reference, tokenizer = hf_smollm2
    driver = Driver.load(Checkpoint(smollm2_path, "gguf"), block_size=16)
    assert driver.model.num_parameters == sum(p.numel() for p in reference.parameters())
    ids = tokenizer("The three laws of robotics were first stated by").input_ids
    num_prompt, new = len(ids), ids
    for _ in range(24):
        logits = driver.run({"a": new})["a"]
        new = [int(logits[-1].argmax())]
        ids = ids + new
    expected = reference_logits(reference, ids[:-1])
    assert ids[num_prompt:] == expected[num_prompt - 1 :].argmax(-1).tolist()
    torch.testing.assert_close(logits[-1], expected[-1], rtol=1e-4, atol=1e-4)
