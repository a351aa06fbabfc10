"""Kernels are compiled ahead into Triton's cache, by a program that needs no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanovllm.config import SchedulerConfig
from nanovllm.worker import triton_precompile
from nanovllm.worker.cuda_graph import StepShape
from nanovllm.worker.models.registry import spec_from_config
from nanovllm.worker.precompile import start
from nanovllm.worker.triton_precompile import Collector, typical

TIMEOUT_S = 200.0


CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def precompile() -> int:
    """For a model that takes few sizes of steps; returns how the program ended."""
    attention = spec_from_config(CONFIG).attention_spec(
        block_size=16, dtype=torch.bfloat16, device=torch.device("cuda", 0)
    )
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64).limits("cuda")
    program = start(CONFIG, attention, limits, max_model_len=128, gpu=((9, 0), 132))
    return program.wait(TIMEOUT_S)


def test_what_steps_launch_is_compiled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert precompile() == 0
    compiled = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.cubin")}
    names = {path.stem for path in compiled}
    assert {"decode_kernel", "prefill_kernel", "_matrix_kernel", "_vector_kernel"} <= names
    assert {"_expand_kernel", "plan_kernel", "_segments_kernel", "_choose_kernel"} <= names
    assert precompile() == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.cubin")} == compiled


def test_one_step_stands_for_those_that_launch_the_same() -> None:
    shapes = [StepShape(size, size) for size in (1, 2, 4, 8, 16, 24, 32, 40)]
    shapes += [StepShape(tokens, 16) for tokens in (32, 48, 64)]
    kept = [(1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (24, 24), (40, 40), (32, 16), (48, 16)]
    assert list(typical(shapes)) == kept


def test_nothing_more_is_compiled_once_nobody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    collector = Collector()
    futures = [collector.submit(lambda name=name: (tmp_path / name).touch()) for name in "abc"]
    collector.share_out(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    assert all(future.done() for future in futures)
    collector = Collector()
    collector.submit((tmp_path / "late").touch)
    monkeypatch.setattr(triton_precompile.os, "getppid", lambda: gone.pid)
    collector.share_out(1)
    assert not (tmp_path / "late").exists()
