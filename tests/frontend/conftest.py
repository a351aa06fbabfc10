"""Runs `async def` tests, each in an event loop of its own, and gives them addresses."""

import asyncio
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.frontend import async_llm
from tests.frontend.attached import Handle
from tests.frontend.vocabulary import byte_tokenizer

ASYNC_TIMEOUT_S = 30.0


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: Any) -> bool | None:
    """A test that waits for ever fails instead."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    test = pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names})
    asyncio.run(asyncio.wait_for(test, ASYNC_TIMEOUT_S))
    return True


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
