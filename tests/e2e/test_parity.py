"""Greedy ids in fp32 equal transformers', whatever the batch, the chunks, the cache, the overlap.

Small random-weight models go through every variation; the real model through the main ones.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from nanovllm.sampling_params import SamplingParams
from tests.dense_models import TINY_DENSE
from tests.e2e.engine import Engine
from tests.moe_models import TINY_MOE

# What scheduling sees of a model is whether its layers have windows: one without goes through every
# variation, and one with. All families go through those that cut, cache and preempt.
ARCHITECTURES = ["llama", "mistral"]
FAMILIES = ["llama3", "qwen2", "qwen3", *TINY_DENSE, *TINY_MOE]
NUM_TOKENS, NUM_TINY_TOKENS = 40, 16


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


GREEDY, TINY_GREEDY = greedy(NUM_TOKENS), greedy(NUM_TINY_TOKENS)

# Each is a way to run the same requests differently; none may change a single id.
VARIATIONS: dict[str, dict[str, Any]] = {
    "chunks_of_7": {"long_prefill_token_threshold": 7},
    "chunks_of_64": {"max_num_batched_tokens": 64},
    "no_prefix_cache": {"enable_prefix_caching": False},
    "two_steps_in_flight": {"max_inflight_steps": 2},
    "blocks_of_5": {"block_size": 5},
    "one_seat": {"max_num_seqs": 1},
}


def mixed_prompts(vocab_size: int, count: int = 16, longest: int = 90) -> list[list[int]]:
    rng = random.Random(0)
    return [
        [rng.randrange(3, vocab_size) for _ in range(rng.randint(1, longest))] for _ in range(count)
    ]


@torch.inference_mode()
def assert_greedy(
    model: PreTrainedModel, prompts: list[list[int]], outputs: list[list[int]]
) -> None:
    """Each output is what transformers picks: every id has its highest logit after those before.

    That makes an output the only one `transformers.generate` could give, in one pass a prompt
    instead of one a token; one prompt at a time, so that no padding is involved.
    """
    for prompt, ids in zip(prompts, outputs, strict=True):
        logits = model(torch.tensor([prompt + ids[:-1]]), use_cache=False).logits[0]
        assert ids == logits[len(prompt) - 1 :].argmax(-1).tolist(), f"after {prompt}"


Expected = tuple[Path, list[list[int]], list[list[int]]]  # a model, prompts, and their outputs


def expected_of(path: Path, **settings: Any) -> Expected:
    """The outputs are those of an engine with these settings, found to be transformers'."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = mixed_prompts(model.config.get_text_config().vocab_size)
    engine = Engine(model=str(path), max_model_len=256, **settings)
    outputs = engine.generate(prompts, TINY_GREEDY)
    assert_greedy(model, prompts, outputs)
    assert engine.generate(prompts, TINY_GREEDY) == outputs, "with a warm prefix cache"
    engine.close()
    return path, prompts, outputs


def windows_spare(engine: Engine) -> bool:
    """Whether sequences give back a block for each that they take: then nobody is preempted."""
    return any(engine.info.kv_windows)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]) -> Expected:
    return expected_of(tiny_checkpoint(request.param))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_transformers(
    name: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """In batches, from a warm prefix cache, and in small chunks, some of which are preempted."""
    path, prompts, expected = expected_of(tiny_checkpoint(name), **VARIATIONS["chunks_of_64"])
    engine = Engine(model=str(path), max_model_len=160)
    engine.close()
    num_blocks = 14 + 10 * len(engine.info.kv_windows)  # a sequence takes 10 of each group
    cut_and_preempted = {**VARIATIONS["chunks_of_7"], "num_gpu_blocks_override": num_blocks}
    engine = Engine(model=str(path), max_model_len=160, **cut_and_preempted)
    assert engine.generate(prompts, TINY_GREEDY) == expected
    assert engine.status().num_preemptions > 0 or windows_spare(engine)
    engine.close()


@pytest.mark.parametrize("variation", VARIATIONS)
def test_tiny_models_equal_transformers(tiny: Any, variation: str) -> None:
    path, prompts, expected = tiny
    engine = Engine(model=str(path), max_model_len=256, **VARIATIONS[variation])
    assert engine.generate(prompts, TINY_GREEDY) == expected
    assert engine.generate(prompts, TINY_GREEDY) == expected, "with a warm prefix cache"
    engine.close()


def test_preemption_changes_nothing(tiny: Any) -> None:
    path, prompts, expected = tiny
    engine = Engine(model=str(path), max_model_len=160, num_gpu_blocks_override=20)
    assert engine.generate(prompts, TINY_GREEDY) == expected
    assert engine.status().num_preemptions > 0 or windows_spare(engine)
    engine.close()


def test_seeded_draws_from_the_whole_vocabulary_survive_what_recomputes_logits(tiny: Any) -> None:
    """Preemption and other batches: logits differ in their last bits, over a flat distribution."""
    path, prompts, _ = tiny
    params = [
        SamplingParams(temperature=1.5, seed=seed, max_tokens=NUM_TINY_TOKENS, ignore_eos=True)
        for seed in range(len(prompts))
    ]

    def drawn(**variation: Any) -> tuple[list[list[int]], bool]:
        engine = Engine(model=str(path), max_model_len=160, **variation)
        outputs = engine.generate(prompts, params)
        engine.close()
        return outputs, engine.status().num_preemptions > 0 or windows_spare(engine)

    expected, _ = drawn()
    preempted, is_preempted = drawn(num_gpu_blocks_override=20)
    assert preempted == expected and is_preempted
    alone, _ = drawn(max_num_seqs=1)
    assert alone == expected


def test_aborted_neighbours_change_nothing(tiny: Any) -> None:
    path, prompts, expected = tiny
    engine = Engine(model=str(path), max_model_len=256, max_inflight_steps=2)
    aborted = frozenset(range(0, len(prompts), 3))
    outputs = engine.generate(prompts, TINY_GREEDY, abort=aborted)
    for index, ids in enumerate(outputs):
        assert ids == (expected[index][:5] if index in aborted else expected[index])
    engine.close()


PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time",
    "Water boils at",
    "1, 2, 3, 4,",
    "The quick brown fox",
    "In 1969, humans first",
    "My favourite recipe for bread starts with",
    "SELECT name FROM",
    "Dear Sir or Madam,",
    "The opposite of hot is",
    "E = mc^2 means that",
    "Les misérables est un roman de",
    "To be, or not to be,",
    "import numpy as np\n",
    "The mitochondria is",
    "Question: What is 12 times 12?\nAnswer:",
    "A haiku about the sea:\n",
    "Photosynthesis is the process by which",
    "Roses are red,",
    "The three laws of robotics are",
    "日本の首都は",
]


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path, hf_smollm2: Any) -> Expected:
    model, tokenizer = hf_smollm2
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    engine = Engine(model=str(smollm2_path), max_model_len=512)
    outputs = engine.generate(prompts, GREEDY)
    engine.close()
    assert_greedy(model, prompts, outputs)
    return smollm2_path, prompts, outputs


@pytest.mark.model
@pytest.mark.parametrize("variation", ["chunks_of_7", "two_steps_in_flight"])
def test_smollm2_equals_transformers(smollm2: Any, variation: str) -> None:
    path, prompts, expected = smollm2
    engine = Engine(model=str(path), max_model_len=512, **VARIATIONS[variation])
    assert engine.generate(prompts, GREEDY) == expected
    begun = [ids[:NUM_TINY_TOKENS] for ids in expected]  # the prompt is what differs here
    assert engine.generate(prompts[:4], TINY_GREEDY) == begun[:4], "with a warm prefix cache"
    assert engine.generate(prompts[:1], TINY_GREEDY) == begun[:1], "alone"
    engine.close()
