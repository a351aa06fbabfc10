"""Every way weights come in, and every way a checkpoint can be wrong."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.checkpoint.model_size import read_model_size
from nanovllm.checkpoint.spec import DecoderSpec
from nanovllm.config import LoadFormat
from nanovllm.worker import weights
from nanovllm.worker.attention.select import attention_specs, select_attention
from nanovllm.worker.kernels.base import Residual
from nanovllm.worker.kernels.torch.layer_kernels import TorchKernels
from nanovllm.worker.layers.linear import WeightSlot
from nanovllm.worker.layers.prepacked import Prepacked, can_prepack, prepack
from nanovllm.worker.models.decoder import Decoder
from nanovllm.worker.parallel import SINGLE, Cut, TensorParallel
from nanovllm.worker.weights import load_weights
from tests.checkpoint.gguf_writing import QuantizationType, write_gguf

CPU = torch.device("cpu")
TensorFile = dict[str, Tensor]
Build = Callable[[str], Path]
SPREAD = [TensorParallel(rank, 2, spreads_experts=True) for rank in (0, 1)]


@pytest.fixture(autouse=True)
def plain_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave weights as they were loaded, to be looked at."""
    monkeypatch.setattr(weights, "can_prepack", lambda dtype, device: False)


def load(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype = torch.float32,
    load_format: LoadFormat = "auto",
    seed: int = 0,
) -> Decoder:
    model = build(spec_from_config(checkpoint.config()), dtype=dtype)
    fill(model, checkpoint, load_format=load_format, seed=seed)
    return model


def build(
    spec: DecoderSpec, *, dtype: torch.dtype = torch.float32, parallel: TensorParallel = SINGLE
) -> Decoder:
    specs = attention_specs(spec, block_size=16, dtype=dtype, device=CPU, parallel=parallel)
    attention, _ = select_attention("auto", specs)
    return Decoder(
        spec,
        kernels=TorchKernels(),
        attention=attention,
        dtype=dtype,
        device=CPU,
        parallel=parallel,
    )


def fill(
    model: Decoder, checkpoint: Checkpoint, *, load_format: LoadFormat = "auto", seed: int = 0
) -> None:
    progress: list[tuple[str, float]] = []
    load_weights(
        model,
        checkpoint,
        load_format=load_format,
        seed=seed,
        on_progress=lambda phase, done: progress.append((phase, done)),
    )
    assert {phase for phase, _ in progress} == {"weights"}
    fractions = [done for _, done in progress]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0


def parameters(model: Decoder) -> TensorFile:
    """By the names a safetensors checkpoint has."""
    names = model.spec.names.safetensors
    return {f"{names[s.part].format(s.layer)}.{s.kind}": s.target for s in model.slots()}


def assert_equal(found: TensorFile, expected: TensorFile) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values.to(found[name].dtype)), name


# ---- safetensors


@pytest.mark.parametrize("name", ["llama", "llama3", "llama_linear", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_file(name: str, dtype: torch.dtype, tiny_checkpoint: Build) -> None:
    path = tiny_checkpoint(name)
    model = load(Checkpoint(path, "safetensors"), dtype=dtype)
    expected = load_file(path / "model.safetensors")
    assert_equal(parameters(model), expected)
    assert model.num_parameters == sum(values.numel() for values in expected.values())
    assert all(values.dtype == dtype for values in parameters(model).values())


def test_merged_projections_are_stacked_in_order(tiny_checkpoint: Build) -> None:
    path = tiny_checkpoint("qwen2")
    layer = load(Checkpoint(path, "safetensors")).layers[1]
    file, prefix = load_file(path / "model.safetensors"), "model.layers.1."
    qkv = [file[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv"]
    biases = [file[f"{prefix}self_attn.{part}_proj.bias"] for part in "qkv"]
    gate_up = [file[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(layer.attention.qkv.weight, torch.cat(qkv))
    bias = layer.attention.qkv.bias
    assert bias is not None and torch.equal(bias, torch.cat(biases))
    assert torch.equal(layer.mlp.gate_up.weight, torch.cat(gate_up))


def test_tensors_fused_on_disk(tiny_checkpoint: Build, tmp_path: Path) -> None:
    """Parts that share a name lie one below the other, as the map has them."""
    whole = Checkpoint(tiny_checkpoint("qwen2"), "safetensors")
    tensors = load_file(whole.path / "model.safetensors")
    fused = {
        "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    }
    for layer, (name, parts) in product(range(3), fused.items()):
        for kind in ("weight", "bias"):
            stacked = [tensors.pop(f"model.layers.{layer}.{part}.{kind}", None) for part in parts]
            if stacked[0] is not None:
                tensors[f"model.layers.{layer}.{name}.{kind}"] = torch.cat(stacked)
    save_file(tensors, tmp_path / "model.safetensors")
    spec = spec_from_config(whole.config())
    names = dict(spec.names.safetensors)
    names |= dict.fromkeys(("q", "k", "v"), "model.layers.{}.self_attn.qkv_proj")
    names |= dict.fromkeys(("gate", "up"), "model.layers.{}.mlp.gate_up_proj")
    fused_names = replace(spec.names, safetensors=names)
    found, expected = build(replace(spec, names=fused_names)), load(whole)
    fill(found, Checkpoint(tmp_path, "safetensors"))
    for one, other in zip(found.slots(), expected.slots(), strict=True):
        assert torch.equal(one.target, other.target), one.part


def test_a_stack_of_experts_is_read_one_by_one(tmp_path: Path) -> None:
    """And only the rows that are wanted, of a tensor that holds gates and ups."""
    stack = torch.randn(3, 2 * 8, 5)
    save_file({"experts.gate_up.weight": stack}, tmp_path / "model.safetensors")
    names = {"gate": "experts.gate_up", "up": "experts.gate_up", "lm_head": "lm_head"}
    slots = [
        WeightSlot(
            part,
            "weight",
            torch.empty(4, 5),
            (Cut(4, 4, 8), Cut.all_of(5)),
            layer=0,
            expert=Cut(expert, 1, 3),
        )
        for expert in range(3)
        for part in ("gate", "up")
    ]
    places = weights._places(slots, names)
    with weights._opened(tmp_path / "model.safetensors") as file:
        for place in places["experts.gate_up.weight"]:
            values = weights._read(file, "experts.gate_up.weight", place, where=tmp_path)
            start = 4 if place.slot.part == "gate" else 12
            assert place.slot.expert is not None
            assert torch.equal(values, stack[place.slot.expert.start, start : start + 4])


def test_a_rank_needs_its_own_experts_alone(tiny_checkpoint: Build, tmp_path: Path) -> None:
    """Of a checkpoint from which those of the second rank are gone."""
    source = tiny_checkpoint("qwen3_moe")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    stored = load_file(source / "model.safetensors")
    kept = {name: stored[name] for name in stored if not re.search(r"\.experts\.[345]\.", name)}
    assert len(stored) - len(kept) == 2 * 3 * 3
    save_file(kept, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, "safetensors")
    spec = spec_from_config(checkpoint.config())
    fill(build(spec, parallel=SPREAD[0]), checkpoint)
    with pytest.raises(ValueError, match=r"lacks 18 tensors .*experts\.3\."):
        fill(build(spec, parallel=SPREAD[1]), checkpoint)


def test_sharded(tiny_checkpoint: Build, tmp_path: Path) -> None:
    whole = tiny_checkpoint("llama")
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = load(Checkpoint(tmp_path, "safetensors"))
    assert_equal(parameters(model), load_file(whole / "model.safetensors"))


@pytest.fixture
def editable(
    tiny_checkpoint: Build, tmp_path: Path
) -> Callable[[Callable[[TensorFile], Any]], Checkpoint]:
    """A copy of the tied llama3 checkpoint, its tensors changed by a function."""

    def edit(change: Callable[[TensorFile], Any]) -> Checkpoint:
        source = tiny_checkpoint("llama3")
        (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
        tensors = load_file(source / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        return Checkpoint(tmp_path, "safetensors")

    return edit


Edit = Callable[[Callable[[TensorFile], Any]], Checkpoint]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def test_tied_head_and_derived_tensors_are_passed_over(editable: Edit) -> None:
    def add(tensors: TensorFile) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)

    model = load(editable(add))
    assert model.lm_head.weight is model.embedding.weight


WRONG: dict[str, tuple[Callable[[TensorFile], Any], str]] = {
    "missing": (lambda t: t.pop(Q_PROJ), rf"lacks 1 tensors .*{Q_PROJ}"),
    "extra": (lambda t: t.update(odd=torch.ones(2)), r"has over 1 tensors .*\(odd\)"),
    "shape": (
        lambda t: t.update({Q_PROJ: torch.ones(48, 40)}),
        rf"model.safetensors: tensor {Q_PROJ} has shape \(48, 40\).*asks for \(48, 48\)",
    ),
    "int8": (
        lambda t: t.update({Q_PROJ: torch.ones(48, 48, dtype=torch.int8)}),
        rf"tensor {Q_PROJ} is torch.int8.*use an unquantized",
    ),
    "fp8": (
        lambda t: t.update({Q_PROJ: torch.ones(48, 48).to(torch.float8_e4m3fn)}),
        rf"tensor {Q_PROJ} is torch.float8_e4m3fn.*use an unquantized",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_tensors(editable: Edit, change: Callable[[TensorFile], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(editable(change))


@pytest.mark.parametrize("keep", [0.9, 0.01, 0.0])
def test_truncated_file(editable: Edit, keep: float) -> None:
    checkpoint = editable(lambda tensors: None)
    file = checkpoint.path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or damaged .*again"):
        load(checkpoint)


def test_missing_files(editable: Edit) -> None:
    checkpoint = editable(lambda tensors: None)
    file = checkpoint.path / "model.safetensors"
    names = dict.fromkeys(load_file(file), "model-00001-of-00001.safetensors")
    file.unlink()
    with pytest.raises(ValueError, match=r"holds no .safetensors file"):
        load(checkpoint)
    index = checkpoint.path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match=r"model-00001-of-00001.safetensors is missing"):
        load(checkpoint)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index.json is not valid JSON"):
        load(checkpoint)


def shards(path: Path, *, copies: int = 0) -> list[Path]:
    """Cut model.safetensors in two, which share `copies` tensors."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    names, half = sorted(tensors), len(tensors) // 2
    file.unlink()
    paths = [path / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for part, chosen in zip(paths, (names[: half + copies], names[half:]), strict=True):
        save_file({name: tensors[name] for name in chosen}, part)
    return paths


def write_index(paths: list[Path]) -> None:
    names = {name: path.name for path in paths for name in load_file(path)}
    index = paths[0].parent / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize("sharded", [False, True])
def test_what_is_not_the_models_weights_is_left_alone(editable: Edit, sharded: bool) -> None:
    checkpoint = editable(lambda tensors: None)
    expected = load_file(checkpoint.path / "model.safetensors")
    if sharded:
        shards(checkpoint.path)
    size = read_model_size(checkpoint)
    for name in ("consolidated", "adapter_model", "consolidated-00001-of-00002"):
        save_file({"tok.weight": torch.zeros(9)}, checkpoint.path / f"{name}.safetensors")
    assert_equal(parameters(load(checkpoint)), expected)
    assert read_model_size(checkpoint) == size


def test_a_tensor_in_two_shards_is_taken_from_the_one_the_index_names(editable: Edit) -> None:
    checkpoint = editable(lambda tensors: None)
    expected = load_file(checkpoint.path / "model.safetensors")
    size = read_model_size(checkpoint)
    paths = shards(checkpoint.path, copies=2)
    write_index(paths)
    assert_equal(parameters(load(checkpoint)), expected)
    assert read_model_size(checkpoint) == size
    (checkpoint.path / "model.safetensors.index.json").unlink()
    with pytest.raises(
        ValueError, match=r"00002\.safetensors and .*00001.* both hold tensor model"
    ):
        load(checkpoint)


def test_an_index_that_tells_of_what_a_shard_lacks(editable: Edit) -> None:
    checkpoint = editable(lambda tensors: None)
    paths = shards(checkpoint.path)
    write_index(paths)
    tensors = load_file(paths[0])
    del tensors[Q_PROJ]
    save_file(tensors, paths[0])
    with pytest.raises(ValueError, match=r"00001-of-00002\.safetensors lacks .*q_proj"):
        load(checkpoint)


def test_a_missing_shard_is_named(editable: Edit) -> None:
    checkpoint = editable(lambda tensors: None)
    shards(checkpoint.path)[1].unlink()
    for use in (load, read_model_size):
        with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is missing"):
            use(checkpoint)


def test_files_of_no_standard_name(editable: Edit) -> None:
    checkpoint = editable(lambda tensors: None)
    file = checkpoint.path / "model.safetensors"
    expected = load_file(file)
    file = file.rename(checkpoint.path / "gptq_model-4bit.safetensors")
    assert_equal(parameters(load(checkpoint)), expected)
    save_file(expected, checkpoint.path / "other.safetensors")
    with pytest.raises(ValueError, match=r"2 \.safetensors files \(gptq_model.*index\.json"):
        load(checkpoint)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_head_of_its_own_is_the_head_whatever_the_config_says(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path], sharded: bool
) -> None:
    """As transformers 5, which ties only what is equal."""
    shutil.copytree(tiny_checkpoint("qwen2"), tmp_path, dirs_exist_ok=True)
    checkpoint = Checkpoint(tmp_path, "safetensors")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    for head, is_tied in ((embedding.clone(), True), (embedding.roll(1), False)):
        save_file({**tensors, "lm_head.weight": head}, file, metadata={"format": "pt"})
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(theirs.lm_head.weight, head)
        if sharded:
            write_index(shards(tmp_path))
        size = read_model_size(checkpoint)
        assert size.spec.tied_embeddings is is_tied
        assert (size.parameters["head"] == 0) is is_tied
        for path in tmp_path.glob("model*"):
            path.unlink()


# ---- GGUF


def permuted(values: np.ndarray, num_heads: int) -> np.ndarray:
    """As llama.cpp stores q and k of Llama: the two halves of each head interleaved."""
    halves = values.reshape(num_heads, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def as_gguf(
    source: Path, path: Path, *, architecture: str, kind: QuantizationType
) -> tuple[Checkpoint, TensorFile]:
    """A safetensors checkpoint written as GGUF, matrices as `kind`; and what it holds then."""
    spec = spec_from_config(Checkpoint(source, "safetensors").config())
    names, (heads,) = (spec.names.safetensors, spec.names.gguf), spec.attentions
    assert heads.rope is not None
    gguf_names = {
        f"{names[0][part].format(i, 0)}.{kind_}": (part, f"{names[1][part].format(i, 0)}.{kind_}")
        for part in names[0].keys() & names[1].keys()
        for i in range(spec.num_layers)
        for kind_ in ("weight", "bias")
    }
    tensors, expected = {}, load_file(source / "model.safetensors")
    for name, values in expected.items():
        part, gguf_name = gguf_names[name]
        stored = values.numpy()
        stored_as = kind if values.dim() == 2 else QuantizationType.F32
        if spec.names.gguf_interleaved and part in "qk":
            num_heads = heads.num_heads if part == "q" else heads.num_kv_heads
            stored = permuted(stored, num_heads)
        tensors[gguf_name] = stored, stored_as
        rounded = gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), stored_as), stored_as)
        expected[name] = torch.from_numpy(rounded.copy())
    facts = {
        "embedding_length": spec.hidden_size,
        "feed_forward_length": spec.layers[0].mlp.intermediate_size,
        "block_count": spec.num_layers,
        "attention.head_count": heads.num_heads,
        "attention.head_count_kv": heads.num_kv_heads,
        "attention.key_length": heads.head_dim,
        "attention.value_length": heads.head_dim,
        "rope.freq_base": heads.rope.theta,
    }
    write_gguf(
        path,
        architecture=architecture,
        facts={f"{architecture}.{key}": value for key, value in facts.items()},
        tensors=tensors,
    )
    return Checkpoint(path, "gguf"), expected


@pytest.fixture(params=[2**18, 700], ids=["whole", "in pieces"])
def piece_values(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(weights, "PIECE_VALUES", request.param)
    yield request.param


@pytest.mark.parametrize(
    "kind", [QuantizationType.F32, QuantizationType.F16, QuantizationType.Q8_0]
)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.usefixtures("piece_values")
def test_gguf(name: str, kind: QuantizationType, tiny_checkpoint: Build, tmp_path: Path) -> None:
    source = tiny_checkpoint(name) if kind != QuantizationType.Q8_0 else wider(name, tmp_path)
    checkpoint, expected = as_gguf(source, tmp_path / "m.gguf", architecture=name, kind=kind)
    with torch.inference_mode():  # as a caller may
        assert_equal(parameters(load(checkpoint)), expected)


def wider(name: str, path: Path) -> Path:
    """A model whose rows are whole blocks of 32 values, which quantized types need."""
    from tests.conftest import SIZES, TINY

    model_class, config_class, changes = TINY[name]
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 96} | changes
    model_class(config_class(**sizes)).save_pretrained(path)
    return path


def test_gguf_that_is_wrong(tiny_checkpoint: Build, tmp_path: Path) -> None:
    checkpoint, _ = as_gguf(
        tiny_checkpoint("llama"),
        tmp_path / "m.gguf",
        architecture="llama",
        kind=QuantizationType.F32,
    )
    tensors = checkpoint.gguf.tensors
    odd = tensors.pop("blk.1.attn_k.weight")
    with pytest.raises(ValueError, match=r"m.gguf lacks 1 tensors .*blk.1.attn_k.weight"):
        load(checkpoint)
    tensors["blk.1.attn_k.weight"] = tensors["blk.1.attn_q.weight"]
    with pytest.raises(ValueError, match=r"blk.1.attn_k.weight has shape \(64, 48\)"):
        load(checkpoint)
    tensors["blk.1.attn_k.weight"] = odd
    load(checkpoint)


# ---- dummy, formats, layout


def test_dummy_is_seeded(tiny_checkpoint: Build) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("qwen3"), "safetensors")
    one, same, other = (load(checkpoint, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    assert_equal(parameters(one), parameters(same))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    assert 0.018 < one.embedding.weight.std() < 0.022 and one.embedding.weight.mean().abs() < 0.002
    assert (one.final_norm.weight == 1).all()
    for slot in one.slots():
        if slot.part in ("attention_norm", "mlp_norm", "q_norm", "k_norm"):
            assert (slot.target == 1).all()


def test_random_weights_are_the_same_whatever_else_a_rank_holds(tiny_checkpoint: Build) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("qwen2_moe"), "safetensors")
    spec = spec_from_config(checkpoint.config())
    held = []
    for parallel in (SINGLE, *SPREAD):
        model = build(spec, parallel=parallel)
        fill(model, checkpoint, load_format="dummy")
        held.append({(s.part, s.kind, s.layer, s.expert): s for s in model.slots()})
    whole, *ranks = held
    assert whole.keys() == ranks[0].keys() | ranks[1].keys()
    for slots in ranks:
        for key, slot in slots.items():
            piece = whole[key].target[tuple(cut.slice for cut in slot.piece)]
            assert torch.equal(slot.target, piece), key


def test_format_must_be_the_checkpoints(tiny_checkpoint: Build) -> None:
    with pytest.raises(ValueError, match=r"load_format: .* is safetensors, not gguf: use 'auto'"):
        load(Checkpoint(tiny_checkpoint("llama"), "safetensors"), load_format="gguf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama3", "qwen2"])
@torch.inference_mode()
def test_prepacking_changes_no_result(
    name: str, dtype: torch.dtype, tiny_checkpoint: Build
) -> None:
    if not can_prepack(dtype, CPU):
        pytest.skip(f"oneDNN does not multiply {dtype} on this CPU")
    model = load(Checkpoint(tiny_checkpoint(name), "safetensors"), dtype=dtype)
    embedding = model.embedding.weight.clone()
    inputs = {n: torch.randn(n, 48).to(dtype) for n in (1, 8, 33)}
    qkv = model.layers[0].attention.qkv
    before = {n: (qkv(x), model.compute_logits(Residual(x))) for n, x in inputs.items()}
    prepack(model.linears())
    assert isinstance(model.lm_head.method, Prepacked)
    assert torch.equal(model.embedding.weight, embedding), "the embedding lives on"
    for n, x in inputs.items():
        after = qkv(x), model.compute_logits(Residual(x))
        for ours, plain in zip(after, before[n], strict=True):
            torch.testing.assert_close(
                ours, plain, rtol=1e-4, atol=2e-2 if dtype != torch.float32 else 1e-5
            )
