"""The page in a real browser: it chats, shows the engine at work, and is usable by everybody."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.frontend.server.browser import USED, Visit, server, set_up, synthetic_server, visit
from tests.waiting import WAIT_S

# Of the bar of a row, which the page has while a request runs.
MOVES = """() => {
    const bar = document.createElement('p');
    bar.className = 'progress';
    bar.append(document.createElement('i'));
    document.body.append(bar);
    return getComputedStyle(bar.firstChild).transitionDuration;
}"""
LONG = "x" * 300  # 300 tokens: the model speaks bytes


def test_a_chat_streams_and_shows_what_the_cache_saved(browser: Any, url: str) -> None:
    with visit(browser, url) as page:
        set_up(page, max_tokens=60)
        page.page.evaluate(
            """() => { window.lengths = new Set();
            new MutationObserver(() => window.lengths.add(
                document.querySelector('.assistant .text')?.innerText.length ?? 0
            )).observe(document.querySelector('#messages'), {childList: true, subtree: true}); }"""
        )
        page.ask(LONG)
        page.page.wait_for_selector(".assistant .cache")
        assert page.page.evaluate("window.lengths.size") > 2, "it came bit by bit"
        facts = page.text(".assistant .facts")
        assert re.search(r"^\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ m?s", facts)
        assert "none from the cache" in page.text(".assistant .cache")
        page.ask("again")
        page.page.wait_for_selector("article:nth-of-type(4) .cache")
        found = re.search(r"(\d+) of (\d+) prompt tokens from the cache", page.text(".cache"))
        assert found is not None
        cached, total = int(found[1]), int(found[2])
        assert 304 <= cached < total and cached % 16 == 0
        page.page.locator(".cache summary").last.click()
        page.page.wait_for_selector(".tokens .computed")
        assert page.page.locator(".tokens .from-cache").count() == cached
        assert page.page.locator(".tokens .computed").count() == total - cached


def test_an_answer_can_be_stopped_and_the_chat_begun_anew(browser: Any, url: str) -> None:
    with visit(browser, url) as page:
        set_up(page, max_tokens=700)
        page.ask("go on for long")
        page.until("document.querySelector('.assistant .text').innerText.length > 5")
        page.page.keyboard.press("Escape")
        page.until("document.querySelector('.facts').innerText.includes('stopped')")
        page.until(f"{USED} === '0'")
        assert page.page.locator("#send").is_visible() and page.page.locator("#stop").is_hidden()
        page.page.click("#new-chat")
        assert page.page.locator("#welcome").is_visible()
        page.page.click(".idea:first-child")
        page.page.wait_for_selector(".assistant .text")
        page.page.click("#stop")
        page.until("document.querySelector('.facts').innerText.includes('stopped')")


def test_the_engine_moves_under_load_and_comes_to_rest(browser: Any, url: str) -> None:
    with visit(browser, url) as page:
        page.ready()
        steps = page.data("#steps", "count")
        page.page.click("#load-button")
        page.until(f"Number({USED}) > 20")
        page.until("Number(document.querySelector('#grid').dataset.shared) > 0")  # they begin alike
        page.until("document.querySelector('#rows').innerText.includes('waits for a seat')")
        assert page.page.locator("#rows li").count() >= 5
        drawn = page.page.locator("#grid").screenshot()
        page.until(f"{USED} === '0'")
        assert page.data("#grid", "cached") > 10
        assert page.page.locator("#grid").screenshot() != drawn
        assert page.data("#steps", "count") > steps + 40
        page.until("document.querySelectorAll('#rows li').length === 0")
        figures = page.page.locator(".tile strong").all_inner_texts()
        assert re.fullmatch(r"[\d.]+ m?s", figures[1]) and re.fullmatch(r"[\d.]+ ms", figures[2])
        assert 0 < int(figures[3].removesuffix(" %")) < 100


def test_a_block_tells_its_tokens_and_its_hash(browser: Any, url: str) -> None:
    with visit(browser, url) as page:
        set_up(page, max_tokens=8)
        page.ask("0123456789" * 3)
        page.page.wait_for_selector(".assistant .cache")
        page.until("Number(document.querySelector('#grid').dataset.cached) > 0")
        # Whichever it is: earlier tests have used blocks as well.
        with httpx.Client(base_url=url, timeout=WAIT_S) as client:
            texts = {i: block_text(client, i) for i in range(1, 300)}
        (block_id,) = (i for i, text in texts.items() if text == "1234567890123456")
        page.page.focus("#grid")
        for _ in range(block_id):
            page.page.keyboard.press("ArrowRight")
        page.page.wait_for_selector("#inspector .tokens")
        shown = page.text("#inspector").replace("\n", "")
        assert shown.startswith(f"Block {block_id} cached, but free")
        assert re.search(r"hash [0-9a-f]{12}… after [0-9a-f]{12}…1234567890123456", shown)
        page.page.mouse.move(5, 5)
        page.page.locator("#composer").focus()
        assert "Point at a block" in page.text("#inspector")
        page.page.locator("#grid").hover(position={"x": 5, "y": 5})
        page.until("document.querySelector('#inspector').innerText.includes('Block 1 ')")


def block_text(client: httpx.Client, block_id: int) -> str:
    texts: list[str] = client.get(f"/v1/engine/blocks/{block_id}").json()["texts"]
    return "".join(texts)


def test_a_life_is_told_and_exported_as_a_chrome_trace(browser: Any, url: str) -> None:
    with visit(browser, url) as page:
        set_up(page, max_tokens=40, seed=5)
        page.ask(LONG)
        page.page.wait_for_selector(".assistant .cache")
        num_tokens = int(page.text(".assistant .facts").split()[0])
        page.page.click(".facts .link")
        page.page.wait_for_selector("#story li:last-child:has-text('Ended')")
        story = page.text("#story")
        for part in ("Queued with a prompt", "Started after", "The first token", "decode steps"):
            assert part in story
        with page.page.expect_download() as download:
            page.page.click("#trace-button")
        trace = json.loads(Path(download.value.path()).read_text())
    events = trace["traceEvents"]
    spans = [one for one in events if one["ph"] == "X"]
    assert all(one["dur"] > 0 and one["ts"] >= 0 for one in spans)
    assert {one["ph"] for one in events} == {"M", "X", "i"}
    prefills = [one["args"] for one in spans if one["name"] == "prefill"]
    assert all(one["tokens"] <= 128 for one in prefills), "cut by the budget"
    for before, after in pairwise(prefills):
        assert after["start"] == before["start"] + before["tokens"]
    decodes = [one for one in spans if one["name"] == "decode"]
    assert len(decodes) == num_tokens - 1
    steps = {one["args"]["step"] for one in spans if one["pid"] == 2 and "step" in one["args"]}
    assert {f"step {step}" for step in steps} == {one["name"] for one in spans if one["pid"] == 1}
    marks = [one["name"] for one in events if one["ph"] == "i"]
    assert marks[0] == "queued" and "first token" in marks and marks[-1].startswith("ended: ")


def test_everything_can_be_done_with_the_keyboard(browser: Any, url: str) -> None:
    with visit(browser, url) as page:
        set_up(page, max_tokens=6)
        active = "document.activeElement.id"
        page.page.locator("#grid").focus()
        page.page.keyboard.press("/")
        assert page.page.evaluate(active) == "composer"
        page.page.keyboard.type("to /you?")
        page.page.keyboard.press("Shift+Enter")
        page.page.keyboard.type("t")
        assert page.page.input_value("#composer") == "to /you?\nt", "no shortcuts while typing"
        page.page.keyboard.press("Enter")
        page.page.wait_for_selector(".assistant .cache")
        page.page.locator("#new-chat").focus()
        page.page.keyboard.press("r")
        assert page.page.locator("#panel-life").is_visible()
        assert page.page.evaluate(active) == "tab-life"
        page.page.keyboard.press("ArrowLeft")
        assert page.page.locator("#panel-engine").is_visible()
        page.page.locator("#steps").focus()
        page.page.keyboard.press("End")
        assert page.text("#plan").startswith("Step ")
        page.page.keyboard.press("?")
        assert page.page.locator("#help").is_visible()
        page.page.keyboard.press("Escape")
        assert page.page.locator("#help").is_hidden()
        page.page.evaluate("document.activeElement.blur()")
        reached = set()
        for _ in range(60):
            page.page.keyboard.press("Tab")
            reached.add(page.page.evaluate(active))
        assert {"theme-button", "composer", "messages", "grid", "steps", "load-button"} <= reached


def test_every_control_has_a_name(browser: Any, url: str) -> None:
    with visit(browser, url) as page:
        page.ready()
        nameless = page.page.evaluate(
            """() => [...document.querySelectorAll('button, input, textarea, [role], canvas')]
            .filter((one) => one.id !== 'tip') // its words come with the term
            .filter((one) => !one.closest('[aria-hidden=true]') && one.ariaHidden !== 'true')
            .filter((one) => !(one.ariaLabel || one.getAttribute('aria-labelledby')
                || one.innerText || one.textContent.trim() || one.labels?.length))
            .map((one) => one.outerHTML)"""
        )
        assert nameless == []


@pytest.mark.parametrize("width", [340, 700])
def test_narrow_screens_have_one_panel_and_nothing_sticks_out(
    browser: Any, url: str, width: int
) -> None:
    with visit(browser, url, viewport={"width": width, "height": 700}) as page:
        set_up(page, max_tokens=10)
        page.ask(LONG)
        page.page.wait_for_selector(".assistant .cache")
        for name in ("engine", "life", "chat"):
            page.page.click(f"#tab-{name}")
            shown = [one for one in ("chat", "engine", "life") if is_shown(page, one)]
            assert shown == [name]
            for element in ("document.documentElement", f"document.querySelector('#panel-{name}')"):
                assert page.page.evaluate(f"{element}.scrollWidth <= {element}.clientWidth"), name
        page.page.click(".facts .link")
        assert is_shown(page, "life")


def is_shown(page: Visit, name: str) -> bool:
    shown: bool = page.page.locator(f"#panel-{name}").is_visible()
    return shown


def contrast(page: Visit, text: str, ground: str) -> float:
    """WCAG's ratio of two of the theme's colours."""
    ratio: float = page.page.evaluate(
        """([text, ground]) => {
        const style = getComputedStyle(document.documentElement);
        const light = (name) => {
            const hex = style.getPropertyValue('--' + name).trim().slice(1);
            const parts = [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255)
                .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
            return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] + 0.05;
        };
        const [a, b] = [light(text), light(ground)];
        return Math.max(a, b) / Math.min(a, b); }""",
        [text, ground],
    )
    return ratio


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_dark_and_light(browser: Any, url: str, scheme: str) -> None:
    other = {"dark": "light", "light": "dark"}[scheme]
    theme = "document.documentElement.dataset.theme"
    with visit(browser, url, color_scheme=scheme) as page:
        page.ready()
        for expected in (scheme, other):
            assert page.page.evaluate(theme) == expected
            for ground in ("bg", "panel", "raised"):
                assert contrast(page, "ink", ground) > 7
                assert contrast(page, "muted", ground) > 4.5
            assert contrast(page, "on-accent", "accent") > 4.5
            page.page.click("#theme-button")
        page.page.locator("#theme-button").press("t")
        page.page.reload()
        page.ready()
        assert page.page.evaluate(theme) == other, "it is remembered"
        page.page.click("#theme-button")
        page.page.emulate_media(color_scheme=other)
        page.until(f"{theme} === '{other}'")  # back at the system's, and follows it


def test_reduced_motion_is_honoured(browser: Any, url: str) -> None:
    with visit(browser, url, reduced_motion="reduce") as page:
        assert page.ready().page.evaluate(MOVES) == "0s"
    with visit(browser, url) as page:
        assert page.ready().page.evaluate(MOVES) != "0s"


def test_text_is_never_markup(browser: Any, url: str) -> None:
    evil = "<img src=x onerror='document.title=\"owned\"'><b>bold</b> `<i>` **<u>**"
    with visit(browser, url) as page:
        set_up(page, max_tokens=200)
        page.ask(evil)
        page.page.wait_for_selector(".assistant .cache")
        assert "<img src=x" in page.text(".user") and page.page.title() == "nanovllm"
        assert (
            page.page.locator(".messages img, .messages b, .messages i:not(.share i)").count() == 0
        )


def test_a_key_is_asked_for_and_kept(browser: Any, tmp_path: Path) -> None:
    refusals = ("401",)
    flags = ("--api-key", "secret", "--page", "counts")
    with synthetic_server(tmp_path, *flags) as url, visit(browser, url, problems=refusals) as page:
        page.page.wait_for_selector("#key[open]")
        assert page.page.locator("#status").get_attribute("data-state") == "locked"
        for key in ("wrong", "secret"):
            page.page.wait_for_selector("#key[open]")
            page.page.fill("#key-input", key)
            page.page.keyboard.press("Enter")
        page.ready()
        page.ask("hi")
        page.page.wait_for_selector(".assistant .cache")
        page.page.locator("#grid").click(position={"x": 5, "y": 5})
        assert "does not show what is in blocks" in page.text("#inspector")
        page.page.reload()
        page.ready()
        assert page.page.locator("#key").is_hidden()


def test_a_server_that_shows_no_engine_still_chats(browser: Any, tmp_path: Path) -> None:
    with (
        synthetic_server(tmp_path, "--page", "off") as url,
        visit(browser, url, problems=("403",)) as page,
    ):
        page.page.wait_for_selector("#engine-notice:has-text('--page')")
        page.ask("hi")
        page.page.wait_for_selector(".assistant .cache")


@pytest.mark.model
def test_with_a_real_model(browser: Any, smollm2_path: Path) -> None:
    flags = ("--max-model-len", "1024", "--num-gpu-blocks-override", "200")
    with server(str(smollm2_path), *flags) as url, visit(browser, url) as page:
        page.ready()
        page.page.set_default_timeout(120_000)
        page.page.click("#settings summary")
        page.page.fill("#temperature", "0")
        page.page.fill("#max_tokens", "24")
        page.ask("What is the capital of Japan?")
        page.page.wait_for_selector(".assistant .cache")
        messages = [{"role": "user", "content": "What is the capital of Japan?"}]
        body = {"messages": messages, "temperature": 0, "max_tokens": 24}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()
        whole = answer["choices"][0]["message"]["content"]
        assert page.text(".assistant .text").strip() == whole.strip() != ""
        # The short answer may be over between two pictures of the grid; a long one is not.
        page.page.fill("#max_tokens", "800")
        page.ask("Write a long story about every city of France.")
        page.until(f"Number({USED}) > 0")
        page.page.click(".facts .link >> nth=0")
        page.page.wait_for_selector("#story li:last-child:has-text('Ended')")
