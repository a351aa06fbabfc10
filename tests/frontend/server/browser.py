"""A headless Chromium and servers for it to look at. Tests skip where there is no Chromium.

Playwright drives the system's own browser, since its download needs another network.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.frontend.server.test_serve import Program
from tests.frontend.vocabulary import CHAT_TEMPLATE, SPECIAL_TOKENS, save

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_MS = 60_000
USED = "document.querySelector('#grid').dataset.used"


def chromium_path() -> str | None:
    """`CHROMIUM` in the environment, or the first of the usual names."""
    named = os.environ.get("CHROMIUM")
    return named or next((path for name in CHROMIUMS if (path := shutil.which(name))), None)


def need_chromium() -> tuple[Any, str]:
    """Playwright's module and the browser's path; skips the test if one is missing."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install 'nanovllm[dev]'"
    )
    path = chromium_path()
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium, or set CHROMIUM to its path")
    return playwright, path


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; skips the test if there is none."""
    playwright, path = need_chromium()
    with playwright.sync_playwright() as driver:
        # Root (as in a container) may run it without its own sandbox only.
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=path, args=flags)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def synthetic_server(directory: Path, *flags: str, step_ms: float = 8.0) -> Iterator[str]:
    """The URL of `nanovllm serve` with a model that costs time only, and speaks bytes."""
    save(directory)
    settings = {"chat_template": CHAT_TEMPLATE, **SPECIAL_TOKENS}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    with server(
        *("--load-format", "synthetic", "--tokenizer", str(directory), "--step-ms", str(step_ms)),
        *("--vocab-size", "258", "--block-size", "16", "--served-model-name", "bytes"),
        *flags,
    ) as url:
        yield url


@contextmanager
def server(*flags: str) -> Iterator[str]:
    """The URL of `nanovllm serve`, ready."""
    program = Program(*flags)
    try:
        yield program.hear(r"ready after .*: (http://\S+)/v1")[1]
    finally:
        program.end()


class Visit:
    """A page that was opened, and what went wrong on it. `page` is Playwright's."""

    def __init__(self, context: Any, url: str) -> None:
        self.problems: list[str] = []
        self.page = context.new_page()
        self.page.set_default_timeout(TIMEOUT_MS)
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(url)

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def ready(self) -> "Visit":
        self.page.wait_for_selector("#status[data-state=ready]")
        return self

    def ask(self, text: str) -> None:
        self.page.fill("#composer", text)
        self.page.press("#composer", "Enter")

    def text(self, selector: str) -> str:
        found: str = self.page.locator(selector).last.inner_text()
        return found

    def data(self, selector: str, name: str) -> int:
        value = self.page.locator(selector).get_attribute(f"data-{name}")
        return int(value or 0)

    def until(self, condition: str) -> None:
        """Until this JavaScript is true. (Playwright's own waiting needs `eval`, which the page's
        policy forbids.)"""
        deadline = time.monotonic() + TIMEOUT_MS / 1e3
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, f"never true: {condition}"
            time.sleep(0.02)


@contextmanager
def visit(browser: Any, url: str, *, problems: tuple[str, ...] = (), **context: Any) -> Any:
    """Open the page, and close it; nothing may have gone wrong but what is in `problems`."""
    settings = {"viewport": {"width": 1360, "height": 900}, **context}
    opened = browser.new_context(**settings)
    try:
        visited = Visit(opened, url)
        yield visited
        unexpected = [one for one in visited.problems if not any(p in one for p in problems)]
        assert unexpected == []
    finally:
        opened.close()


def set_up(page: Visit, *, max_tokens: int, seed: int = 3) -> Visit:
    """Ready, with answers of a length."""
    page.ready()
    page.page.click("#settings summary")
    page.page.fill("#max_tokens", str(max_tokens))
    page.page.fill("#seed", str(seed))
    page.page.click("#settings summary")
    return page
