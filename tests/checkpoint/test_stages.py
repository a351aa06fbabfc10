"""Which layers stages own, and where the keys of those lie."""

from typing import Any

import pytest

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.kv_layout import kv_layout
from nanovllm.checkpoint.spec import DecoderSpec, count_parameters
from nanovllm.checkpoint.stages import part_of, stages_of, whole


def spec_of(num_layers: int, **changes: Any) -> DecoderSpec:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 160,
        "max_position_embeddings": 512,
    }
    return spec_from_config(config | changes)


GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "head_dim": 16, "sliding_window": 16}
# As E2B: layers from the 15th on attend to keys of the 14th and 15th.
GEMMA4 = {
    "architectures": ["Gemma4ForCausalLM"],
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 16,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
    "num_kv_shared_layers": 20,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 160,
}


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "lengths"),
    [(8, 1, [8]), (8, 2, [4, 4]), (9, 2, [5, 4]), (30, 4, [8, 8, 7, 7]), (3, 3, [1, 1, 1])],
)
def test_stages_are_as_even_as_can_be(num_layers: int, num_stages: int, lengths: list[int]) -> None:
    stages = stages_of(spec_of(num_layers), num_stages)
    assert [len(stage.layers) for stage in stages] == lengths
    assert [layer for stage in stages for layer in stage.layers] == list(range(num_layers))
    assert [stage.is_first for stage in stages].index(True) == 0
    assert [stage.is_last for stage in stages] == [False] * (num_stages - 1) + [True]


def test_layers_stay_with_the_keys_that_they_attend_to() -> None:
    spec = spec_of(35, **GEMMA4)
    first, second = stages_of(spec, 2)
    assert (first.layers, second.layers) == (range(13), range(13, 35))
    part = part_of(spec, second)
    sources = {layer.keys_of for layer in part.layers if layer.keys_of is not None}
    assert sources == {0, 1} and part.layers[0].keys_of is None


def test_more_stages_than_can_be_are_refused_with_how_many_can() -> None:
    told = (
        r"pipeline_parallel_size: LlamaForCausalLM with 3 layers cannot .* 4 stages: use at most 3"
    )
    with pytest.raises(ValueError, match=told):
        stages_of(spec_of(3), 4)
    told = r"with 35 layers, some of which share keys and values, cannot .* use at most 14"
    with pytest.raises(ValueError, match=told):
        stages_of(spec_of(35, **GEMMA4), 15)


def test_parts_have_the_weights_of_the_whole_once() -> None:
    spec = spec_of(9, tie_word_embeddings=True)
    parts = [count_parameters(part_of(spec, stage)) for stage in stages_of(spec, 3)]
    every = count_parameters(spec)
    assert sum(part["mlp"] for part in parts) == every["mlp"]
    assert sum(part["attention"] for part in parts) == every["attention"]
    assert [stage.holds_embedding(spec) for stage in stages_of(spec, 3)] == [True, False, True]


@pytest.mark.parametrize("num_stages", [2, 3, 5])
@pytest.mark.parametrize("family", [GEMMA3, GEMMA4])
def test_stages_have_the_block_tables_of_the_model_and_room_for_their_own_layers(
    family: dict[str, Any], num_stages: int
) -> None:
    spec = spec_of(35, **family)
    layout = kv_layout(spec)
    parts = [kv_layout(spec, stage=stage) for stage in stages_of(spec, num_stages)]
    assert {part.windows for part in parts} == {layout.windows}
    for number, group in enumerate(layout.groups):
        own = [layer for part in parts for layer in part.groups[number].layers]
        assert all(spec.layers[layer].attention.window == group.window for layer in own)
    with_keys = sorted(layer for part in parts for group in part.groups for layer in group.layers)
    assert with_keys == [at for at, layer in enumerate(spec.layers) if layer.keys_of is None]
    # Memory is shared out about as evenly as layers are.
    assert sum(part.layers_per_block for part in parts) <= layout.layers_per_block + num_stages - 1
    assert kv_layout(spec, stage=whole(spec)) == layout
