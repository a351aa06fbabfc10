"""An address for a fake core, and a process to own beside it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm.frontend import async_llm, chat_template
from tests.frontend.attached import Handle, idle_process
from tests.frontend.vocabulary import byte_tokenizer


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/core.sock"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine takes its time to start what renders a template."""
    monkeypatch.setattr(chat_template, "TIMEOUT_S", 60.0)


@pytest.fixture
def handle(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Handle]:
    handle = Handle(address, idle_process())
    monkeypatch.setattr(async_llm, "start_cores", lambda config: [handle])
    monkeypatch.setattr(async_llm.Tokenizer, "load", lambda name: byte_tokenizer())
    yield handle
    handle.close()
