"""Which defaults of sampling a checkpoint brings."""

import json
from pathlib import Path

import pytest

from nanovllm.checkpoint.generation_config import sampling_defaults
from nanovllm.checkpoint.locate import Checkpoint, locate
from tests.checkpoint.gguf_writing import write_gguf

QWEN3 = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "repetition_penalty": 1.05,
    "max_new_tokens": 2048,
    "transformers_version": "4.51.0",
}


def checkpoint(path: Path, content: object) -> Checkpoint:
    (path / "config.json").write_text("{}")
    (path / "generation_config.json").write_text(json.dumps(content))
    return locate(str(path))


def test_what_sampling_params_have_is_taken_and_nothing_else(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, QWEN3)
    assert sampling_defaults(found) == {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "max_tokens": 2048,
    }
    assert found.eos_token_ids() == [151643, 151645]


@pytest.mark.parametrize("content", [{}, {"temperature": None, "eos_token_id": 3}])
def test_a_file_may_say_nothing_of_it(tmp_path: Path, content: object) -> None:
    assert sampling_defaults(checkpoint(tmp_path, content)) == {}


def test_neither_may_there_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert sampling_defaults(locate(str(tmp_path))) == {}
    assert sampling_defaults(locate(str(write_gguf(tmp_path / "tiny.gguf")))) == {}


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1), ("top_p", 7), ("top_k", "x"), ("max_new_tokens", 0)]
)
def test_nonsense_is_refused_by_file_and_field(tmp_path: Path, name: str, value: object) -> None:
    found = checkpoint(tmp_path, {name: value})
    with pytest.raises(ValueError, match=r"generation_config\.json: .*generation_config=vllm"):
        sampling_defaults(found)
