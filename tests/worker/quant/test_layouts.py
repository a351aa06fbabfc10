"""Packed weights as others store them: what is loaded is what their own packages make of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.checkpoint.quantization import choose_scheme
from nanovllm.worker.models.decoder import Decoder
from nanovllm.worker.quant.packed import Packed
from tests.conftest import save_tiny
from tests.worker.attention.decoding import Driver
from tests.worker.quant.layouts import FORMATS, TensorFile, gptq, write
from tests.worker.test_weights import wider

NUM_STEPS = 12
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}  # halves are whole groups
WIDE |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}  # heads turn whole
WIDE |= {"sliding_window": None}


@pytest.fixture(scope="session", params=["llama", "qwen2"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 3 layers whose widths are whole groups; one with biases, one without."""
    torch.manual_seed(1)
    return wider(request.param, tmp_path_factory.mktemp(request.param))


def load(path: Path) -> Driver:
    checkpoint = Checkpoint(path, "safetensors")
    return Driver.load(checkpoint, scheme=choose_scheme(None, checkpoint.config()))


def loaded(model: Decoder) -> TensorFile:
    """What quantized layers mean, by the names of their weights, inputs in the file's order; of
    parts that a file fuses, one below the other."""
    found: dict[str, list[Tensor]] = {}
    for index, layer in enumerate(model.layers):
        for linear in layer.linears():
            method = linear.method
            assert isinstance(method, Packed)
            for part, _, rows in linear.rows():
                values = method.weight.rows(rows).dequantize()
                if method.order is not None:
                    values = values[:, method.order.argsort()]
                name = model.spec.names.safetensors[part].format(index)
                found.setdefault(f"{name}.weight", []).append(values)
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_bit_for_bit_what_their_package_makes_of_them(
    name: str, plain: Path, tmp_path: Path
) -> None:
    expected = write(plain, tmp_path, *FORMATS[name])
    found = loaded(load(tmp_path).model)
    assert found.keys() == {key for key in expected if key.endswith("_proj.weight")}
    for key, values in found.items():
        assert torch.equal(values.to(expected[key].dtype), expected[key]), key


@pytest.mark.parametrize("name", FORMATS)
def test_weights_that_are_converted_in_pieces(
    name: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some rows at a time, as those of large tensors are, so that loading takes little memory."""
    expected = write(plain, tmp_path, *FORMATS[name])
    monkeypatch.setattr("nanovllm.worker.pieces.LOADED_VALUES", 700)
    for key, values in loaded(load(tmp_path).model).items():
        assert torch.equal(values.to(expected[key].dtype), expected[key]), key


@pytest.mark.parametrize(
    "name",
    ["awq 16", "gptq 4 ordered", "gptq 8 16", "compressed 4 16 zeros", "fp8 blocks 16"],
)
def test_what_a_file_fuses_is_taken_apart(name: str, tmp_path: Path) -> None:
    """Phi-3's queries, keys and values, and its gates and ups; whichever axis outputs lie along."""
    (packed := tmp_path / "packed").mkdir()
    expected = write(save_tiny("phi3", tmp_path / "plain", **WIDE), packed, *FORMATS[name])
    found = loaded(load(packed).model)
    assert found.keys() == {key for key in expected if key.endswith("_proj.weight")}
    for key, values in found.items():
        assert torch.equal(values.to(expected[key].dtype), expected[key]), key


@torch.inference_mode()
def greedy(driver: Driver) -> list[int]:
    ids = torch.randint(3, 160, (9,), generator=torch.Generator().manual_seed(3)).tolist()
    found = []
    for _ in range(NUM_STEPS):
        ids = [int(driver.run({"one": ids})["one"][-1].argmax())]
        found += ids
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_generates_what_its_dequantized_self_does(
    name: str, plain: Path, tmp_path: Path
) -> None:
    quantized, wide = tmp_path / "quantized", tmp_path / "wide"
    quantized.mkdir()
    wide.mkdir()
    write(plain, quantized, *FORMATS[name])
    driver = load(quantized)
    tensors = load_file(plain / "model.safetensors") | loaded(driver.model)
    save_file(
        {key: values.contiguous() for key, values in tensors.items()}, wide / "model.safetensors"
    )
    (wide / "config.json").write_text((plain / "config.json").read_text())
    assert greedy(driver) == greedy(load(wide))


# ---- what is wrong with a file

Change = Callable[[TensorFile], Any]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def without(end: str) -> Change:
    return lambda tensors: tensors.pop(f"{Q_PROJ}.{end}")


def with_(end: str, values: Tensor) -> Change:
    return lambda tensors: tensors.update({f"{Q_PROJ}.{end}": values})


WRONG: dict[str, tuple[str, Change, str]] = {
    "awq without scales": ("awq 32", without("scales"), r"lacks 1 tensors .*q_proj.scales"),
    "awq without zeros": ("awq 32", without("qzeros"), r"lacks 1 tensors .*q_proj.qzeros"),
    "awq of another group": (
        "awq 32",
        with_("scales", torch.ones(4, 64).half()),
        r"model.safetensors: tensor .*q_proj.scales has shape \(4, 64\).*groups of 32.* \(2, 64\)",
    ),
    "a scale that is no number": (
        "gptq 4 32",
        with_("scales", torch.full((2, 64), torch.inf).half()),
        r"model.safetensors: tensor .*q_proj.scales holds scales that are no numbers",
    ),
    "a scale that is an integer": (
        "gptq 4 32",
        with_("scales", torch.ones(2, 64).int()),
        r"model.safetensors: tensor .*q_proj.scales is torch.int32",
    ),
    "weights of another shape": (
        "gptq 8 32",
        with_("qweight", torch.zeros(8, 64).int()),
        r"model.safetensors: tensor .*q_proj.qweight has shape \(8, 64\).* asks for \(16, 64\)",
    ),
    "weights that are not packed": (
        "compressed 4 32 zeros",
        with_("weight_packed", torch.zeros(64, 8)),
        r"model.safetensors: tensor .*q_proj.weight_packed is torch.float32",
    ),
    "another shape told": (
        "compressed 4 32 zeros",
        with_("weight_shape", torch.tensor([64, 60])),
        r"tensor .*q_proj.weight_shape says \[64, 60\], its config \[64, 64\]",
    ),
    "groups of unequal size": (
        "gptq 4 ordered",
        with_("g_idx", torch.zeros(64).int()),
        r"tensor .*q_proj.g_idx does not put 32 inputs into each group",
    ),
    "an order of its own": (
        "gptq 4 ordered",
        with_("g_idx", torch.arange(64).int() % 2),
        r"tensor .*_proj.g_idx orders inputs otherwise",
    ),
    "a bias": (
        "gptq 4 32",
        with_("bias", torch.ones(64).half()),
        r"tensor .*q_proj.bias is a bias, of which its config does not tell",
    ),
    "a block's scale too many": (
        "fp8 blocks 32",
        with_("weight_scale_inv", torch.ones(3, 2)),
        r"tensor .*q_proj.weight_scale_inv has shape \(3, 2\).*blocks of 32",
    ),
}


@pytest.mark.parametrize(("name", "change", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_told_of_by_tensor_and_file(
    name: str, change: Change, message: str, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    (source := tmp_path / "plain").mkdir()
    write(wider("llama", source), tmp_path, *FORMATS[name])
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_an_order_that_the_config_does_not_tell_of(tmp_path: Path) -> None:
    (source := tmp_path / "plain").mkdir()
    config, quantize = gptq(bits=4, group=32, desc_act=True)
    write(wider("llama", source), tmp_path, config | {"desc_act": False}, quantize)
    with pytest.raises(ValueError, match=r"g_idx orders inputs, of which its config does not tell"):
        load(tmp_path)


def test_a_truncated_file(tmp_path: Path) -> None:
    (source := tmp_path / "plain").mkdir()
    write(wider("llama", source), tmp_path, *FORMATS["awq 32"])
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or damaged"):
        load(tmp_path)
