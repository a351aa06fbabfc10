"""The page as a lesson and as a chat: the tour, single steps, the grid, Markdown, what survives."""

import json
import re
from importlib import resources
from typing import Any

import pytest

from tests.frontend.server.browser import USED, Visit, set_up, visit

AXE = resources.files("axe_playwright_python") / "axe.min.js"
TOUR_MS = 120_000  # for one station
MARKDOWN = """# A title

Some *words*, **strong** ones and `code`, [a link](https://example.org) and [another](javascript:x).

- one
- two
  1. first
  2. second

| name | count |
|---|--:|
| <b>a</b> | 1 |

```python
print("<i>")
```
> said <img src=x onerror=alert(1)>
"""


def hold(page: Visit) -> None:
    """Once nobody who was there before holds the engine any more."""
    page.page.wait_for_selector("#hold[aria-pressed=false]")
    page.page.click("#hold")
    page.page.wait_for_selector("#hold[aria-pressed=true]")


def go_on(page: Visit) -> None:
    page.page.click("#hold")
    page.page.wait_for_selector("#hold[aria-pressed=false]")


def take_step(page: Visit) -> str:
    """What the plan of the next step says."""
    before = page.page.locator("#plan").get_attribute("data-step") or "-1"
    page.page.click("#step")
    page.page.wait_for_selector(f"#plan[data-step]:not([data-step='{before}']):not([data-step=''])")
    return page.text("#plan").replace("\n", " ")


# ---- the lesson


def test_the_tour_runs_on_the_live_engine(browser: Any, classroom: str) -> None:
    with visit(browser, classroom) as page:
        page.ready()
        page.page.click("#tour-button")
        told = []
        for station in range(1, 10):
            page.page.wait_for_selector(f"#tour[data-station='{station}']", timeout=TOUR_MS)
            told.append(page.text("#tour-text"))
            is_held = "true" if station < 9 else "false"
            page.page.wait_for_selector(f"#hold[aria-pressed={is_held}]", timeout=TOUR_MS)
            if station == 7:
                page.page.wait_for_selector("#plan li:has-text('wait for')")
            page.page.click("#tour-next")
        assert re.search(r"has become \d+ tokens", told[0]) and "one of 4 seats" in told[1]
        assert "tokens 0 to 64" in told[2] and "64 tokens: that is the budget" in told[2]
        blocks = re.search(r"holds (\d+) blocks", told[3])
        assert blocks is not None and int(blocks[1]) > 16
        assert "decodes" in told[4] and re.search(r"[1-9]\d+ of its \d+ tokens were", told[5])
        assert re.search(r"[1-9] requests? waits?", told[6]) and told[7].startswith("All grow")
        assert page.page.locator("#tour").is_hidden()
        page.until(f"{USED} === '0'")  # nothing of it is left running


def test_a_tour_may_be_ended_at_any_station(browser: Any, classroom: str) -> None:
    with visit(browser, classroom) as page:
        page.ready()
        page.page.click("#tour-button")
        page.page.wait_for_selector("#tour[data-station='1']")
        page.page.click("#tour-end")
        page.page.wait_for_selector("#hold[aria-pressed=false]")
        page.until("document.querySelectorAll('#rows li').length === 0")


def test_the_engine_is_taken_step_by_step(browser: Any, classroom: str) -> None:
    with visit(browser, classroom) as page:
        set_up(page, max_tokens=5, seed=11)
        hold(page)
        assert "Held" in page.text("#pace-text")
        page.ask("y" * 150)
        page.page.wait_for_selector("#rows li:has-text('waits for the next step')")
        uid = page.text("#rows .tag")
        plan = take_step(page)
        assert (
            "ran 64 tokens" in plan and "More of it does not fit the budget" in plan and uid in plan
        )
        plan = take_step(page)
        assert "tokens 64 to 128" in plan
        plan = take_step(page)
        assert "That is the rest of its prompt" in plan
        page.page.locator("#tab-engine").focus()
        page.page.keyboard.press("s")
        page.page.wait_for_selector("#plan:has-text('1 decode')")
        assert page.page.locator(".assistant .cache").count() == 0, "its answer is held as well"
        page.page.keyboard.press("p")
        page.page.wait_for_selector(".assistant .cache")
        assert page.page.get_attribute("#hold", "aria-pressed") == "false"


def test_an_engine_that_may_not_be_held_offers_nothing(browser: Any, url: str) -> None:
    with visit(browser, url) as page:
        page.ready()
        page.until("document.querySelector('#grid').dataset.shown !== undefined")
        assert page.page.locator("#controls").is_hidden()


def test_terms_are_told_where_they_stand(browser: Any, url: str) -> None:
    with visit(browser, url) as page:
        page.ready()
        term = page.page.locator("#cache-card .term")
        term.focus()
        assert "kept in blocks" in page.text("#tip:popover-open")
        assert term.get_attribute("aria-describedby") == "tip"
        page.page.keyboard.press("Escape")
        assert page.page.locator("#tip").is_hidden()
        page.page.hover("#steps-card .term")
        assert "One forward pass" in page.text("#tip:popover-open")


# ---- the grid


def test_all_of_a_small_cache_is_shown(browser: Any, url: str) -> None:
    with visit(browser, url) as page:
        page.ready()
        page.until("document.querySelector('#grid').dataset.shown === '299'")
        assert page.data("#grid", "first") == 0 and page.data("#grid", "size") >= 10


def test_of_a_large_cache_what_is_used_is_shown_large(browser: Any, large: str) -> None:
    with visit(browser, large) as page:
        page.ready()
        hold(page)
        page.page.click("#load-button")
        page.until("document.querySelectorAll('#rows li').length === 8")
        take_step(page)
        page.until(f"Number({USED}) > 20")
        first, shown = page.data("#grid", "first"), page.data("#grid", "shown")
        assert first == 0 and page.data("#grid", "size") >= 10
        assert page.data("#grid", "used") < shown < 2000, "the rest is in the bar above"
        page.page.focus("#grid")
        page.page.keyboard.press("ArrowRight")  # to the first of those shown
        page.page.keyboard.press("End")
        page.page.wait_for_selector("#inspector:has-text('free')")
        assert page.data("#grid", "first") > first, "the grid follows"
        page.page.locator("#overview").click(position={"x": 2, "y": 5})
        page.until("document.querySelector('#grid').dataset.first === '0'")
        go_on(page)
        page.until(f"{USED} === '0'")


def test_no_request_has_the_colour_of_decodes(browser: Any, url: str) -> None:
    with visit(browser, url) as page:
        page.ready()
        hues = page.page.evaluate(
            """async () => { const { hueOf } = await import('/page/dom.js');
            return [...Array(200).keys()].map((uid) => Number(hueOf(uid).split(' ')[2])); }"""
        )
    assert all(not 61 < hue < 129 for hue in hues) and len(set(hues)) == 200


# ---- the chat


def restore(page: Visit, *messages: tuple[str, str]) -> None:
    kept = [{"role": role, "content": content} for role, content in messages]
    page.page.evaluate("(kept) => localStorage.setItem('nanovllm-chat', kept)", json.dumps(kept))
    page.page.reload()
    page.ready()


def test_answers_are_markdown_and_never_markup(browser: Any, url: str) -> None:
    with visit(browser, url) as page:
        page.ready()
        restore(page, ("user", "<b>hi</b>"), ("assistant", MARKDOWN))
        answer = page.page.locator(".assistant .text")
        assert answer.locator("h2").inner_text() == "A title"
        assert answer.locator("ul > li").count() == 2 and answer.locator("li ol > li").count() == 2
        assert answer.locator("td").all_inner_texts() == ["<b>a</b>", "1"]
        assert answer.locator("pre code").inner_text() == 'print("<i>")'
        assert answer.locator("em, strong, p code").all_inner_texts() == ["words", "strong", "code"]
        links = answer.locator("a")
        assert links.count() == 1 and links.get_attribute("href") == "https://example.org"
        assert "[another](javascript:x)" in answer.inner_text()
        assert "<img src=x onerror=alert(1)>" in answer.locator("blockquote").inner_text()
        assert page.page.locator(".message img, .message b, .message i").count() == 0


def test_a_conversation_survives_a_reload(browser: Any, url: str) -> None:
    with visit(browser, url) as page:
        set_up(page, max_tokens=12)
        page.ask("remember this")
        page.page.wait_for_selector(".assistant .cache")
        said = page.text(".assistant .text")
        page.page.reload()
        page.ready()
        assert "remember this" in page.text(".user") and page.text(".assistant .text") == said
        page.page.click("#new-chat")
        page.page.reload()
        page.ready()
        assert page.page.locator(".message").count() == 0
        assert page.page.locator("#welcome").is_visible()


def test_messages_are_copied_edited_and_answered_again(browser: Any, url: str) -> None:
    rights = ["clipboard-read", "clipboard-write"]
    with visit(browser, url, permissions=rights) as page:
        set_up(page, max_tokens=8)
        page.ask("first")
        page.page.wait_for_selector(".assistant .cache")
        page.page.click(".user .copy")
        page.page.wait_for_selector(".user .copy:has-text('Copied')")
        assert page.page.evaluate("navigator.clipboard.readText()") == "first"
        page.page.click(".again")
        page.page.wait_for_selector(".assistant .cache")
        assert page.page.locator(".message").count() == 2
        page.page.click(".user .actions button >> nth=0")
        assert page.page.locator(".message").count() == 0
        assert page.page.input_value("#composer") == "first"
        page.ask("second")
        page.page.wait_for_selector(".assistant .cache")
        assert "second" in page.text(".user") and page.page.locator(".message").count() == 2


def test_a_server_that_is_gone_is_named_and_asked_again(browser: Any, url: str) -> None:
    with visit(browser, url, problems=("Failed to load",)) as page:
        set_up(page, max_tokens=8)
        page.page.route("**/v1/chat/completions", lambda route: route.abort())
        page.ask("anybody?")
        page.page.wait_for_selector(".failed:has-text('The server is gone')")
        page.page.unroute("**/v1/chat/completions")
        page.page.click(".again")
        page.page.wait_for_selector(".assistant .cache")
        assert page.page.locator(".message").count() == 2


def test_a_message_waits_for_the_model_to_load(browser: Any, url: str) -> None:
    error = {"message": "the model is still loading (weights, 40%)", "code": "loading"}
    answers = [lambda route: route.fulfill(status=503, body=json.dumps({"error": error}))]
    with visit(browser, url, problems=("503",)) as page:
        set_up(page, max_tokens=8)
        page.page.route(
            "**/v1/chat/completions",
            lambda route: answers.pop()(route) if answers else route.continue_(),
        )
        page.ask("early")
        page.page.wait_for_selector(".assistant .cache")
        assert answers == [] and page.page.locator(".failed").count() == 0


def test_escape_leaves_the_composer(browser: Any, url: str) -> None:
    with visit(browser, url) as page:
        page.ready()
        page.page.focus("#composer")
        page.page.keyboard.press("Escape")
        assert page.page.evaluate("document.activeElement === document.body")
        page.page.keyboard.press("r")
        assert page.page.locator("#panel-life").is_visible()


# ---- for everybody


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1360, 900), (390, 800)])
def test_axe_finds_nothing(
    browser: Any, classroom: str, scheme: str, width: int, height: int
) -> None:
    size = {"width": width, "height": height}
    with visit(browser, classroom, color_scheme=scheme, viewport=size) as page:
        page.ready()
        restore(page, ("user", "hello"), ("assistant", MARKDOWN))
        page.page.evaluate(AXE.read_text())
        faults = {"chat": violations(page)}
        page.page.evaluate("document.getElementById('tab-engine').click()")
        hold(page)
        page.page.click("#load-button")
        page.page.wait_for_selector("#rows li >> nth=7")
        take_step(page)
        faults["engine"] = violations(page)
        page.page.locator("#steps-card h2 .term").focus()
        faults["tooltip"] = violations(page)
        go_on(page)
        page.until("document.querySelectorAll('#rows li').length === 0")
        page.page.click("#tab-life")
        page.page.wait_for_selector("#gantt button")
        faults["requests"] = violations(page)
        page.page.click("#help-button")
        faults["help"] = violations(page)
        page.page.keyboard.press("Escape")
        page.page.evaluate("document.dispatchEvent(new CustomEvent('key-wanted'))")
        page.page.wait_for_selector("#key[open] #key-input")
        faults["key"] = violations(page)
        page.page.keyboard.press("Escape")
        page.page.click("#tab-engine")
        page.page.click("#tour-button")
        page.page.wait_for_selector("#tour[data-station='1']")
        faults["tour"] = violations(page)
        page.page.click("#tour-end")
        page.until("document.querySelectorAll('#rows li').length === 0")
    assert {view: found for view, found in faults.items() if found} == {}


def violations(page: Visit) -> list[str]:
    """What axe-core finds wrong, with the elements."""
    found = page.page.evaluate("axe.run()")
    return [
        f"{one['id']}: {[node['html'][:120] for node in one['nodes'][:3]]}"
        for one in found["violations"]
    ]
