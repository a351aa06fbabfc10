"""GGUF's blocks as packed weights: the numbers are those that the gguf package makes of them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.gguf import GGUFTensor
from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.checkpoint.model_size import read_model_size
from nanovllm.checkpoint.quantization import (
    GGUF_FORMATS,
    ROUNDED,
    Scheme,
    WeightFormat,
    bytes_per_end_weight,
    bytes_per_linear_weight,
    scheme_for,
)
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.parallel import Cut, TensorParallel
from nanovllm.worker.quant.packed import Packed
from nanovllm.worker.quant.select import method_for
from nanovllm.worker.weights import Place, _stored_piece
from tests.worker.attention.decoding import Driver
from tests.worker.models.test_parallel import logits_of_ranks
from tests.worker.quant.test_layouts import greedy, loaded
from tests.worker.test_weights import as_gguf, wider

CPU = torch.device("cpu")
# Where in a block float16 numbers lie.
HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q6_K": (208,),
}


def random_tensor(name: str, *, rows: int = 5, columns: int = 512) -> GGUFTensor:
    """Any bits at all, and finite scales."""
    kind = Type[name]
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(7).integers(0, 256, (rows, columns // size, num_bytes), np.uint8)
    for place in HALVES[name]:
        scales = np.random.default_rng(place).normal(size=blocks.shape[:2]).astype(np.float16)
        blocks[:, :, place : place + 2] = scales[..., None].view(np.uint8)
    return GGUFTensor(name, (rows, columns), kind, blocks.reshape(rows, -1))


def keep(kept: WeightFormat, *tensors: GGUFTensor, device: torch.device = CPU) -> Linear:
    """A layer of these, one below the other."""
    parts = {f"part {index}": tensor.shape[0] for index, tensor in enumerate(tensors)}
    linear = Linear.empty(
        tensors[0].shape[1],
        parts,
        bias=False,
        shard_axis=0,
        dtype=torch.float32,
        device=torch.device("meta"),
    )
    linear.method = method_for(kept, linear, device)
    linear.method.create(linear, device)
    for slot, tensor in zip(linear.slots(0), tensors, strict=True):
        assert slot.keep is not None
        slot.keep(tensor)
    return linear


def dequantized(linear: Linear) -> Tensor:
    assert isinstance(linear.method, Packed)
    return linear.method.weight.dequantize()


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_a_type_is_bit_for_bit_what_gguf_makes_of_it(name: str) -> None:
    tensor = random_tensor(name)
    linear = keep(GGUF_FORMATS[name], tensor)
    assert torch.equal(dequantized(linear), torch.from_numpy(tensor.dequantize()))
    x = torch.randn(3, 512)
    expected = x.double() @ torch.from_numpy(tensor.dequantize()).double().T
    assert (linear(x) - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_a_tensor_is_kept_some_rows_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.worker.pieces.LOADED_VALUES", 1200)
    tensors = random_tensor(name), random_tensor(name, rows=3)
    expected = torch.cat([torch.from_numpy(tensor.dequantize()) for tensor in tensors])
    assert torch.equal(dequantized(keep(GGUF_FORMATS[name], *tensors)), expected)


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_a_type_takes_the_bytes_that_are_planned(name: str) -> None:
    linear = keep(GGUF_FORMATS[name], random_tensor(name))
    taken = sum(tensor.nbytes for tensor in linear.method.tensors(linear))
    assert taken == GGUF_FORMATS[name].bytes_per_weight * 5 * 512


@pytest.mark.parametrize("other", GGUF_FORMATS)
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K"])
def test_parts_of_two_types_are_one_layer(name: str, other: str) -> None:
    """As Q4_K_M has them. What a type has not, the other brings."""
    tensors = random_tensor(name), random_tensor(other, rows=3)
    rules = Scheme.at_load("int8").rules * 2
    rules = tuple(
        type(rule)(GGUF_FORMATS[kind], (target,))
        for rule, kind, target in zip(rules, (name, other), ("a", "b"), strict=True)
    )
    kept = Scheme(rules).format_of_all(["a", "b"])
    assert kept is not None
    expected = torch.cat([torch.from_numpy(tensor.dequantize()) for tensor in tensors])
    found = dequantized(keep(kept, *tensors))
    if name == other or kept.is_nested:
        assert torch.equal(found, expected)
    else:  # -8 * d is added where it was multiplied
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_file_is_kept_as_it_is_stored(name: str, family: str, tmp_path: Path) -> None:
    """On a GPU. Heads of Llama's queries and keys are put in order, too. It generates what it does
    dequantized."""
    (source := tmp_path / "plain").mkdir()
    checkpoint, expected = as_gguf(
        wider(family, source), tmp_path / "m.gguf", architecture=family, kind=Type[name]
    )
    spec = spec_from_config(checkpoint.config())
    assert scheme_for(checkpoint, spec, None, is_gpu=False) is None
    scheme = scheme_for(checkpoint, spec, None, is_gpu=True)
    driver = Driver.load(checkpoint, scheme=scheme)
    if name == "BF16":
        assert scheme is None
        assert all(linear.method is not Packed for linear in driver.model.linears())
        return
    found = loaded(driver.model)
    assert found.keys() == {key for key in expected if key.endswith("_proj.weight")}
    for key, values in found.items():
        assert torch.equal(values, expected[key]), key
    assert greedy(driver) == greedy(Driver.load(checkpoint))
    model, counts = driver.model, read_model_size(checkpoint).parameters
    ends = [("model.embed_tokens.weight", "embedding", model.embedding)]
    assert (model.lm_head.method is model.embedding.method) == spec.tied_embeddings
    if not spec.tied_embeddings:
        ends.append(("lm_head.weight", "head", model.lm_head))
    each = bytes_per_end_weight(spec, scheme, value_bytes=2)
    for key, group, linear in ends:
        assert torch.equal(dequantized(linear), expected[key])
        taken = sum(tensor.nbytes for tensor in linear.method.tensors(linear))
        assert taken == each[group] * counts[group]  # type: ignore[index]
    planned = bytes_per_linear_weight(spec, scheme, value_bytes=2)
    planned *= (
        counts["attention"]
        + counts["mlp"]
        - sum(values.numel() for key, values in expected.items() if key.endswith("_proj.bias"))
    )
    layers = [linear for layer in driver.model.layers for linear in layer.linears()]
    taken = sum(tensor.nbytes for one in layers for tensor in one.method.tensors(one))
    assert planned == pytest.approx(taken, rel=1e-3)


def test_other_types_become_eight_bits(tmp_path: Path) -> None:
    """And a layer of which a part is not quantized comes dequantized."""
    (source := tmp_path / "plain").mkdir()
    checkpoint, _ = as_gguf(
        wider("llama", source), tmp_path / "m.gguf", architecture="llama", kind=Type.F32
    )
    tensors, spec = checkpoint.gguf.tensors, spec_from_config(checkpoint.config())
    tensors["blk.0.ffn_down.weight"] = GGUFTensor(
        "blk.0.ffn_down.weight",
        tensors["blk.0.ffn_down.weight"].shape,
        Type.MXFP4,
        gguf.quants.quantize(tensors["blk.0.ffn_down.weight"].dequantize(), Type.MXFP4),
    )
    tensors["blk.1.attn_q.weight"] = random_tensor("Q8_0", rows=64, columns=64)
    scheme = scheme_for(checkpoint, spec, None, is_gpu=True)
    assert scheme is not None
    assert scheme.format_of("model.layers.0.mlp.down_proj") == ROUNDED
    model = Driver.load(checkpoint, scheme=scheme).model
    down = model.layers[0].mlp.linears()
    *_, method = (linear.method for linear in down)
    assert isinstance(method, Packed)
    values = torch.from_numpy(tensors["blk.0.ffn_down.weight"].dequantize().copy())
    steps = method.weight.scale.repeat_interleave(32, 1)
    assert ((method.weight.dequantize() - values).abs() <= 0.5001 * steps).all()
    assert not isinstance(next(model.layers[1].linears()).method, Packed)


def test_damaged_scales(tmp_path: Path) -> None:
    (source := tmp_path / "plain").mkdir()
    checkpoint, _ = as_gguf(
        wider("llama", source), tmp_path / "m.gguf", architecture="llama", kind=Type.Q8_0
    )
    tensor = checkpoint.gguf.tensors["blk.1.ffn_up.weight"]
    raw = tensor.raw.copy()
    raw[3, 34:36] = 255
    checkpoint.gguf.tensors[tensor.name] = GGUFTensor(tensor.name, tensor.shape, tensor.type, raw)
    scheme = scheme_for(checkpoint, spec_from_config(checkpoint.config()), None, is_gpu=True)
    with pytest.raises(ValueError, match=r"m.gguf: tensor blk.1.ffn_up.weight is damaged"):
        Driver.load(checkpoint, scheme=scheme)


@pytest.mark.parametrize("shape", [Cut(0, 256, 512), Cut(256, 256, 512)])
def test_pieces_for_ranks(shape: Cut) -> None:
    tensor = random_tensor("Q6_K", rows=8)
    place: Any = Place(None, (8, 512), (slice(2, 6), shape.slice))  # type: ignore[arg-type]
    expected = tensor.dequantize()[2:6, shape.slice]
    assert (_stored_piece(tensor, place, None).dequantize() == expected).all()


def test_two_ranks_hold_a_file_between_them(tmp_path: Path) -> None:
    (source := tmp_path / "plain").mkdir()
    checkpoint, expected = as_gguf(
        wider("llama", source), tmp_path / "m.gguf", architecture="llama", kind=Type.Q4_0
    )
    scheme = scheme_for(checkpoint, spec_from_config(checkpoint.config()), None, is_gpu=True)
    one = Driver.load(checkpoint, scheme=scheme, parallel=TensorParallel(1, 2)).model.layers[0]
    qkv, o, _, down = one.linears()
    q, o_proj = (expected[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qo")
    assert torch.equal(dequantized(qkv)[: len(q) // 2], q[len(q) // 2 :])
    assert torch.equal(dequantized(o), o_proj[:, o_proj.shape[1] // 2 :])
    # The second rank's 48 inputs begin within a block of 32.
    assert not isinstance(down.method, Packed)
    assert down.weight.shape == (64, 48)


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # a head of its own, and a tied one
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_ids_as_they_are_stored(size: int, family: str, tmp_path: Path) -> None:
    """Of four ranks two have no ids."""
    (source := tmp_path / "plain").mkdir()
    checkpoint, _ = as_gguf(
        wider(family, source), tmp_path / "m.gguf", architecture=family, kind=Type.Q8_0
    )
    scheme = scheme_for(checkpoint, spec_from_config(checkpoint.config()), None, is_gpu=True)
    (expected,) = logits_of_ranks(checkpoint, 1)
    found = logits_of_ranks(checkpoint, size, scheme)
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=3e-5)
    assert all(torch.equal(logits, found[0]) for logits in found)


def test_a_checkpoint_of_another_format_is_not_asked(tiny_checkpoint: Any) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("llama"), "safetensors")
    spec = spec_from_config(checkpoint.config())
    assert scheme_for(checkpoint, spec, None, is_gpu=True) is None
