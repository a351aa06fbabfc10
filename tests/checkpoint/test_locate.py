"""Finding a model by name, and what every form of checkpoint says about itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm.checkpoint.locate import Checkpoint, locate
from tests.checkpoint.gguf_writing import write_gguf


def write_json(path: Path, **content: object) -> None:
    path.write_text(json.dumps(content))


def test_a_directory_with_config_json(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", architectures=["LlamaForCausalLM"], eos_token_id=7)
    checkpoint = locate(str(tmp_path))
    assert checkpoint == Checkpoint(tmp_path, "safetensors")
    assert checkpoint.config()["architectures"] == ["LlamaForCausalLM"]
    assert checkpoint.eos_token_ids() == [7]


@pytest.mark.parametrize(("eos", "expected"), [(5, [5]), ([5, 9], [5, 9]), (0, [0])])
def test_generation_config_knows_best_what_ends_an_output(
    tmp_path: Path, eos: object, expected: list[int]
) -> None:
    write_json(tmp_path / "config.json", eos_token_id=7)
    write_json(tmp_path / "generation_config.json", eos_token_id=eos)
    assert locate(str(tmp_path)).eos_token_ids() == expected


def test_without_any_eos_nothing_ends_an_output(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", eos_token_id=None)
    write_json(tmp_path / "generation_config.json", temperature=0.6)
    assert locate(str(tmp_path)).eos_token_ids() == []


def test_a_gguf_file_by_name_or_by_its_directory(tmp_path: Path) -> None:
    facts = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 2}
    path = write_gguf(tmp_path / "tiny.gguf", facts=facts)
    for name in (path, tmp_path):
        checkpoint = locate(str(name))
        assert checkpoint == Checkpoint(path, "gguf")
        assert checkpoint.config()["model_type"] == "llama"
        assert checkpoint.eos_token_ids() == [2, 5]


def test_config_json_goes_before_a_gguf_beside_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    write_json(tmp_path / "config.json", model_type="llama")
    assert locate(str(tmp_path)).format == "safetensors"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_json(tmp_path / "config.json")
    assert locate("~").path == tmp_path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("smolm2", "did you mean 'smollm2'"),
        ("./nothing", "no such file or directory: ./nothing"),
        ("/no/such/model", "no such file or directory: /no/such/model"),
        ("missing.gguf", "no such file or directory: missing.gguf"),
        ("a/b/c", "no such file or directory: a/b/c"),
    ],
)
def test_unknown_names_are_answered(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        locate(name)
    assert "model" in str(caught.value)


def test_directories_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither config\.json nor a \.gguf file"):
        locate(str(tmp_path))
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name)
    with pytest.raises(ValueError, match=r"2 \.gguf files: name one"):
        locate(str(tmp_path))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"not a \.gguf file"):
        locate(str(tmp_path / "notes.txt"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        locate(str(tmp_path)).config()


# ---- the hub, played by a function


class Hub:
    """Stands in for `snapshot_download`: `local` and `remote` are directories or errors."""

    def __init__(self, local: Path | Exception, remote: Path | Exception) -> None:
        self.local, self.remote = local, remote
        self.num_downloads = 0

    def __call__(self, model: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        self.num_downloads += not local_files_only
        found = self.local if local_files_only else self.remote
        if isinstance(found, Exception):
            raise found
        return str(found)


def snapshot(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_text("{}")
    return path


def with_hub(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Hub:
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    return hub


def test_a_cached_snapshot_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = snapshot(tmp_path / "s", "config.json", "model.safetensors")
    hub = with_hub(monkeypatch, Hub(whole, OSError("no network")))
    assert locate("org/name").path == whole
    assert hub.num_downloads == 0


def test_a_snapshot_without_weights_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = snapshot(tmp_path / "partial", "config.json", "tokenizer.json")
    whole = snapshot(tmp_path / "whole", "config.json", "model.safetensors")
    hub = with_hub(monkeypatch, Hub(partial, whole))
    assert locate("org/name").path == whole
    assert hub.num_downloads == 1


def test_a_hub_out_of_reach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with_hub(monkeypatch, Hub(FileNotFoundError("not cached"), ConnectionError("no route")))
    with pytest.raises(ValueError, match=r"'org/name'.*no route.*local directory"):
        locate("org/name")


def test_finding_a_local_model_loads_neither_the_hub_nor_torch(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    program = (
        "import sys; from nanovllm.checkpoint.locate import locate; locate(sys.argv[1]).config(); "
        "print({'huggingface_hub', 'torch', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program, str(path)]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "set()\n"
