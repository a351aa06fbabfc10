"""FP8 models from every kind of weights: what is loaded means what the checkpoint means."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.checkpoint.quantization import Scheme, choose_scheme
from nanovllm.config import LoadFormat, Quantization
from nanovllm.worker.attention.select import attention_specs, select_attention
from nanovllm.worker.kernels.torch.layer_kernels import TorchKernels
from nanovllm.worker.layers.linear import UNQUANTIZED
from nanovllm.worker.models.decoder import Decoder
from nanovllm.worker.quant import fp8
from nanovllm.worker.quant.fp8 import E4M3, FP8, Fp8, quantize_rows
from nanovllm.worker.quant.packed import Packed
from nanovllm.worker.weights import load_weights
from tests.checkpoint.gguf_writing import QuantizationType
from tests.worker.attention.decoding import Driver
from tests.worker.quant.compressed import dequantized, write_compressed
from tests.worker.test_weights import as_gguf

CPU = torch.device("cpu")
Build = Callable[[str], Path]


def load(
    checkpoint: Checkpoint,
    *,
    scheme: Scheme | None,
    load_format: LoadFormat = "auto",
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    spec = spec_from_config(checkpoint.config())
    specs = attention_specs(spec, block_size=16, dtype=dtype, device=CPU)
    attention, _ = select_attention("auto", specs)
    model = Decoder(
        spec,
        kernels=TorchKernels(),
        attention=attention,
        dtype=dtype,
        device=CPU,
        scheme=scheme,
    )
    progress: list[float] = []
    load_weights(
        model,
        checkpoint,
        load_format=load_format,
        seed=3,
        on_progress=lambda phase, done: progress.append(done),
    )
    assert progress[-1] == 1.0
    return model


def meaning(model: Decoder) -> dict[str, Tensor]:
    """By the names a safetensors checkpoint has; the head aside, which may be prepacked."""
    names = model.spec.names.safetensors
    found = {}
    for index, layer in enumerate(model.layers):
        for slot in layer.slots(index):
            if slot.kind != "weight_scale":
                found[f"{names[slot.part].format(index)}.{slot.kind}"] = slot.target
        for linear in layer.linears():
            for part, _, rows in linear.rows():
                scale = None if linear.scale is None else linear.scale[rows]
                values = dequantized(linear.weight[rows], scale)
                found[f"{names[part].format(index)}.weight"] = values
    return found


def assert_means(model: Decoder, expected: dict[str, Tensor]) -> None:
    found = meaning(model)
    assert found.keys() == {name for name in expected if ".layers." in name}
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-6, atol=0, msg=name)


def rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices of layers as quantizing leaves them."""
    return {
        name: dequantized(rows.values, rows.scale[:, 0])
        if ".layers." in name and values.dim() == 2
        else values
        for name, values in tensors.items()
        for rows in (quantize_rows(values),)
    }


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_quantized_as_it_comes(name: str, tiny_checkpoint: Build) -> None:
    path = tiny_checkpoint(name)
    model = load(Checkpoint(path, "safetensors"), scheme=Scheme.at_load("fp8"))
    assert_means(model, rounded(load_file(path / "model.safetensors")))
    assert all(linear.method == FP8 for layer in model.layers for linear in layer.linears())
    assert model.lm_head.method.kind != "fp8"


@pytest.mark.parametrize("method", ["int4", "int8"])
def test_packed_as_it_comes(
    method: Quantization, tiny_checkpoint: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From safetensors and, piece by piece, from a GGUF file of the same numbers: each weight is
    within half a step of what it was, and the model much the same."""
    path = tiny_checkpoint("llama")
    expected = load_file(path / "model.safetensors")
    monkeypatch.setattr("nanovllm.worker.weights.PIECE_VALUES", 700)
    gguf, _ = as_gguf(path, tmp_path / "m.gguf", architecture="llama", kind=QuantizationType.F32)
    scheme = Scheme.at_load(method)
    models = [load(one, scheme=scheme) for one in (Checkpoint(path, "safetensors"), gguf)]
    for index, layers in enumerate(zip(*(model.layers for model in models), strict=True)):
        for one, other in zip(*(layer.linears() for layer in layers), strict=True):
            assert isinstance(one.method, Packed) and isinstance(other.method, Packed)
            for part, _, rows in one.rows():
                weight = one.method.weight.rows(rows)
                assert weight.group == 32
                values = weight.dequantize()
                steps = weight.scale.repeat_interleave(32, 1)[:, : values.shape[1]]
                name = models[0].spec.names.safetensors[part].format(index)
                assert ((values - expected[f"{name}.weight"]).abs() <= 0.5001 * steps).all()
                assert torch.equal(other.method.weight.rows(rows).dequantize(), values)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_from_gguf(
    name: str, tiny_checkpoint: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces, and with the heads of Llama's queries and keys interleaved."""
    monkeypatch.setattr("nanovllm.worker.weights.PIECE_VALUES", 700)
    checkpoint, expected = as_gguf(
        tiny_checkpoint(name), tmp_path / "m.gguf", architecture=name, kind=QuantizationType.F32
    )
    assert_means(load(checkpoint, scheme=Scheme.at_load("fp8")), rounded(expected))


def test_dummy_is_the_unquantized_dummy_quantized(tiny_checkpoint: Build) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("qwen3"), "safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanovllm.worker.weights.can_prepack", lambda dtype, device: False)
        plain = load(checkpoint, scheme=None, load_format="dummy")
        quantized = load(checkpoint, scheme=Scheme.at_load("fp8"), load_format="dummy")
    assert_means(quantized, rounded(meaning(plain)))


@pytest.mark.parametrize("strategy", ["channel", "tensor", None])
def test_small_layers_are_kept_in_both_forms(
    strategy: str | None, tiny_checkpoint: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a GPU multiplies FP8 itself; None: quantized as they come."""
    monkeypatch.setattr(fp8, "has_native_fp8", lambda device: True)
    monkeypatch.setattr("nanovllm.worker.weights.PIECE_VALUES", 700)
    path = tiny_checkpoint("qwen2")
    if strategy is not None:
        write_compressed(path, tmp_path, strategy=strategy)
        path = tmp_path
    checkpoint = Checkpoint(path, "safetensors")
    scheme = choose_scheme("fp8", checkpoint.config())
    model = load(checkpoint, scheme=scheme, dtype=torch.bfloat16)
    for linear in (linear for layer in model.layers for linear in layer.linears()):
        assert linear.copy is not None and linear.copy.method is UNQUANTIZED
        assert linear.copy.bias is linear.bias and linear.copy.scale is None
        wide = dequantized(linear.weight, linear.scale)
        assert torch.equal(linear.copy.weight, wide.bfloat16())
        taken = sum(tensor.numel() for tensor in linear.method.tensors(linear))
        assert taken == 2 * linear.weight.numel() + len(linear.weight)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("ignore", [(), ("model.layers.1.mlp.down_proj",)])
def test_stored(
    strategy: str, ignore: tuple[str, ...], tiny_checkpoint: Build, tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen2")
    expected = write_compressed(source, tmp_path, strategy=strategy, ignore=ignore)
    checkpoint = Checkpoint(tmp_path, "safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanovllm.worker.weights.can_prepack", lambda dtype, device: False)
        model = load(checkpoint, scheme=choose_scheme(None, checkpoint.config()))
    assert_means(model, expected)
    assert (model.layers[1].mlp.down.method is UNQUANTIZED) == bool(ignore)
    assert model.layers[0].mlp.down.method == Fp8(stored=strategy)


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a scale is missing": (
        lambda tensors: tensors.pop(f"{Q_PROJ}_scale"),
        rf"lacks 1 tensors .*{Q_PROJ}_scale",
    ),
    "a scale too many": (
        lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].float()}),
        rf"tensor {Q_PROJ} is torch.float32 and has a scale",
    ),
    "scales of blocks": (
        lambda tensors: tensors.update({f"{Q_PROJ}_scale": torch.ones(6, 6)}),
        rf"tensor {Q_PROJ}_scale has shape \(6, 6\).*quantized per channel",
    ),
    "a quantized embedding": (
        lambda tensors: tensors.update({"model.embed_tokens.weight_scale": torch.ones(1)}),
        r"has over 1 tensors .*\(model.embed_tokens.weight_scale\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_stored_wrongly(
    change: Callable[[dict[str, Tensor]], Any],
    message: str,
    tiny_checkpoint: Build,
    tmp_path: Path,
) -> None:
    write_compressed(tiny_checkpoint("llama"), tmp_path, strategy="channel")
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, "safetensors")
    with pytest.raises(ValueError, match=message):
        load(checkpoint, scheme=choose_scheme(None, checkpoint.config()))


def test_logits_stay_near(tiny_checkpoint: Build) -> None:
    """Weights of 8 bits that are integers nearest; the cache in FP8 costs less than weights."""
    checkpoint = Checkpoint(tiny_checkpoint("qwen3"), "safetensors")
    prompt = torch.randint(3, 160, (75,), generator=torch.Generator().manual_seed(1)).tolist()

    def log_probs(scheme: Scheme | None, kv_dtype: torch.dtype | None) -> Tensor:
        driver = Driver.load(checkpoint, scheme=scheme, kv_dtype=kv_dtype)
        return driver.run({"prompt": prompt})["prompt"].double().log_softmax(-1)

    exact = log_probs(None, None)
    fp8, cache, int8, int4 = (
        (exact.exp() * (exact - found)).sum(-1).mean()
        for found in (
            log_probs(Scheme.at_load("fp8"), None),
            log_probs(None, E4M3),
            log_probs(Scheme.at_load("int8"), None),
            log_probs(Scheme.at_load("int4"), None),
        )
    )
    assert 0 < int8 < cache < fp8 < 0.05
    assert fp8 < int4 < 0.2
