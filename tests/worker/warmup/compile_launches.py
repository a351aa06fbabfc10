"""Compile for Hopper, without a GPU, every Triton kernel that steps of a model launch.

`python tests/worker/warmup/compile_launches.py` runs steps on CPU tensors with a driver that knows
a target but no device: a launch compiles, with the very arguments and options it would have had,
and does nothing else. Prints a JSON object: kernel → number of variants. A failure to compile
raises.
"""

import json
from collections import Counter
from typing import Any

import torch
from msgspec.structs import replace
from triton.runtime.jit import JITFunction

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.quantization import (
    AT_LOAD,
    GGUF_FORMATS,
    Rule,
    Scheme,
    choose_scheme,
)
from nanovllm.checkpoint.spec import DecoderSpec
from nanovllm.config import SchedulerConfig
from nanovllm.protocol.plan import StepPlan
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker import model_runner
from nanovllm.worker.attention.select import attention_specs
from nanovllm.worker.cuda_graph import StepGraphs, StepOutput, StepShape, Variant
from nanovllm.worker.forward_batch import ForwardBatch, StagedPlan, expand_view
from nanovllm.worker.kernels.base import Residual
from nanovllm.worker.kernels.triton import expand_batch
from nanovllm.worker.kernels.triton.exchange import Exchange
from nanovllm.worker.kernels.triton.gated_linear import MIN_TOKENS
from nanovllm.worker.kernels.triton.launch import Gpu
from nanovllm.worker.kernels.triton.row_exchange import RowExchange, bytes_of
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.model_runner import ModelRunner
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.warmup import dummy_steps
from nanovllm.worker.warmup.triton_precompile import leave_launches_out, runner_without_weights

CPU = torch.device("cpu")
NUM_ROWS, MAX_MODEL_LEN, BLOCK_SIZE = 280, 640, 16
LIMITS = SchedulerConfig(max_num_seqs=NUM_ROWS).limits("cuda")
SPEC = spec_from_config(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 4000,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": MAX_MODEL_LEN,
        "tie_word_embeddings": True,
    }
)
MOE_SPEC = spec_from_config(
    {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 4000,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "moe_intermediate_size": 768,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": MAX_MODEL_LEN,
    }
)
# Soft caps, windows and sinks in every kernel of attention; four norms, heads of 256.
CAPPED_SPEC = spec_from_config(
    {
        "architectures": ["Gemma2ForCausalLM"],
        "vocab_size": 4000,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 128,
        "max_position_embeddings": MAX_MODEL_LEN,
    }
)
CAPPED_SPEC = replace(
    CAPPED_SPEC,
    layers=tuple(
        replace(layer, attention=replace(layer.attention, sinks=True))
        for layer in CAPPED_SPEC.layers
    ),
)
OSS_SPEC = spec_from_config(
    {
        "architectures": ["GptOssForCausalLM"],
        "vocab_size": 4000,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_local_experts": 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_MODEL_LEN,
    }
)
MXFP4 = choose_scheme(None, {"quantization_config": {"quant_method": "mxfp4"}})
PLAIN, TRUNCATING = SamplingParams(temperature=0.5), SamplingParams(temperature=0.5, top_p=0.9)


class UncapturedGraphs(StepGraphs):
    """Every step as a graph would have it, without one."""

    def run(self, shape: StepShape, variant: Variant) -> StepOutput:
        return self._step(shape, variant)


def compile_instead_of_launching() -> Counter[str]:
    """From now on. The result counts the variants of each kernel as they come."""
    leave_launches_out(Gpu((9, 0), 132))
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    model_runner.StepGraphs = UncapturedGraphs
    launch, found, seen = JITFunction.run, Counter[str](), set[str]()

    def count(self: Any, *args: Any, **options: Any) -> Any:
        kernel = launch(self, *args, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            found[self.fn.__name__] += 1
        return kernel

    JITFunction.run = count
    return found


def expand_after_all(staged: StagedPlan, rows: RequestRows) -> ForwardBatch:
    """The kernel compiles; plain torch fills in ids that the embedding can look up."""
    expand_batch.expand_view(staged, rows)
    return expand_view(staged, rows)


def make_runner(
    scheme: Scheme | None = None, kv_dtype: torch.dtype | None = None, *, spec: DecoderSpec = SPEC
) -> ModelRunner:
    """A model as wide as Qwen3-0.6B, of two layers and few tokens, with nothing in its weights."""
    specs = attention_specs(
        spec, block_size=BLOCK_SIZE, dtype=torch.bfloat16, device=CPU, kv_dtype=kv_dtype
    )
    return runner_without_weights(spec, specs, LIMITS, scheme=scheme, expand=expand_after_all)


def run_steps(runner: ModelRunner, params: SamplingParams, *sizes: tuple[int, int]) -> None:
    """Steps of so many entries, with so many tokens each."""
    for num_entries, num_tokens in sizes:
        dummy_steps.run_step(runner, LIMITS, params, counts=[num_tokens] * num_entries)


def run_sharing_step(runner: ModelRunner) -> None:
    """Rows whose blocks are all the same."""
    runner._rows.host_block_tables[:] = 1
    entries = list(range(NUM_ROWS))
    starts, counts = [600] * NUM_ROWS, [1] * NUM_ROWS
    runner.execute(StepPlan(0, [], [], entries, starts, counts, entries))


def run_mlp(runner: ModelRunner, *, num_tokens: int) -> None:
    """As a layer would that is not the last, where few tokens are wanted."""
    mlp = runner._model.layers[0].mlp
    residual = Residual(torch.zeros(num_tokens, 1024, dtype=torch.bfloat16))
    mlp.forward(residual, next_norm=mlp.norms.pre)


def run_sums() -> None:
    """Of two ranks, few tokens and many."""
    addresses, epochs = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 64, dtype=torch.int32)
    for num_tokens in (1, 8, 64):
        partial = torch.zeros(num_tokens, 4096, dtype=torch.bfloat16)
        exchange = Exchange(0, addresses, epochs, None)
        exchange.reduce(partial)
        exchange.reduce_add(partial, torch.zeros_like(partial), partial[0])
        exchange.reduce_normed(partial, torch.zeros_like(partial), RMSNorm(partial[0], 1e-6))
    like = torch.zeros(4096, dtype=torch.bfloat16)
    memories = [torch.zeros(bytes_of(2, like, 4096), dtype=torch.uint8) for _ in range(2)]
    rows = RowExchange.over(0, memories, like, max_tokens=4096, fewest=64)
    for num_tokens in (70, 4096):
        residual = torch.zeros(num_tokens // 2, 4096, dtype=torch.bfloat16)
        rows.add_normed(residual, RMSNorm(like, 1e-6), num_tokens)


@torch.inference_mode()
def main() -> None:
    found = compile_instead_of_launching()
    runner = make_runner()
    run_steps(runner, PLAIN, (1, 1), (8, 1), (24, 1), (48, 1), (NUM_ROWS, 1), (2, 60))
    run_steps(runner, TRUNCATING, (1, 1))
    run_sharing_step(runner)
    for num_tokens in (MIN_TOKENS, 2 * MIN_TOKENS):
        run_mlp(runner, num_tokens=num_tokens)
    fp8 = make_runner(Scheme.at_load("fp8"), torch.float8_e4m3fn)
    run_steps(fp8, PLAIN, (1, 1), (8, 1), (2, 60))
    packed = make_runner(Scheme.at_load("int4"))
    run_steps(packed, PLAIN, (1, 1), (8, 1), (NUM_ROWS, 1), (2, 600))
    for kept in (AT_LOAD["int8"], GGUF_FORMATS["Q4_K"], GGUF_FORMATS["Q6_K"]):
        rules = Rule(kept), Rule(kept, ("model.embed_tokens",))  # which is the head, too
        run_steps(make_runner(Scheme(rules)), PLAIN, (1, 1), (8, 1))
    for spec, scheme in ((MOE_SPEC, None), (MOE_SPEC, Scheme.at_load("fp8")), (OSS_SPEC, MXFP4)):
        experts = make_runner(scheme, spec=spec)
        run_steps(experts, PLAIN, (1, 1), (8, 1), (100, 1), (2, 60))
    capped = make_runner(spec=CAPPED_SPEC)
    run_steps(capped, PLAIN, (1, 1), (8, 1), (NUM_ROWS, 1), (2, 60))
    run_sharing_step(capped)
    run_sums()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
