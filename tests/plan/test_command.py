"""`nanovllm plan` as a user runs it: what it prints, what it needs, how it refuses bad input."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanovllm import cli
from nanovllm.plan import command
from nanovllm.plan.memory_plan import GIB

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def test_prints_where_memory_goes_and_what_fits(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", model, "--gpu", "h200", "--max-num-seqs", "128"]) == 0
    out = capsys.readouterr().out
    assert "Qwen3ForCausalLM, 8.191 billion parameters (by config.json), bfloat16, on H200" in out
    rows = {tuple(line.split()[:2]): line.split()[-1] for line in out.splitlines() if line}
    assert rows["weights", "mlp"] == "10.12" and rows["weights", "head"] == "1.16"
    assert "144 KiB a token" in out
    lengths = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()]
    assert [length for length, _ in lengths] == ["1,024", "4,096", "8,192", "32,768", "40,960"]
    counts = [int(count) for _, count in lengths]
    assert counts == sorted(counts, reverse=True) and counts[-1] >= 1
    assert "max_num_seqs=128 run at once" in out


def test_says_what_would_do_when_it_does_not_fit(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--model", model, "--gpu-memory", "20"]) == 1
    out = capsys.readouterr().out
    assert "does not fit a GPU of 20 GiB" in out and "What would do: " in out
    assert "max_model_len=" in out and "a GPU of at least" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "H20"], "did you mean 'H200'"),
        (["--gpu-memory", "0"], "--gpu-memory: 0.0"),
        (["--gpu", "H200", "--device", "cpu"], "omit them"),
        (["--max-model-len", "40961"], "max_model_len: 40961 is more than the 40960 positions"),
    ],
)
def test_bad_input_is_named(
    model: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", model, *flags]) == cli.USAGE_ERROR
    assert message in capsys.readouterr().err


def test_this_computer_s_own_gpu_is_found(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = SimpleNamespace(stdout="NVIDIA L40S, 46068, 512\n")
    monkeypatch.setattr(command.subprocess, "run", lambda *_, **__: shown)
    assert cli.main(["plan", model]) == 0
    assert "on NVIDIA L40S (45.0 GiB)" in capsys.readouterr().out
    found = command._local_gpu()
    assert found is not None and found.taken_bytes == GIB // 2 + command.CONTEXT_BYTES


def test_without_a_gpu_it_plans_for_this_machine(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(command.subprocess, "run", missing)
    monkeypatch.setattr(command, "free_memory", lambda: 100 * GIB)
    assert cli.main(["plan", model, "--dtype", "float32", "--max-model-len", "4096"]) == 0
    assert "float32, on this machine (100.0 GiB free)" in capsys.readouterr().out
    assert cli.main(["plan", model, "--device", "cuda"]) == cli.USAGE_ERROR
    assert "--gpu-memory" in capsys.readouterr().err


def test_says_what_each_stage_of_a_pipeline_holds(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = ["--pipeline-parallel-size", "3", "--tensor-parallel-size", "2"]
    assert cli.main(["plan", model, "--gpu", "h100", *stages]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()[1:4]]
    assert [row[:2] for row in rows] == [["1", "0-11"], ["2", "12-23"], ["3", "24-35"]]
    weights = [float(row[2]) for row in rows]
    assert weights[0] == weights[2] == pytest.approx(weights[1] + 0.58, abs=0.01)  # the two ends
    assert {row[3] for row in rows} == {"24"}
    # Logits of the sampler take more room than anything else does.
    assert "each of the 2 ranks of stage 3 of 3, which has the least room, H100" in out
    assert cli.main(["plan", model, "--gpu", "h100", "--pipeline-parallel-size", "37"]) == 2
    assert "36 layers cannot be cut into 37 stages: use at most 36" in capsys.readouterr().err


def test_loads_no_torch(model: str) -> None:
    program = (
        "import sys; from nanovllm.cli import main; main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, "plan", model, "--gpu", "H200"], check=True)
