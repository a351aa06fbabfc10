"""On a GPU: do families with windows, caps, sinks, wide heads or experts give the right tokens?

    python benchmarks/gpu_families.py [--only gemma3 gpt_oss …]

Small random models of each family (those that the tests make), in bf16 by CUDA graph and in plain
torch, eagerly: greedy tokens of prompts longer than the windows, computed in chunks, together and
again with a warm prefix cache, against transformers in fp32. Prints how far tokens that were taken
lie behind the best one, beside how far a random token does, and by which attention each ran; and
first how far transformers' own tokens in bf16 do, since rounding sends a token to other experts.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_parity import NUM_TOKENS, generate
from transformers import AutoModelForCausalLM, PreTrainedModel

from nanovllm.config import EngineConfig
from nanovllm.core.engine_core import EngineCore
from nanovllm.executor.inline import inline_executor
from tests.conftest import SIZES, TINY

WIDE = {"head_dim": 256}
CHANGES: dict[str, dict[str, Any]] = {  # heads as wide as those of the models that people run
    "gemma2": WIDE,
    "gemma3": WIDE,
    "gemma4": {**WIDE, "global_head_dim": 512},
    "gpt_oss": {"head_dim": 64},
    "qwen3_moe": {"head_dim": 128},
    "olmo3": {},
    "cohere2": {"head_dim": 128},
    "ministral3": {"head_dim": 128},
}
WAYS: dict[str, dict[str, Any]] = {
    "graphs": {"long_prefill_token_threshold": 48},
    "plain torch": {"attention_backend": "torch", "enforce_eager": True},
}


def save(name: str, path: Path) -> None:
    model_class, config_class, changes = TINY[name]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES | changes | CHANGES[name]))
    with torch.no_grad():
        for parameter in (*model.parameters(), *model.buffers()):
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(path)


def run_way(
    path: Path, settings: dict[str, Any], prompts: list[list[int]]
) -> tuple[list[list[int]], str]:
    """Outputs of all prompts together, then again with what is cached; and the attention."""
    config = EngineConfig.from_kwargs(
        model=str(path),
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=16,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=2**28,  # whatever else is on the card
        **settings,
    )
    executor = inline_executor(config, lambda phase, progress: None)
    info = executor.start()
    executor.allocate(info.num_blocks)
    core = EngineCore(config, executor, info)
    outputs = generate(core, prompts, 0) + generate(core, prompts, 1000)
    executor.shutdown()
    if any(len(ids) != NUM_TOKENS for ids in outputs):
        raise RuntimeError("requests failed: the log above says why")
    return outputs, "; ".join(note for note in info.notes if "ttention" in note)


@torch.inference_mode()
def gaps(
    reference: PreTrainedModel, prompts: list[list[int]], outputs: list[list[int]]
) -> tuple[float, float]:
    """Nats that a token lies behind the best one: the most of those taken, the mean of all."""
    worst, means = 0.0, []
    for prompt, ids in zip(prompts, outputs, strict=True):
        logits = reference(torch.tensor([prompt + ids], device="cuda"), use_cache=False).logits[0]
        logits = logits[len(prompt) - 1 : -1].float()
        behind = logits.amax(-1, keepdim=True) - logits
        worst = max(worst, behind.gather(1, torch.tensor(ids, device="cuda")[:, None]).max().item())
        means.append(behind.mean().item())
    return worst, sum(means) / len(means)


@torch.inference_mode()
def own_ids(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy ids of transformers in bf16, a prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation="eager"
    ).to("cuda")
    num: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS}
    outputs = []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt], device="cuda"), do_sample=False, **num)
        outputs.append(ids[0, len(prompt) :].tolist())
    return outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CHANGES, default=list(CHANGES))
    names = parser.parse_args().only
    drawn = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(3, 160, (length,), generator=drawn).tolist() for length in (5, 33, 75, 140)
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder, name)
            save(name, path)
            reference = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=torch.float32,
                attn_implementation="eager",  # others leave caps out in some versions
            ).to("cuda")
            worst, _ = gaps(reference, prompts, own_ids(path, prompts))
            print(f"{name:11} {'transformers':12} {worst:.4f} nats behind at most", flush=True)
            for way, settings in WAYS.items():
                try:
                    outputs, attention = run_way(path, settings, prompts)
                except Exception as error:  # the others are still of interest
                    print(f"{name:11} {way:12} {type(error).__name__}: {error}", flush=True)
                    continue
                worst, mean = gaps(reference, prompts * 2, outputs)
                print(
                    f"{name:11} {way:12} {worst:.4f} nats behind at most, a random token "
                    f"{mean:.3f}; {attention}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
