"""Where the set-up found no C++ compiler, torch does all, and one line says what to install."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.kernels.native import library as native
from tests.e2e.engine import Engine


def test_one_line_says_what_to_install(
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(native, "path", lambda: None)
    model = str(tiny_checkpoint("llama"))
    engine = Engine(model=model, max_model_len=64, dtype="bfloat16")
    warnings = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert warnings == [native.HOW_TO_BUILD]
    assert any(native.HOW_TO_BUILD in note for note in engine.info.notes)
    (ids,) = engine.generate([[5, 6, 7]], SamplingParams(max_tokens=8, ignore_eos=True))
    assert len(ids) == 8
    engine.close()
