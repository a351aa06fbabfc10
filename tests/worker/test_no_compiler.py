"""Without native kernels for this Python torch does all, and one line says what to do about it."""

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.kernels.native import library as native
from tests.e2e.engine import Engine


@pytest.mark.parametrize("cause", ["no compiler", "an older build", "another build"])
def test_one_line_says_what_to_do(
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cause: str,
) -> None:
    if cause == "no compiler":
        expected = native.HOW_TO_BUILD
        monkeypatch.setattr(native, "path", lambda: None)
    else:
        expected = native.HOW_TO_REBUILD
        monkeypatch.setattr(native, "path", lambda: Path(msgspec._core.__file__))
        if cause == "another build":
            monkeypatch.setattr(native, "_interface_of", lambda found: native.INTERFACE + 1)
    model = str(tiny_checkpoint("llama"))
    engine = Engine(model=model, max_model_len=64, dtype="bfloat16")
    warnings = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert warnings == [expected]
    assert any(expected in note for note in engine.info.notes)
    (ids,) = engine.generate([[5, 6, 7]], SamplingParams(max_tokens=8, ignore_eos=True))
    assert len(ids) == 8
    engine.close()
