"""The pictures of README and docs, of a real run: `python docs/screenshots.py` writes them anew.

It serves the default model with --preset classroom, asks a question, takes the page's own tour,
and photographs two of its stations and the lives of its requests, in both themes. Needs Chromium
and playwright (the extra `dev`); where Pillow is, it reduces the pictures to 256 colours. Other
flags go to `nanovllm serve`.
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

DIRECTORY = Path(__file__).parent
FLAGS = ("--preset", "classroom", "--port", "0")
QUESTION = "Name three things that a library has, as a list."
PATIENCE_MS = 180_000
STATIONS = {"light": "7", "dark": "8"}  # of the tour: a budget that is shared, and preemption


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="path of Chromium")
    parser.add_argument("--into", type=Path, default=DIRECTORY, help="where the pictures go")
    parser.add_argument("--width", type=int, default=1360, help="of the page")
    parser.add_argument("--height", type=int, default=1190, help="of the page")
    arguments, flags = parser.parse_known_args()
    if arguments.chromium is None:
        parser.error("--chromium: none was found: apt-get install chromium")
    size = {"width": arguments.width, "height": arguments.height}
    with served(*FLAGS, *flags) as url, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
        for scheme, station in STATIONS.items():
            context = browser.new_context(viewport=size, color_scheme=scheme)
            page = context.new_page()
            page.set_default_timeout(PATIENCE_MS)
            page.goto(url)
            take(page, arguments.into, scheme, station)
            context.close()
        browser.close()
    return 0


@contextmanager
def served(*flags: str) -> Iterator[str]:
    """The page's URL, as the server names it."""
    command = [sys.executable, "-m", "nanovllm", "serve", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            for line in server.stderr:
                if found := re.search(r"(http://\S+/) for people", line):
                    yield found[1]
                    return
            raise RuntimeError("the server has ended")
        finally:
            server.terminate()
            server.stderr.read()


def take(page: Any, directory: Path, scheme: str, station: str) -> None:
    page.wait_for_selector("#status[data-state=ready]")
    page.click("#settings summary")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "90")
    page.click("#settings summary")
    page.fill("#composer", QUESTION)
    page.press("#composer", "Enter")
    page.wait_for_selector(".assistant .cache")
    page.click("#tour-button")
    for number in range(1, 9):
        page.wait_for_selector(f"#tour[data-station='{number}']")
        if str(number) == station:
            page.wait_for_selector("#plan li")
            save(page, directory / f"page-{scheme}.png")
        page.click("#tour-next")
    page.wait_for_selector("#tour[data-station='9']")
    page.wait_for_selector("#rows-empty:not([hidden])")
    page.click("#tour-end")
    page.click("#tab-life")
    page.click("#gantt button:has(.tag) >> nth=4")  # one of those that waited
    page.mouse.move(2, 2)
    save(page, directory / f"life-{scheme}.png")


def save(page: Any, path: Path) -> None:
    content = page.screenshot()
    with suppress(ModuleNotFoundError):
        from PIL import Image

        shot = Image.open(io.BytesIO(content)).convert("RGB")
        few = shot.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        few.save(reduced := io.BytesIO(), "png", optimize=True)
        content = reduced.getvalue()
    path.write_bytes(content)


if __name__ == "__main__":
    sys.exit(main())
