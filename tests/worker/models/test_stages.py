"""Stages of a pipeline, one behind the other in this process: each reads its own weights alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.worker.parallel import TensorParallel
from tests.worker.attention.decoding import Driver
from tests.worker.test_weights import build

PROMPT = torch.randint(3, 160, (19,), generator=torch.Generator().manual_seed(1)).tolist()
CHUNKS = PROMPT[:9], PROMPT[9:18], PROMPT[18:]
# One of each way in which layers differ from each other, or from what lies around them.
NAMES = ("llama", "llama3", "olmo2", "gemma3", "gemma4_small", "gemma4_moe", "cohere2", "gpt_oss")


@pytest.mark.parametrize("name", NAMES)
def test_stages_compute_what_one_does(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(tiny_checkpoint(name), "safetensors")
    whole = Driver.load(checkpoint)
    num_stages = 2 if name == "gemma4_small" else 3
    stages = [
        Driver.load(checkpoint, parallel=TensorParallel(stage=stage, num_stages=num_stages))
        for stage in range(num_stages)
    ]
    for chunk in CHUNKS:
        expected = whole.run({"a": chunk})["a"]
        received = None
        for driver in stages:
            residual = driver.run_stage({"a": chunk}, received=received)
            received = residual.hidden
        logits = stages[-1].step.compute_logits(residual)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert sum(len(driver.model.layers) for driver in stages) == len(whole.model.layers)
    if len(whole.model.layout.groups) == 1:
        sizes = [driver.kv_cache.numel() for driver in stages]
        assert sum(sizes) == whole.kv_cache.numel()


@pytest.mark.parametrize(("name", "shared"), [("llama", 0), ("llama3", 160 * 48)])
def test_stages_hold_each_weight_once(
    name: str, shared: int, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """But a tied embedding, which the last one has for its head."""
    spec = spec_from_config(Checkpoint(tiny_checkpoint(name), "safetensors").config())

    def num_weights(stage: int, num_stages: int) -> int:
        model = build(spec, parallel=TensorParallel(stage=stage, num_stages=num_stages))
        return sum(slot.target.numel() for slot in model.slots())

    assert num_weights(0, 2) + num_weights(1, 2) == num_weights(0, 1) + shared
