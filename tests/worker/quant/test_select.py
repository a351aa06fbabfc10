"""Which layers are quantized, by whose wish, and what is refused."""

from typing import Any

import pytest
import torch

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.quantization import Rule, Scheme, WeightFormat, choose_scheme
from nanovllm.worker.attention.select import attention_specs, select_attention
from nanovllm.worker.kernels.torch.layer_kernels import TorchKernels
from nanovllm.worker.layers.linear import UNQUANTIZED
from nanovllm.worker.models.decoder import Decoder
from nanovllm.worker.quant.fp8 import E4M3, FP8
from nanovllm.worker.quant.select import describe
from tests.worker.quant.compressed import quantization_config
from tests.worker.test_worker import TINY_LLAMA

CPU = torch.device("cpu")


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
        stored = WeightFormat("fp8", "channel", stored=True)
        assert scheme == Scheme((Rule(stored),), ignored=("lm_head",))


WEIGHTS = {"type": "float", "num_bits": 8, "symmetric": True, "strategy": "channel"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"quant_method": "awq"}, r"\(quant_method awq\)"),
    "another format": (quantization_config(format="pack-quantized"), "format pack-quantized"),
    "calibrated cache": (quantization_config(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    "no groups": (quantization_config(config_groups={}), "without config_groups"),
    "int8": (quantization_config(weights={**WEIGHTS, "type": "int"}), "weights other than FP8"),
    "blocks": (quantization_config(weights={**WEIGHTS, "strategy": "block"}), "per channel or per"),
    "static": (quantization_config(activations={"dynamic": False}), "activations other than FP8"),
    "no activations": (quantization_config(activations=None), "activations other than FP8"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"quantization_config .*{message}.* is not supported"):
        choose_scheme("fp8", {"quantization_config": config})


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
