"""A browser for each module of tests of the page, and a server of each kind for all of them."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.frontend.server.browser import chromium, need_chromium, synthetic_server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Playwright runs an event loop in this thread, where asynchronous tests of other modules need
    their own, so it does not outlive its module."""
    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def has_browser() -> None:
    need_chromium()


@pytest.fixture(scope="session")
def url(has_browser: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A small engine, so that requests wait, and chunks are cut."""
    flags = ("--num-gpu-blocks-override", "300", "--max-model-len", "1024", "--max-num-seqs", "4")
    directory = tmp_path_factory.mktemp("tokenizer")
    with synthetic_server(directory, *flags, "--max-num-batched-tokens", "128") as found:
        yield found


@pytest.fixture(scope="session")
def classroom(has_browser: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One that may be held; its tokens are bytes, so its cache is as small as the preset's."""
    flags = ("--preset", "classroom", "--num-gpu-blocks-override", "130", "--max-model-len", "1536")
    directory = tmp_path_factory.mktemp("tokenizer")
    with synthetic_server(directory, *flags, step_ms=1.0) as found:
        yield found


@pytest.fixture(scope="session")
def large(has_browser: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One of 12,000 blocks that may be held."""
    flags = ("--num-gpu-blocks-override", "12000", "--max-model-len", "1024", "--allow-debug")
    with synthetic_server(tmp_path_factory.mktemp("tokenizer"), *flags) as found:
        yield found
