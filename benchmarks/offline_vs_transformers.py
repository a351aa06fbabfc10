"""The same mixed-length requests through transformers with static batches, and through nanovllm.

    python benchmarks/offline_vs_transformers.py

Same machine, model, precision and greedy choice; EOS ignored, so both do all the work asked for.
transformers takes left-padded batches in order of arrival, and each ends with its longest request;
only tokens that were asked for count as useful. The two take turns, so that a change in the
machine's load meets both; of each the best round is compared.
"""

import argparse
import random
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from nanovllm import LLM, SamplingParams
from nanovllm.checkpoint.locate import locate

FIRST_ID = 3  # leaves out special tokens
MAX_MODEL_LEN = 1024
PROMPT_LENGTHS, OUTPUT_LENGTHS = (16, 256), (16, 192)


@dataclass(frozen=True)
class Request:
    prompt_token_ids: list[int]
    num_output_tokens: int


def requests(count: int, vocab_size: int) -> list[Request]:
    rng = random.Random(0)
    return [
        Request(
            [rng.randrange(FIRST_ID, vocab_size) for _ in range(rng.randint(*PROMPT_LENGTHS))],
            rng.randint(*OUTPUT_LENGTHS),
        )
        for _ in range(count)
    ]


def load_transformers(model: str, dtype: str) -> Any:
    checkpoint = locate(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = getattr(torch, dtype)
    if checkpoint.format == "gguf":
        loaded = AutoModelForCausalLM.from_pretrained(
            checkpoint.path.parent, gguf_file=checkpoint.path.name, dtype=precision
        )
    else:
        loaded = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=precision)
    return loaded.eval().to(device)


def run_transformers(model: Any, batch: list[Request]) -> list[list[int]]:
    """One static batch: as long as its longest prompt, for as long as its longest output."""
    width = max(len(request.prompt_token_ids) for request in batch)
    num_steps = max(request.num_output_tokens for request in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)  # [batch, width]
    mask = torch.zeros_like(ids)
    for row, request in enumerate(batch):
        ids[row, width - len(request.prompt_token_ids) :] = torch.tensor(request.prompt_token_ids)
        mask[row, width - len(request.prompt_token_ids) :] = 1
    with torch.inference_mode():
        outputs = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=False,
            min_new_tokens=num_steps,
            max_new_tokens=num_steps,
            pad_token_id=0,
        )
    new = outputs[:, width:].tolist()
    return [row[: request.num_output_tokens] for row, request in zip(new, batch, strict=True)]


def run_nanovllm(llm: LLM, batch: list[Request]) -> list[list[int]]:
    llm.reset_prefix_cache()  # the rounds repeat their prompts
    params = [
        SamplingParams(
            temperature=0, max_tokens=request.num_output_tokens, ignore_eos=True, detokenize=False
        )
        for request in batch
    ]
    prompts = [{"prompt_token_ids": request.prompt_token_ids} for request in batch]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8, help="of transformers")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()

    reference = load_transformers(arguments.model, arguments.dtype)
    work = requests(arguments.num_prompts, reference.config.vocab_size)
    batches = [
        work[at : at + arguments.batch_size] for at in range(0, len(work), arguments.batch_size)
    ]
    num_useful = sum(request.num_output_tokens for request in work)
    print(
        f"{len(work)} requests, {sum(len(r.prompt_token_ids) for r in work)} tokens in, "
        f"{num_useful} out, {arguments.dtype}, {torch.get_num_threads()} threads, greedy"
    )
    best = {"transformers": float("inf"), "nanovllm": float("inf")}
    outputs: dict[str, list[list[int]]] = {}
    with LLM(
        arguments.model,
        skip_tokenizer_init=True,
        dtype=arguments.dtype,
        max_model_len=MAX_MODEL_LEN,
    ) as llm:
        engines = {
            "transformers": lambda: [
                ids for b in batches for ids in run_transformers(reference, b)
            ],
            "nanovllm": lambda: run_nanovllm(llm, work),
        }
        run_transformers(reference, work[:2])  # warm-up
        run_nanovllm(llm, work[:2])
        for _ in range(arguments.rounds):
            for name, run in engines.items():
                started = time.perf_counter()
                outputs[name] = run()
                seconds = time.perf_counter() - started
                best[name] = min(best[name], seconds)
                print(f"{name:13s} {seconds:7.2f} s {num_useful / seconds:8.1f} useful tokens/s")
    same = sum(a == b for a, b in zip(*outputs.values(), strict=True))
    print(
        f"nanovllm is {best['transformers'] / best['nanovllm']:.2f} times as fast; "
        f"{same} of {len(work)} outputs are identical"
    )


if __name__ == "__main__":
    main()
