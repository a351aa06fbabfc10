"""An address for a fake core, and a process to own beside it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm.frontend import async_llm
from tests.frontend.attached import Handle
from tests.frontend.vocabulary import byte_tokenizer


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/core.sock"


@pytest.fixture
def handle(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Handle]:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    handle = Handle(address, subprocess.Popen(command))
    monkeypatch.setattr(async_llm, "start_core", lambda config: handle)
    monkeypatch.setattr(async_llm.Tokenizer, "load", lambda name: byte_tokenizer())
    yield handle
    handle.close()
