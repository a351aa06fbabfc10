"""What a worker chooses, what it reports, and whose fault it is when it cannot."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.config import EngineConfig
from nanovllm.protocol import WorkerInfo
from nanovllm.worker.worker import (
    Worker,
    choose_device,
    choose_dtype,
    choose_kv_dtype,
    choose_max_model_len,
    run_heaviest_step,
)
from tests.worker.planning import CUDA, make_plan, new_row

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 200,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "eos_token_id": [0, 7],
    "torch_dtype": "float16",
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A directory that says what the model is; load_format "dummy" needs no more."""
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    return str(tmp_path)


def make_worker(model: str, **settings: Any) -> Worker:
    fixed = {"model": model, "load_format": "dummy", "block_size": 4, "max_num_seqs": 8}
    defaults = {"device": "cpu", "dtype": "float32", "num_gpu_blocks_override": 200}
    config = EngineConfig.from_kwargs(**fixed, **{**defaults, **settings})
    return Worker(config, lambda phase, progress: None)


def start(model: str, **settings: Any) -> WorkerInfo:
    worker = make_worker(model, **settings)
    try:
        return worker.start()
    finally:
        worker.shutdown()


def test_info_tells_what_was_found(model: str) -> None:
    info = start(model, max_model_len=40)
    assert (info.device, info.dtype) == ("cpu", "float32")
    assert info.architecture == "LlamaForCausalLM"
    assert (info.num_blocks, info.max_model_len, info.vocab_size) == (200, 40, 200)
    assert info.eos_token_ids == [0, 7]
    # keys and values, 2 layers, 200 blocks of 4 tokens, 2 heads of 16, 4 bytes
    assert info.kv_cache_bytes == 2 * 2 * 200 * 4 * 2 * 16 * 4
    attention = 64 * (64 + 2 * 32) + 64 * 64
    assert info.num_parameters == 2 * (attention + 3 * 64 * 96 + 2 * 64) + 2 * 200 * 64 + 64
    assert set(info.phase_seconds) == {"locate", "build", "weights", "kv cache"}
    for reason in ("float32 as dtype asks", "attention by torch"):
        assert any(note.startswith(reason) for note in info.notes), info.notes


def test_progress_of_every_phase_starts_at_zero_and_ends_at_one(model: str) -> None:
    seen: dict[str, list[float]] = {}
    config = EngineConfig.from_kwargs(model=model, load_format="dummy", device="cpu")
    worker = Worker(config, lambda phase, progress: seen.setdefault(phase, []).append(progress))
    worker.start()
    for phase in ("locate", "build", "weights", "kv cache"):
        assert (seen[phase][0], seen[phase][-1]) == (0.0, 1.0)
        assert seen[phase] == sorted(seen[phase])


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_blocks_are_sized_by_memory_and_capped_by_use(model: str, device: str) -> None:
    info = start(model, num_gpu_blocks_override=None, device=device)
    assert info.num_blocks == 1 + 8 * 64 // 4
    block_bytes = info.kv_cache_bytes // info.num_blocks
    few = start(model, num_gpu_blocks_override=None, kv_cache_memory_bytes=20 * block_bytes)
    assert few.num_blocks == 20


@pytest.mark.parametrize("max_num_seqs", [1, 8])
def test_the_heaviest_step_stays_within_the_rows(model: str, max_num_seqs: int) -> None:
    config = EngineConfig.from_kwargs(
        model=model, load_format="dummy", device="cpu", max_num_seqs=max_num_seqs, block_size=4
    )
    worker = Worker(config, lambda phase, progress: None)
    info = worker.start()
    assert worker._runner is not None
    # The budget alone would be 2048 tokens, many times what the rows hold.
    run_heaviest_step(
        worker._runner, config.scheduler.limits("cpu"), max_model_len=info.max_model_len
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 65}, "max_model_len: 65 .* 64"),
        ({"num_gpu_blocks_override": 5}, "max_model_len"),
        ({"model": "smollm3"}, "smollm2"),
        ({"load_format": "safetensors"}, r"\.safetensors"),
    ],
)
def test_what_cannot_work_is_the_users_to_mend(
    model: str, settings: dict[str, Any], message: str
) -> None:
    config = {"model": model, "load_format": "dummy", "device": "cpu", "block_size": 4}
    worker = Worker(
        EngineConfig.from_kwargs(**{**config, **settings}), lambda phase, progress: None
    )
    with pytest.raises(ValueError, match=message):
        worker.start()
    worker.shutdown()
    worker.shutdown()


def test_fp8_weights_and_cache(model: str) -> None:
    plain = start(model)
    info = start(model, quantization="fp8", kv_cache_dtype="fp8")
    assert info.num_parameters == plain.num_parameters
    assert info.kv_cache_bytes * 4 == plain.kv_cache_bytes
    assert any(note.startswith("FP8 weights quantized at load in 8") for note in info.notes)


@pytest.mark.parametrize(
    "settings", [{}, {"quantization": "fp8"}, {"kv_cache_dtype": "fp8_e4m3"}], ids=str
)
def test_runs_plans_after_start(model: str, settings: dict[str, Any]) -> None:
    worker = make_worker(model, **settings)
    worker.start()
    plan = make_plan(0, [(2, 0, 3)], new_rows=[new_row(2, [5, 6, 7])])
    (token_id,) = worker.execute(plan).result().token_ids
    assert 0 <= token_id < 200
    worker.shutdown()
    with pytest.raises(AssertionError):
        worker.execute(plan)


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device: 'cuda'"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("native", "half", "stored", "on_cpu", "on_cuda"),
    [
        (True, True, "float32", "bfloat16", "bfloat16"),
        (False, True, "float16", "float32", "float16"),
        (False, True, None, "float32", "bfloat16"),
        (False, False, "bfloat16", "float32", "float16"),
    ],
)
def test_auto_dtype(
    monkeypatch: pytest.MonkeyPatch,
    native: bool,
    half: bool,
    stored: str | None,
    on_cpu: str,
    on_cuda: str,
) -> None:
    """native, half: whether CPU and GPU have bfloat16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: half)
    saved = None if stored is None else getattr(torch, stored)
    for device, expected in (("cpu", on_cpu), ("cuda", on_cuda)):
        dtype, why = choose_dtype("auto", torch.device(device), saved)
        assert dtype == getattr(torch, expected)
        assert why.startswith(expected)
    assert choose_dtype("float16", torch.device("cpu"), saved)[0] == torch.float16


def test_kv_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_kv_dtype("auto", cuda) is None
    assert choose_kv_dtype("fp8", cpu) == choose_kv_dtype("fp8_e4m3", cpu) == torch.float8_e4m3fn
    for capability in ((8, 9), (9, 0), (8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        if capability == (8, 0):
            with pytest.raises(ValueError, match=r"kv_cache_dtype: 'fp8' needs .* 8.9 .*'auto'"):
                choose_kv_dtype("fp8", cuda)
        else:
            assert choose_kv_dtype("fp8", cuda) == torch.float8_e4m3fn


def test_max_model_len() -> None:
    assert choose_max_model_len(None, 64) == 64
    assert choose_max_model_len(10, 64) == 10
    with pytest.raises(ValueError, match="at most 64"):
        choose_max_model_len(65, 64)
