"""What a plan adds up to, whether it fits, and what the user is told when it does not."""

from dataclasses import replace

import msgspec
import pytest

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.kv_layout import kv_layout, undivided
from nanovllm.checkpoint.model_size import ModelSize
from nanovllm.checkpoint.spec import count_parameters
from nanovllm.config import CacheConfig, SchedulerConfig
from nanovllm.plan.memory_plan import (
    CPU_MAX_BYTES,
    GIB,
    Machine,
    MemoryPlan,
    cpu_memory_budget,
    explain,
    fit_blocks,
    free_memory,
    remedies,
)
from nanovllm.plan.precision import Precision

# Qwen3-8B
SPEC = spec_from_config(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "vocab_size": 151936,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
)
SIZE = ModelSize(
    spec=SPEC,
    parameters={
        "embedding": 151936 * 4096,
        "attention": 36 * 4096 * 128 * 80,
        "mlp": 36 * 3 * 4096 * 12288,
        "norms": 73 * 4096,
        "head": 151936 * 4096,
    },
    source="config.json",
)


def make_plan(gib: float = 139.8, *, max_model_len: int = 40960, **changes: object) -> MemoryPlan:
    plan = MemoryPlan(
        size=SIZE,
        machine=Machine(
            name="a GPU", memory_bytes=int(gib * GIB), taken_bytes=GIB // 2, is_gpu=True
        ),
        precision=Precision.of("bfloat16"),
        cache=CacheConfig(),
        limits=SchedulerConfig().limits("cuda"),
        max_model_len=max_model_len,
    )
    return replace(plan, **changes)  # type: ignore[arg-type]


def test_parts_add_up_to_the_budget() -> None:
    plan = make_plan()
    assert sum(plan.weight_bytes.values()) == 2 * SIZE.num_parameters
    assert plan.bytes_per_token == 2 * 36 * 8 * 128 * 2
    assert plan.budget_bytes == int(int(139.8 * GIB) * 0.92) - GIB // 2
    left = plan.budget_bytes - plan.fixed_bytes - plan.kv_cache_bytes
    assert 0 <= left < plan.bytes_per_block
    assert plan.fits and plan.longest_that_fits == 40960


def test_sequences_take_whole_blocks() -> None:
    plan = make_plan(cache=CacheConfig(num_gpu_blocks_override=1 + 10))
    assert plan.num_kv_tokens == 160
    assert (plan.num_sequences(16), plan.num_sequences(17), plan.num_sequences(161)) == (10, 5, 0)


def test_never_more_kv_than_the_sequences_can_fill() -> None:
    plan = make_plan(max_model_len=256, limits=SchedulerConfig(max_num_seqs=2).limits("cuda"))
    assert plan.num_blocks == 1 + 2 * 16


GEMMA = {
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "sliding_window": 1024,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
}


def test_layers_with_a_window_pay_for_what_is_in_it() -> None:
    size = replace(SIZE, spec=spec_from_config(GEMMA))
    plan = make_plan(size=size, max_model_len=32768)
    whole = replace(plan, layout=undivided(size.spec))
    assert kv_layout(size.spec).windows.count(1024) == 6  # 52 layers, 10 in a block as are full
    assert plan.bytes_per_token == whole.bytes_per_token
    assert plan.bytes_per_block * 62 == whole.bytes_per_block * 10
    # 7 groups of 2048 blocks would be as many bytes as 70 layers; of 6 a window's blocks are left.
    assert plan.blocks_for(32768) == 2048 + 6 * ((1024 + 8192 - 3) // 16 + 2)
    assert plan.num_sequences(32768) > 4.5 * whole.num_sequences(32768)
    assert plan.num_sequences(512) <= whole.num_sequences(512)


QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}


def test_a_token_passes_through_few_experts() -> None:
    spec = spec_from_config(QWEN3_30B)
    size = ModelSize(spec=spec, parameters=count_parameters(spec), source="config.json")
    plan = make_plan(size=size)
    assert 30.5e9 < size.num_parameters < 30.6e9
    assert 3.3e9 < plan.num_active_parameters < 3.4e9  # "A3B", with both ends of the model
    embedding = 151936 * 2048
    assert plan.active_bytes == 2 * (plan.num_active_parameters - embedding)
    assert make_plan().num_active_parameters == SIZE.num_parameters


def test_fp8_halves_what_it_applies_to() -> None:
    plan, fp8 = (
        make_plan(precision=Precision(dtype="bfloat16", linear_bytes=size, kv_bytes=size))
        for size in (2, 1)
    )
    for group in ("attention", "mlp"):
        assert fp8.weight_bytes[group] * 2 == plan.weight_bytes[group]
    assert fp8.weight_bytes["head"] == plan.weight_bytes["head"]
    assert fp8.bytes_per_token * 2 == plan.bytes_per_token


def test_ranks_share_weights_and_heads() -> None:
    one, four = make_plan(), make_plan(num_ranks=4)
    assert four.bytes_per_token * 4 == one.bytes_per_token
    assert four.weight_bytes["mlp"] * 4 == one.weight_bytes["mlp"]
    assert four.weight_bytes["norms"] == one.weight_bytes["norms"]
    assert make_plan(num_ranks=16).bytes_per_token * 8 == one.bytes_per_token


def test_ranks_with_whole_experts_hold_as_much_of_them() -> None:
    """Of 6 experts one of 4 ranks has 2; what a token takes of one is not shared any more."""
    spec = spec_from_config(QWEN3_30B | {"num_experts": 6, "num_experts_per_tok": 2})
    size = ModelSize(spec=spec, parameters=count_parameters(spec), source="")
    one, cut = (make_plan(size=size, num_ranks=ranks) for ranks in (1, 4))
    two, four = (make_plan(size=size, num_ranks=n, spreads_experts=True) for n in (2, 4))
    experts = 2 * 48 * 6 * 3 * 2048 * 768
    assert two.weight_bytes["mlp"] * 2 == one.weight_bytes["mlp"]
    assert four.weight_bytes["mlp"] - cut.weight_bytes["mlp"] == experts // 3 - experts // 4
    few = SchedulerConfig(max_num_seqs=8).limits("cuda")  # so that experts are the heaviest part
    cut, four = replace(cut, limits=few), replace(four, limits=few)
    more = 8192 * 2 * 768 * 3 // 4  # of what lies between the products, in each of two experts
    assert four.activation_bytes - cut.activation_bytes == 2 * more
    assert four.most_experts(spec.layers[0].mlp) == 2
    for group in ("attention", "embedding", "norms"):
        assert four.weight_bytes[group] == cut.weight_bytes[group]


def test_a_cpu_multiplies_by_a_copy_of_a_tied_embedding() -> None:
    tied = msgspec.structs.replace(SPEC, tied_embeddings=True)
    size = replace(SIZE, spec=tied, parameters={**SIZE.parameters, "head": 0})
    cpu = Machine(name="here", memory_bytes=64 * GIB, taken_bytes=0, is_gpu=False)
    assert make_plan(size=size).weight_bytes["head"] == 0
    plan = make_plan(size=size, machine=cpu)
    assert plan.weight_bytes["head"] == plan.weight_bytes["embedding"]
    assert plan.kv_cache_bytes <= CPU_MAX_BYTES and plan.graph_bytes == 0


def test_what_would_do_really_would() -> None:
    plan = make_plan(20.0)
    assert not plan.fits
    longest = plan.longest_that_fits
    assert 256 <= longest < 40960
    assert f"max_model_len={longest}" in remedies(plan)
    assert replace(plan, max_model_len=longest).fits
    assert not replace(plan, max_model_len=longest + 16).fits
    enough = replace(plan.machine, memory_bytes=plan.needed_bytes)
    assert replace(plan, machine=enough).fits
    less = replace(plan.machine, memory_bytes=plan.needed_bytes - GIB // 64)
    assert not replace(plan, machine=less).fits


def test_every_change_named_was_tried() -> None:
    tight = make_plan(23.8)
    assert not tight.fits
    words = explain(tight)
    assert "max_num_batched_tokens=2048, max_num_seqs=32" in words
    assert "gpu_memory_utilization=0.97" in words
    assert "15.3 for weights in bfloat16" in words and "8.19 billion parameters" in words
    hopeless = explain(make_plan(4.0))
    assert "max_num_seqs" not in hopeless and "max_model_len=" not in hopeless
    assert hopeless.endswith(f"a GPU of at least {make_plan(4.0).needed_bytes / GIB:.1f} GiB")


@pytest.mark.parametrize(
    "cache",
    [CacheConfig(kv_cache_memory_bytes=200 * GIB), CacheConfig(num_gpu_blocks_override=99999)],
)
def test_kv_asked_for_has_to_have_room(cache: CacheConfig) -> None:
    plan = make_plan(cache=cache)
    assert not plan.fits
    assert "the KV size left to be measured" in remedies(plan)


def fit(memory_bytes: int, *, max_model_len: int = 64, max_num_seqs: int = 4, **cache: int) -> int:
    return fit_blocks(
        CacheConfig(**{"block_size": 16, **cache}),
        bytes_per_block=1000,
        memory_bytes=memory_bytes,
        max_model_len=max_model_len,
        blocks_for=lambda length: -(-length // 16),
        max_num_seqs=max_num_seqs,
    )


def test_memory_decides() -> None:
    assert fit(9_999) == 9
    assert fit(5_000) == 5


def test_never_more_than_all_sequences_can_fill() -> None:
    assert fit(10**9) == 1 + 4 * 4
    assert fit(10**9, max_model_len=65, max_num_seqs=2) == 1 + 2 * 5


def test_explicit_sizes_win() -> None:
    assert fit(0, num_gpu_blocks_override=40) == 40
    assert fit(0, kv_cache_memory_bytes=30_500) == 30
    assert fit(0, kv_cache_memory_bytes=30_500, num_gpu_blocks_override=7) == 7


@pytest.mark.parametrize(
    ("memory_bytes", "cache", "most"),
    [
        (4_999, {}, 48),
        (1_500, {}, 0),
        (-5, {}, 0),
        (10**9, {"num_gpu_blocks_override": 4}, 48),
        (10**9, {"kv_cache_memory_bytes": 3_000}, 32),
    ],
)
def test_says_what_would_fit(memory_bytes: int, cache: dict[str, int], most: int) -> None:
    remedy = f"set max_model_len to at most {most}, or raise" if most else "raise"
    with pytest.raises(ValueError, match=rf"max_model_len: .* fit: {remedy} kv_cache_memory"):
        fit(memory_bytes, **cache)


def test_cpu_budget_is_bounded() -> None:
    assert cpu_memory_budget(-1) == 0
    assert 0 < cpu_memory_budget(free_memory()) <= CPU_MAX_BYTES


SMALL = spec_from_config(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
)


def test_fp8_is_no_remedy_where_copies_outweigh_it() -> None:
    """Of Qwen3-0.6B every layer is kept in bfloat16, too; neither for it as it is, nor in FP8."""
    small = ModelSize(spec=SMALL, parameters=count_parameters(SMALL), source="config.json")
    for linear_bytes in (2, 3):
        precision = Precision.of("bfloat16", linear_bytes=linear_bytes)
        found = [
            text
            for gib in (3, 5, 7)
            for text in remedies(make_plan(gib, size=small, precision=precision))
        ]
        assert any("kv_cache_dtype=fp8" in text for text in found)
        assert not any("quantization=fp8" in text for text in found)
        assert any("quantization=int4" in text for text in found) == (linear_bytes == 2)
