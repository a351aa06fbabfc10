"""Which layers are quantized, by whose wish, and what is refused."""

from typing import Any

import pytest
import torch
from msgspec.structs import replace

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.quantization import (
    OTHERS,
    Rule,
    Scheme,
    WeightFormat,
    choose_scheme,
)
from nanovllm.worker.attention.select import attention_specs, select_attention
from nanovllm.worker.kernels.torch.layer_kernels import TorchKernels
from nanovllm.worker.layers.linear import UNQUANTIZED
from nanovllm.worker.models.decoder import Decoder
from nanovllm.worker.quant.fp8 import E4M3, FP8
from nanovllm.worker.quant.select import describe
from tests.worker.quant.compressed import FLOAT8, quantization_config
from tests.worker.test_worker import TINY_LLAMA

CPU = torch.device("cpu")
PACKED4 = WeightFormat("packed", "group", bits=4, group=128, layout="compressed-tensors")
FP8_BLOCKS = WeightFormat("packed", "block", group=128, is_float=True, layout="compressed-tensors")


def make_decoder(scheme: Scheme | None = None) -> Decoder:
    spec = spec_from_config(TINY_LLAMA)
    specs = attention_specs(spec, block_size=4, dtype=torch.float32, device=CPU)
    attention, _ = select_attention("auto", specs)
    return Decoder(
        spec,
        kernels=TorchKernels(),
        attention=attention,
        dtype=torch.float32,
        device=CPU,
        scheme=scheme,
    )


def test_the_users_wish() -> None:
    assert choose_scheme(None, {}) is None
    assert choose_scheme("fp8", {}) == Scheme.at_load("fp8")


def test_the_checkpoints_own() -> None:
    config = {"quantization_config": quantization_config(ignore=["lm_head"])}
    for wanted in (None, "fp8"):
        scheme = choose_scheme(wanted, config)  # type: ignore[arg-type]
        stored = WeightFormat("fp8", "channel", layout="compressed-tensors")
        assert scheme == Scheme((Rule(stored),), ignored=("lm_head",))


WEIGHTS = {"type": "float", "num_bits": 8, "symmetric": True, "strategy": "channel"}
INTEGERS = WEIGHTS | {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 128}
BLOCKS = WEIGHTS | {"strategy": "block", "block_structure": [128, 128]}
INT_TOKENS = {"type": "int", "num_bits": 8, "symmetric": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}
FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def packed_config(**changes: Any) -> dict[str, Any]:
    form = {"format": "pack-quantized"}
    return quantization_config(weights=INTEGERS | changes, activations=None, **form)


READ: dict[str, tuple[dict[str, Any], WeightFormat]] = {
    "W4A16": (packed_config(), PACKED4),
    "W4A16, zeros": (packed_config(symmetric=False), replace(PACKED4, has_zeros=True)),
    "W8A16 by channel": (
        packed_config(num_bits=8, strategy="channel", group_size=None),
        WeightFormat("packed", "channel", layout="compressed-tensors"),
    ),
    "ordered": (packed_config(actorder="group"), replace(PACKED4, is_reordered=True)),
    "ordered while it was made": (packed_config(actorder="static"), PACKED4),
    "W8A8": (
        quantization_config(
            weights=WEIGHTS | {"type": "int"},
            activations=INT_TOKENS | {"strategy": "token", "dynamic": True},
            format="int-quantized",
        ),
        WeightFormat("int8", "channel", layout="compressed-tensors"),
    ),
    "W8A8, static": (
        quantization_config(
            weights=WEIGHTS | {"type": "int", "strategy": "tensor"},
            activations=INT_TOKENS | {"strategy": "tensor", "dynamic": False},
            format="int-quantized",
        ),
        WeightFormat("int8", "tensor", tokens="static", layout="compressed-tensors"),
    ),
    "FP8, static": (
        quantization_config(
            weights=WEIGHTS, activations=FLOAT8 | {"strategy": "tensor", "dynamic": False}
        ),
        WeightFormat("fp8", "channel", tokens="static", layout="compressed-tensors"),
    ),
    "FP8 blocks": (quantization_config(weights=BLOCKS), FP8_BLOCKS),
    "DeepSeek's FP8": (
        FP8_CONFIG | {"weight_block_size": [128, 128]},
        replace(FP8_BLOCKS, layout="fp8"),
    ),
    "AutoFP8's": (
        FP8_CONFIG | {"activation_scheme": "static"},
        WeightFormat("fp8", "tensor", tokens="static", layout="fp8"),
    ),
    "AWQ": (AWQ, replace(PACKED4, has_zeros=True, layout="awq")),
    "GPTQ": (GPTQ, replace(PACKED4, has_zeros=True, layout="gptq")),
    "GPTQ of 8 bits, all inputs": (
        GPTQ | {"bits": 8, "group_size": -1, "desc_act": True, "checkpoint_format": "gptq_v2"},
        WeightFormat("packed", "group", has_zeros=True, is_reordered=True, layout="gptq_v2"),
    ),
}


@pytest.mark.parametrize(("config", "expected"), READ.values(), ids=READ)
def test_read(config: dict[str, Any], expected: WeightFormat) -> None:
    scheme = choose_scheme(None, {"quantization_config": config})
    assert scheme is not None and scheme.is_stored
    assert scheme.format_of("model.layers.0.self_attn.q_proj") == expected
    unquantized = scheme.quantizing().format_of("model.layers.0.self_attn.q_proj")
    assert unquantized is not None and not unquantized.is_stored


def test_schemes_that_differ_by_layer() -> None:
    groups = {
        "group_0": {"weights": INTEGERS, "targets": ["re:.*mlp.*"]},
        "group_1": {
            "weights": INTEGERS | {"num_bits": 8},
            "targets": ["Linear"],
            "format": "pack-quantized",
        },
        "group_2": {
            "weights": BLOCKS,
            "input_activations": FLOAT8 | {"strategy": "group"},
            "targets": ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"],
            "format": "float-quantized",
        },
    }
    config = quantization_config(config_groups=groups, format="mixed-precision")
    groups["group_0"]["format"] = "pack-quantized"
    scheme = choose_scheme(None, {"quantization_config": config})
    assert scheme is not None
    found = scheme.format_of("model.layers.0.mlp.down_proj")
    assert found == PACKED4
    assert scheme.format_of("model.layers.0.self_attn.o_proj") == FP8_BLOCKS
    assert scheme.format_of("model.layers.1.self_attn.o_proj") == replace(PACKED4, bits=8)
    assert scheme.format_of("lm_head") is None


def test_modules_that_are_skipped() -> None:
    down, gate = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_proj"
    for config in (
        AWQ | {"modules_to_not_convert": ["down_proj", "gate"]},
        FP8_CONFIG | {"modules_to_not_convert": [down, "model.layers.0.mlp.gate"]},
        GPTQ | {"dynamic": {r"-:.*\.down_proj": {}, r"+:.*\.up_proj": {"bits": 8}}},
    ):
        scheme = choose_scheme(None, {"quantization_config": config})
        assert scheme is not None
        assert scheme.format_of(down) is None
        kept = scheme.format_of(gate)
        assert kept is not None and kept.bits == (8 if kept.method == "fp8" else 4)
    up = scheme.format_of("model.layers.0.mlp.up_proj")
    assert up is not None and up.bits == 8


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"quant_method": "exl2"}, r"\(quant_method exl2\)"),
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
    "torchao": ({"quant_method": "torchao"}, "torchao"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt"),
    "NVFP4": (quantization_config(format="nvfp4-pack-quantized"), "nvfp4"),
    "another format": (quantization_config(format="marlin-24"), "format marlin-24"),
    "sparse": (
        quantization_config(sparsity_config={"format": "sparse-24-bitmask"}),
        "sparse weights",
    ),
    "calibrated cache": (quantization_config(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    "no groups": (quantization_config(config_groups={}), "without config_groups"),
    "int8 in another format": (
        quantization_config(weights=WEIGHTS | {"type": "int"}),
        "int weight",
    ),
    "groups of int8": (
        quantization_config(
            weights=WEIGHTS | {"type": "int", "strategy": "group"}, format="int-quantized"
        ),
        "int8 weights with scales per group",
    ),
    "3 bits": (packed_config(num_bits=3), "packed int weights of 3 bits"),
    "odd groups": (packed_config(group_size=24), "groups of 24"),
    "oblong blocks": (
        quantization_config(weights=BLOCKS | {"block_structure": [1, 128]}),
        r"blocks of \[1, 128\]",
    ),
    "unknown blocks": (quantization_config(weights=WEIGHTS | {"strategy": "block"}), "of None"),
    "tokens in groups": (
        quantization_config(activations=FLOAT8 | {"strategy": "group", "dynamic": True}),
        "activations other than fp8",
    ),
    "tokens with zeros": (
        quantization_config(
            weights=WEIGHTS | {"type": "int"},
            activations=INT_TOKENS | {"strategy": "token", "dynamic": True, "symmetric": False},
            format="int-quantized",
        ),
        "activations other than int8",
    ),
    "AWQ for vectors": (AWQ | {"version": "gemv"}, "awq, version gemv"),
    "AWQ of 8 bits": (AWQ | {"bits": 8}, "awq with 8 bits"),
    "GPTQ of 3 bits": (GPTQ | {"bits": 3}, "gptq with 3 bits"),
    "GPTQ for Marlin": (GPTQ | {"checkpoint_format": "marlin"}, "gptq, checkpoint_format marlin"),
    "GPTQ with a head": (GPTQ | {"lm_head": True}, "quantized lm_head"),
    "FP8 of another kind": (FP8_CONFIG | {"fmt": "e5m2"}, "fp8, fmt e5m2"),
    "FP8 with powers of two": (FP8_CONFIG | {"scale_fmt": "ue8m0"}, "scale_fmt ue8m0"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(config: dict[str, Any], message: str) -> None:
    expected = rf"quantization_config .*{message}.* is not supported: use "
    with pytest.raises(ValueError, match=expected):
        choose_scheme("fp8", {"quantization_config": config})


@pytest.mark.parametrize("name", OTHERS)
def test_what_would_do_instead(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.* use the original checkpoint with quant"):
        choose_scheme(None, {"quantization_config": {"quant_method": name}})


@pytest.mark.parametrize("config", [{"quant_method": []}, [], GPTQ | {"dynamic": [3]}, 7])
def test_nonsense(config: Any) -> None:
    with pytest.raises(ValueError, match=r"config.json"):
        choose_scheme(None, {"quantization_config": config})


@pytest.mark.parametrize(
    ("targets", "ignored", "covered"),
    [
        (("Linear",), (), True),
        (("Linear",), ("lm_head", "model.layers.0.mlp.gate_proj"), True),
        (("Linear",), ("model.layers.1.self_attn.o_proj",), False),
        (("Linear",), (r"re:.*self_attn.*",), False),
        (("Linear",), (r"re:self_attn.*",), True),
        ((r"re:.*o_proj$",), (), True),
        ((r"re:.*mlp.*",), (), False),
    ],
)
def test_patterns(targets: tuple[str, ...], ignored: tuple[str, ...], covered: bool) -> None:
    scheme = Scheme((Rule(WeightFormat("fp8"), targets),), ignored)
    found = scheme.format_of("model.layers.1.self_attn.o_proj")
    assert found == (WeightFormat("fp8") if covered else None)


def test_the_pass_quantizes_what_the_scheme_covers() -> None:
    num_parameters = make_decoder().num_parameters
    scheme = Scheme((Rule(WeightFormat("fp8")),), ignored=("model.layers.1.self_attn.o_proj",))
    model = make_decoder(scheme)
    for index, layer in enumerate(model.layers):
        for linear in layer.linears():
            is_plain = index == 1 and linear is layer.attention.o
            assert linear.method == (UNQUANTIZED if is_plain else FP8)
            assert linear.weight.dtype == (torch.float32 if is_plain else E4M3)
    assert model.lm_head.method is UNQUANTIZED
    assert sum(slot.target.numel() for slot in model.slots()) == num_parameters
    (note,) = describe(model.linears(), scheme)
    assert note.startswith("FP8 weights quantized at load in 7 linear layers, multiplied by plain")
    assert describe(model.linears(), None) == []


def test_layers_that_are_multiplied_as_one_are_quantized_as_one() -> None:
    scheme = Scheme((Rule(WeightFormat("fp8")),), ignored=("model.layers.1.mlp.up_proj",))
    with pytest.raises(ValueError, match=r"layers.1.mlp.gate_proj otherwise than .*1.mlp.up"):
        make_decoder(scheme)
