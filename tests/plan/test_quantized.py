"""What `nanovllm plan` foresees of quantized checkpoints is what their weights take."""

import math
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.checkpoint.model_size import read_model_size
from nanovllm.checkpoint.quantization import (
    WeightFormat,
    bytes_per_linear_weight,
    choose_scheme,
    is_copied,
)
from nanovllm.config import EngineConfig
from nanovllm.plan.command import choose_machine, make_plan
from tests.worker.quant.layouts import FORMATS, write
from tests.worker.quant.test_layouts import load
from tests.worker.test_weights import as_gguf, wider

UNCOUNTED = 0.1  # scales of whole outputs, which are 64 wide here; of blocks, their type


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_of_layers(name: str, tmp_path: Path) -> None:
    (source := tmp_path / "plain").mkdir()
    write(wider("llama", source), tmp_path, *FORMATS[name])
    checkpoint = Checkpoint(tmp_path, "safetensors")
    size = read_model_size(checkpoint)
    scheme = choose_scheme(None, checkpoint.config())
    each = bytes_per_linear_weight(size.spec, scheme, value_bytes=2)
    planned = each * (size.parameters["attention"] + size.parameters["mlp"])
    layers = load(tmp_path).model.layers
    taken = sum(
        tensor.nbytes
        for layer in layers
        for linear in layer.linears()
        for tensor in linear.method.tensors(linear)
    )
    assert planned == pytest.approx(taken, rel=UNCOUNTED)


def test_the_plan_of_a_packed_checkpoint_counts_all_its_weights(tmp_path: Path) -> None:
    """Its files hold words of eight weights, which are no parameters."""
    (source := tmp_path / "plain").mkdir()
    plain = wider("llama", source)
    write(plain, tmp_path, *FORMATS["awq 32"])
    plans = []
    for path in (plain, tmp_path):
        config = EngineConfig.from_kwargs(model=str(path), device="cuda", dtype="bfloat16")
        plans.append(make_plan(config, choose_machine(config, gpu="H100", gpu_memory=None)))
    one, other = plans
    assert one.size.num_parameters == other.size.num_parameters
    ratio = (4 + 24 / 32) / 16
    for group in ("attention", "mlp"):
        assert other.weight_bytes[group] == pytest.approx(one.weight_bytes[group] * ratio, rel=1e-3)
    for group in ("embedding", "head", "norms"):
        assert other.weight_bytes[group] == one.weight_bytes[group]


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # a head of its own, and a tied one
@pytest.mark.parametrize("name", ["Q4_1", "Q8_0"])
def test_the_plan_of_a_file_counts_what_it_holds(name: str, family: str, tmp_path: Path) -> None:
    """On a GPU, and on a CPU that runs whole steps by native kernels, where all of it is kept as it
    is stored: by its header alone."""
    (source := tmp_path / "plain").mkdir()
    path, kind = tmp_path / "m.gguf", GGMLQuantizationType[name]
    checkpoint, _ = as_gguf(wider(family, source), path, architecture=family, kind=kind)
    tensors = checkpoint.gguf.tensors
    matrices = sum(one.raw.nbytes for one in tensors.values() if len(one.shape) > 1)
    vectors = sum(math.prod(one.shape) for one in tensors.values() if len(one.shape) == 1)
    for device, gpu, bytes_of_norms in (("cuda", "H100", 2), ("cpu", None, 4)):
        config = EngineConfig.from_kwargs(model=str(path), device=device, dtype="bfloat16")
        plan = make_plan(config, choose_machine(config, gpu=gpu, gpu_memory=None))
        taken = sum(plan.weight_bytes.values())
        assert taken == pytest.approx(matrices + bytes_of_norms * vectors, rel=2e-2)


@pytest.mark.parametrize(("gpu_dtype", "each"), [("bfloat16", 3), ("float16", 1)])
def test_the_plan_counts_unquantized_copies_of_small_fp8_layers(
    gpu_dtype: str, each: int, tmp_path: Path
) -> None:
    """Where FP8 is multiplied as it is: bfloat16 on a GPU. A large layer has none."""
    plain = wider("llama", tmp_path)
    config = EngineConfig.from_kwargs(
        model=str(plain), device="cuda", dtype=gpu_dtype, quantization="fp8"
    )
    plan = make_plan(config, choose_machine(config, gpu="H100", gpu_memory=None))
    for group in ("attention", "mlp"):
        assert plan.weight_bytes[group] == each * plan.size.parameters[group]


@pytest.mark.parametrize(
    ("num_weights", "parts", "expected"),
    [
        (2**23 - 1, ["gate", "up"], True),
        (2**23, ["gate", "up"], False),
        (2**20, ["expert_down"], False),
    ],
)
def test_which_layers_are_copied(num_weights: int, parts: list[str], expected: bool) -> None:
    assert is_copied(WeightFormat("fp8"), parts, num_weights) is expected
    assert not is_copied(WeightFormat("int8"), parts, num_weights)
    assert not is_copied(None, parts, num_weights)
