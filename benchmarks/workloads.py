"""The workloads every engine is measured on, and the least time they could take.

A workload is (prompt token ids, output lengths); generation ignores EOS, so every engine does the
same work. `floor_seconds` is a roofline: the bytes and operations no engine can avoid.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

Workload = tuple[list[list[int]], list[int]]
H200_BYTES_PER_S = 4.3e12  # measured by a large copy, reads and writes counted
H200_FLOP_PER_S = 790e12  # measured by a large bf16 product on random data
MXFP4_BYTES = 17 / 32  # half a byte each, and a scale for 32
NUM_IDS = 10_000  # prompts draw their ids from [0, NUM_IDS]


def mixed(num_requests: int) -> Workload:
    """nano-vllm's benchmark: 100–1024 tokens in, 100–1024 out, one stream of random numbers."""
    rng = Random(0)
    prompts = [
        [rng.randint(0, NUM_IDS) for _ in range(rng.randint(100, 1024))]
        for _ in range(num_requests)
    ]
    return prompts, [rng.randint(100, 1024) for _ in range(num_requests)]


def fixed(num_requests: int, num_in: int, num_out: int) -> Workload:
    """All requests of one shape."""
    rng = Random(1)
    prompts = [[rng.randint(0, NUM_IDS) for _ in range(num_in)] for _ in range(num_requests)]
    return prompts, [num_out] * num_requests


def shared_prefix(num_requests: int, num_shared: int, num_in: int, num_out: int) -> Workload:
    """Requests that begin alike and then differ."""
    rng = Random(2)
    prefix = [rng.randint(0, NUM_IDS) for _ in range(num_shared)]
    prompts = [
        prefix + [rng.randint(0, NUM_IDS) for _ in range(num_in)] for _ in range(num_requests)
    ]
    return prompts, [num_out] * num_requests


def skewed(num_requests: int) -> Workload:
    """As people ask: log-normal prompts (median 400 tokens), exponential outputs (mean 200)."""
    rng = Random(3)
    lengths = [
        (min(max(int(rng.lognormvariate(6, 0.9)), 8), 3000), int(rng.expovariate(1 / 200)))
        for _ in range(num_requests)
    ]
    prompts = [[rng.randint(0, NUM_IDS) for _ in range(num_in)] for num_in, _ in lengths]
    return prompts, [min(max(num_out, 4), 1000) for _, num_out in lengths]


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "nano256": lambda: mixed(256),
    "nano1024": lambda: mixed(1024),
    "decode_bs1": lambda: fixed(1, 128, 512),
    "decode_bs3": lambda: fixed(3, 128, 512),
    "decode_bs8": lambda: fixed(8, 128, 512),
    "decode_bs64": lambda: fixed(64, 128, 512),
    "prefill": lambda: fixed(64, 4096 - 8, 1),
    "prefix": lambda: shared_prefix(256, 2048, 64, 64),
    "pages32": lambda: fixed(32, 900, 300),
    "short128": lambda: fixed(128, 64, 256),
    "long1": lambda: fixed(1, 16_384, 1),
    "long8": lambda: fixed(8, 16_000, 64),
    "skewed600": lambda: skewed(600),
}


def longest(workload: Workload) -> int:
    """Tokens of its longest request, prompt and output."""
    return max(len(prompt) + count for prompt, count in zip(*workload, strict=True))


# What requests may ask of their sampling, in the fields that both engines have.
ASKS: dict[str, dict[str, Any]] = {
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5},
    "logprobs": {"logprobs": 5},
    "bias": {"logit_bias": {token_id: 2.0 for token_id in range(100, 120)}},
    "min_tokens": {"min_tokens": 200, "stop_token_ids": [1, 2, 3]},
    "allowed": {"allowed_token_ids": list(range(0, NUM_IDS, 3))},
    "bad_words": {"bad_words": ["the", "and so on", "of course", "a"]},
    "top": {"top_p": 0.9, "top_k": 50},
    "regex": {"regex": r"([a-z]{1,9} ){500}"},
    "schema": {
        "json": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 40},
                "city": {"type": "string", "maxLength": 40},
                "age": {"type": "integer", "minimum": 0, "maximum": 120},
                "tags": {
                    "type": "array",
                    "items": {"type": "string", "maxLength": 20},
                    "minItems": 2,
                    "maxItems": 5,
                },
                "married": {"type": "boolean"},
            },
            "required": ["name", "city", "age", "tags", "married"],
            "additionalProperties": False,
        }
    },
    "prompt_logprobs": {"prompt_logprobs": 1},
}
GRAMMARS = {"json", "regex"}  # fields of a request's structured outputs
TEXTS = {"bad_words"}  # fields that are texts, for which a tokenizer is needed


@dataclass(frozen=True)
class Asking:
    """64 requests, so many of which ask for `fields` besides; they end where these say.

    is_free: the outputs' lengths are up to the grammar.
    """

    num_asking: int
    fields: dict[str, Any]
    num_in: int = 128
    num_out: int = 256

    @property
    def is_free(self) -> bool:
        return not GRAMMARS.isdisjoint(self.fields)

    @property
    def needs_tokenizer(self) -> bool:
        return self.is_free or not TEXTS.isdisjoint(self.fields)

    @property
    def workload(self) -> Workload:
        return fixed(64, self.num_in, self.num_out)


def asking(name: str) -> Asking | None:
    """`ask_one_X` and `ask_all_X` for X of `ASKS`, `ask_nobody`, `ask_eight_schema`; None for the
    names of `WORKLOADS`."""
    if name == "ask_nobody":
        return Asking(0, {})
    match name.split("_", 2):
        case ["ask", "one" | "eight" | "all" as who, what] if what in ASKS:
            count = {"one": 1, "eight": 8, "all": 64}[who]
            if what == "prompt_logprobs":
                return Asking(count, ASKS[what], num_in=1000, num_out=16)
            return Asking(count, ASKS[what])
    return None


def first_requests(name: str) -> Workload | None:
    """`first_1`, `first_8`, `first_64`: what is asked twice, the first time right after the start.
    None for other names."""
    match name.split("_"):
        case ["first", count] if count.isdecimal():
            return fixed(int(count), 128, 256)
    return None


def keeps_cache(name: str) -> bool:
    """Whether a workload is measured with a warm prefix cache; all others start cold."""
    return name == "prefix"


def mlp_weights(config: dict[str, Any], num_tokens: int) -> float:
    """Parameters of a layer's MLP that a step of so many tokens reads; of its experts those that
    are hit, if routers send tokens to all alike."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    num_experts = config.get("num_experts", config.get("num_local_experts"))
    if num_experts is None:
        return 3 * hidden * inner
    missed = (1 - config["num_experts_per_tok"] / num_experts) ** num_tokens
    inner = config.get("moe_intermediate_size", inner)
    return num_experts * hidden + num_experts * (1 - missed) * 3 * hidden * inner


def floor_seconds(
    config: dict[str, Any], workload: Workload, *, layer_bytes: float = 2, kv_bytes: float = 2
) -> float:
    """Weights once per decode step + all KV once per token, at memory speed; prefill at peak rate.

    config: a Hugging Face config.json. layer_bytes, kv_bytes: per number in the layers' weights
    and the KV cache; 1 is FP8, whose products run twice as fast. Every sequence decodes from the
    first step on.
    """
    prompts, num_out = workload
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["head_dim"]
    attention = hidden * (heads + 2 * kv_heads) * head_dim + heads * head_dim * hidden
    is_mxfp4 = (config.get("quantization_config") or {}).get("quant_method") == "mxfp4"
    mlp_bytes = MXFP4_BYTES if is_mxfp4 else layer_bytes
    ends = sorted(num_out)
    weight_bytes = 0.0
    for start, end in pairwise([0, *ends]):  # steps in which the same sequences are left
        num_alive = len(ends) - bisect_right(ends, start)
        layer = attention * layer_bytes + mlp_weights(config, num_alive) * mlp_bytes
        weight_bytes += (end - start) * (layers * layer + config["vocab_size"] * hidden * 2)
    kv_bytes_per_token = layers * 2 * kv_heads * head_dim * kv_bytes
    num_kv_reads = sum(
        len(prompt) * count + count * (count - 1) // 2
        for prompt, count in zip(prompts, num_out, strict=True)
    )
    # Two operations per weight and token; FP8 does them in the time of one.
    linear = layers * (attention + mlp_weights(config, 1))
    prefill_flop = sum(
        linear * layer_bytes * len(prompt) + 2 * layers * heads * head_dim * len(prompt) ** 2
        for prompt in prompts
    )
    memory_s = (weight_bytes + num_kv_reads * kv_bytes_per_token) / H200_BYTES_PER_S
    return memory_s + prefill_flop / H200_FLOP_PER_S
