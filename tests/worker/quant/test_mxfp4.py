"""MXFP4: bytes as transformers reads them, rounding, and gpt-oss' checkpoints in that form."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.checkpoint.quantization import choose_scheme
from nanovllm.worker.kernels.triton.layer_kernels import TritonKernels
from nanovllm.worker.quant.mxfp4 import (
    BLOCK,
    MAGNITUDES,
    dequantize,
    neighbours_apart,
    round_to_nearest,
)
from nanovllm.worker.quant.packed import unpack_nibbles
from tests.worker.attention.decoding import Driver
from tests.worker.kernels.triton_device import DEVICE
from tests.worker.quant.whole_experts import assert_experts_are_those_of_one_rank

PROMPT = torch.randint(3, 160, (40,), generator=torch.Generator().manual_seed(1)).tolist()
CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def test_bytes_mean_what_transformers_makes_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(90, 160, (3, 10, 2), dtype=torch.uint8, generator=generator)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # inputs first
    for expert in range(3):
        kept = neighbours_apart(blocks[expert]).flatten(1)
        found = dequantize(kept, scales[expert], torch.float32)
        assert torch.equal(found, expected[expert].t())


def test_rounding() -> None:
    """To the nearest number there is with the block's power of two, by which its peak is 4 to 8."""
    values = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    values[0] = 0.0
    packed, scales = round_to_nearest(values)
    rounded = dequantize(packed, scales, torch.float32)
    assert torch.equal(dequantize(*round_to_nearest(rounded), torch.float32), rounded)
    blocks = values.unflatten(1, (-1, BLOCK)) / torch.exp2(scales.float() - 127)[..., None]
    peaks = blocks.abs().amax(-1)[1:]
    assert (peaks >= 4).all() and (peaks < 8).all()
    numbers = torch.tensor([*MAGNITUDES, *(-one for one in MAGNITUDES)])
    least = (blocks[..., None] - numbers).abs().amin(-1)
    found = rounded.unflatten(1, (-1, BLOCK)) / torch.exp2(scales.float() - 127)[..., None]
    torch.testing.assert_close((found - blocks).abs(), least)


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]
) -> tuple[Path, Path]:
    """gpt-oss with experts in MXFP4, and the same model in fp32."""
    source = tiny_checkpoint("gpt_oss_blocks")
    target, plain = (tmp_path_factory.mktemp(name) for name in ("mxfp4", "plain"))
    fields = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(fields | {"quantization_config": CONFIG}))
    (plain / "config.json").write_text(json.dumps(fields))
    tensors, means = {}, {}
    for name, values in load_file(source / "model.safetensors").items():
        tensors[name] = means[name] = values
        if values.dim() < 3:
            continue
        num_experts, num_inputs, num_outputs = values.shape
        weight, scales = round_to_nearest(values.transpose(1, 2).reshape(-1, num_inputs))
        wide = dequantize(weight, scales, torch.float32).view(num_experts, num_outputs, num_inputs)
        means[name] = wide.transpose(1, 2).contiguous()
        del tensors[name]
        codes = unpack_nibbles(weight, num_inputs)
        pairs = codes[:, ::2] | codes[:, 1::2] << 4  # as files have them
        tensors[f"{name}_blocks"] = pairs.view(num_experts, num_outputs, -1, BLOCK // 2)
        tensors[f"{name}_scales"] = scales.view(num_experts, num_outputs, -1)
    save_file(tensors, target / "model.safetensors")
    save_file(means, plain / "model.safetensors", metadata={"format": "pt"})
    return target, plain


def test_whole_experts_stay_as_they_are(pair: tuple[Path, Path]) -> None:
    """Also where ranks would cut them within a block: 96 inputs by 4."""
    checkpoint = Checkpoint(pair[0], "safetensors")
    scheme = choose_scheme(None, checkpoint.config())
    assert_experts_are_those_of_one_rank(checkpoint, scheme, size=4)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="kernels run on the CPU if interpreted only")
@pytest.mark.parametrize("fused", [False, True])
@torch.inference_mode()
def test_checkpoints_with_experts_in_mxfp4(pair: tuple[Path, Path], *, fused: bool) -> None:
    checkpoint = Checkpoint(pair[0], "safetensors")
    scheme = choose_scheme(None, checkpoint.config())
    kernels = TritonKernels() if fused else None
    driver = Driver.load(checkpoint, scheme=scheme, kernels=kernels)
    kinds = [linear.method.kind for linear in driver.model.linears()]
    assert kinds.count("mxfp4") == 2 * 5 * 3 and len(kinds) == 2 * 5 * 3 + 2 * 3 + 1
    reference = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32).eval()
    expected = reference(torch.tensor([PROMPT]), use_cache=False).logits[0]
    logits = [driver.run({"a": chunk})["a"] for chunk in (PROMPT[:30], PROMPT[30:39], PROMPT[39:])]
    torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-5, atol=3e-5)
