"""A page of another origin, in a real Chromium, can neither read, nor generate, nor rebind.

The page lies on a second port of this machine, which browsers hold to be of the same site.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.processes import wait_until
from tests.frontend.server.browser import chromium, chromium_path, synthetic_server, visit
from tests.waiting import WAIT_S

BODY = '{"prompt": [1, 2, 3], "max_tokens": 4}'
# What a page can try without leave (simple requests), with it, and by a form.
ATTEMPTS = {
    "read": "fetch(url + '/v1/models').then((r) => r.text())",
    "watch": "fetch(url + '/v1/engine/events').then((r) => r.body.getReader().read())",
    "text": "fetch(url + '/v1/completions', {method: 'POST', body})",
    "blind": "fetch(url + '/v1/completions', {method: 'POST', body, mode: 'no-cors'})",
    "json": "fetch(url + '/v1/completions', {method: 'POST', body, "
    "headers: {'content-type': 'application/json'}})",
    "untyped": "fetch(url + '/v1/completions', {method: 'POST', body: new Blob([body])})",
    "form": "(() => { const f = document.createElement('form'); f.method = 'POST'; "
    "f.enctype = 'text/plain'; f.action = url + '/v1/completions'; f.target = 'frame'; "
    "const i = document.createElement('input'); i.name = body.slice(0, -1) + ', \"user\": \"'; "
    "i.value = '\"}'; f.append(i); const w = document.createElement('iframe'); w.name = 'frame'; "
    "document.body.append(w, f); f.submit(); return new Promise((r) => setTimeout(r, 500)); })()",
}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def other_site(directory: Path) -> Iterator[int]:
    """The port of a server with an empty page."""
    (directory / "index.html").write_text("<!doctype html><title>other</title><body></body>")
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(directory))
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def num_prompt_tokens(url: str) -> float:
    """That the core has ever been given."""
    lines = httpx.get(f"{url}/metrics", timeout=WAIT_S).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if "prompt_tokens_total{" in line)


def test_a_page_of_another_origin_gets_nothing(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    with (
        chromium() as browser,
        synthetic_server(tmp_path) as url,
        other_site(site) as port,
    ):
        before = num_prompt_tokens(url)
        for host in ("127.0.0.1", "localhost"):
            # What the browser says of each attempt on its console is what is wanted here.
            with visit(browser, f"http://{host}:{port}/", problems=("",)) as page:
                for name, attempt in ATTEMPTS.items():
                    script = f"async ([url, body]) => {{ const r = await ({attempt}); "
                    script += "return r === undefined || r.type === 'opaque' ? null : 'read'; }"
                    outcome = page.page.evaluate(
                        f"async (a) => {{ try {{ return await ({script})(a); }} "
                        "catch (e) { return null; } }",
                        [url, BODY],
                    )
                    assert outcome is None, name
        body = {"prompt": [1, 2, 3], "max_tokens": 4}
        own = httpx.post(f"{url}/v1/completions", json=body, timeout=WAIT_S)
        assert own.status_code == 200
        # The core tells its counters once a second; this request comes after all attempts.
        wait_until(lambda: num_prompt_tokens(url) > before, timeout_s=WAIT_S, what="the request")
        assert num_prompt_tokens(url) == before + 3


def test_a_name_bound_to_this_machine_gets_nothing(tmp_path: Path) -> None:
    """DNS rebinding: the page is of the same origin as far as the browser knows."""
    with chromium() as browser, synthetic_server(tmp_path) as url:
        port = url.rpartition(":")[2]
        evil = f"http://evil.example:{port}"
        rebound = browser.browser_type.launch(
            executable_path=chromium_path(),
            args=["--no-sandbox", "--host-resolver-rules=MAP evil.example 127.0.0.1"],
        )
        try:
            page = rebound.new_page()
            answer = page.goto(f"{evil}/")
            assert answer is not None and answer.status == 403
            assert "--allowed-hosts" in answer.text()
            script = "(path) => fetch(path).then((r) => r.status)"
            for path in ("/v1/models", "/v1/engine/events"):
                assert page.evaluate(script, path) == 403
        finally:
            rebound.close()
        with visit(browser, url) as own:
            own.ready()
            own.ask("hello")
            own.until("document.body.innerText.includes('hello')")


def test_the_documents_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    with (
        chromium() as browser,
        synthetic_server(tmp_path) as url,
        visit(browser, f"{url}/docs") as docs,
    ):
        asked: list[str] = []
        docs.page.on("request", lambda request: asked.append(request.url))
        docs.page.reload()
        docs.page.wait_for_selector("#docs .opblock-post")
        assert asked and all(one.startswith((url, "data:")) for one in asked)
