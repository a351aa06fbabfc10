"""On a GPU: do all paths give the right tokens? Run before any timing means something.

    python benchmarks/gpu_parity.py [--model smollm2] [--only "triton, graphs"]

Greedy answers of the real model in bf16 through every attention backend, eager and by CUDA graph,
one request at a time, all at once, and many of each at once, against transformers in fp32. Prints,
per path, how many answers are equal token for token, and how far a token that was taken lies behind
the one that fp32 would have taken (a bf16 model may choose the other side of a near tie).
"""

import argparse
from typing import Any

import torch

from nanovllm.checkpoint.locate import locate
from nanovllm.config import EngineConfig
from nanovllm.core.engine_core import EngineCore
from nanovllm.executor.inline import inline_executor
from nanovllm.frontend.tokenizer import Tokenizer
from nanovllm.protocol.messages import AddRequest
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.attention import flash_attention

TEXTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time",
    "Water boils at",
    "The quick brown fox",
    "In 1969, humans first",
    "Dear Sir or Madam,",
    "Question: What is 12 times 12?\nAnswer:",
    "Photosynthesis is the process by which",
    "The three laws of robotics are",
]
NUM_TOKENS = 48
NUM_COPIES = 27  # of each text, so that decoding takes the way of many rows
PATHS: dict[str, dict[str, Any]] = {
    "torch, eager": {"attention_backend": "torch", "enforce_eager": True},
    "triton, eager": {"attention_backend": "triton", "enforce_eager": True},
    "triton, graphs": {"attention_backend": "triton"},
    "triton, graphs, chunks of 16": {
        "attention_backend": "triton",
        "long_prefill_token_threshold": 16,
    },
    "triton, graphs, fp8 cache": {"attention_backend": "triton", "kv_cache_dtype": "fp8"},
    "flash_attn, graphs": {"attention_backend": "flash_attn"},
    "flash_attn, eager, chunks of 16": {
        "attention_backend": "flash_attn",
        "enforce_eager": True,
        "long_prefill_token_threshold": 16,
    },
}


def generate(core: EngineCore, prompts: list[list[int]], start: int) -> list[list[int]]:
    """Greedy ids of all prompts at once."""
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    outputs: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts, start):
        outputs[number] = []
        core.add(0, AddRequest(number, prompt, params))
    while core.busy:
        step = core.step()
        if step is not None:
            for sequence, token_id in zip(step.sequences, step.token_ids, strict=True):
                outputs[sequence.number].append(token_id)
    return list(outputs.values())


def run_path(model: str, settings: dict[str, Any], prompts: list[list[int]]) -> list[Any]:
    """Outputs all at once, one at a time, and many of each at once, each with a cold cache."""
    num_seqs = NUM_COPIES * len(prompts)
    config = EngineConfig.from_kwargs(
        model=model, dtype="bfloat16", max_model_len=1024, max_num_seqs=num_seqs, **settings
    )
    executor = inline_executor(config, lambda phase, progress: None)
    info = executor.start()
    executor.allocate(info.num_blocks)
    core = EngineCore(config, executor, info)
    together = generate(core, prompts, 0)
    core.reset_prefix_cache()
    apart = [generate(core, [prompt], 1000 + i)[0] for i, prompt in enumerate(prompts)]
    core.reset_prefix_cache()
    crowd = generate(core, prompts * NUM_COPIES, 2000)
    executor.shutdown()
    return [together, apart, crowd]


def compare(
    name: str, got: list[list[int]], reference: Any, prompts: list[list[int]]
) -> tuple[int, float]:
    """Number of equal answers, and the largest gap at a first difference."""
    num_equal, worst = 0, 0.0
    for prompt, ids in zip(prompts, got, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + ids], device="cuda")).logits[0].float()
        logprobs = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
        chosen = logprobs.gather(1, torch.tensor(ids, device="cuda")[:, None])[:, 0]
        gaps = logprobs.amax(-1) - chosen
        num_equal += bool((gaps == 0).all())
        # Each of our tokens against the reference's best after the same tokens.
        worst = max(worst, gaps.max().item())
    print(f"{name:45s} {num_equal}/{len(got)} greedy for fp32, largest gap {worst:.4f} nats")
    return num_equal, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", choices=PATHS, nargs="+", default=list(PATHS), help="these paths")
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM

    path = locate(arguments.model).path
    where = {"gguf_file": path.name} if path.is_file() else {}
    root = path.parent if path.is_file() else path
    reference = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32, **where)
    reference.to("cuda")
    tokenizer = Tokenizer.load(arguments.model)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    flash_attention.MIN_TOKENS = 2  # the package is to see all prompts, however short
    for name in arguments.only:
        if name.startswith("flash_attn") and flash_attention.installed_package() is None:
            print(f"{name}: neither flash-attn-4 nor flash-attn is installed")
            continue
        together, apart, crowd = run_path(arguments.model, PATHS[name], prompts)
        compare(f"{name}, together", together, reference, prompts)
        compare(f"{name}, one by one", apart, reference, prompts)
        compare(f"{name}, {NUM_COPIES} of each", crowd, reference, prompts * NUM_COPIES)
        same = sum(a == b for a, b in zip(together, apart, strict=True))
        print(f"{'':45s} {same}/{len(prompts)} the same together and one by one")


if __name__ == "__main__":
    main()
