"""Templates are foreign code: whatever one does costs its caller an error, in bounded time."""

import gc
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nanovllm.frontend import chat_template
from nanovllm.frontend.chat_template import ChatTemplate
from tests.waiting import WAIT_S

MESSAGES = [{"role": "user", "content": "hi"}]
FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set ns = namespace(x='aaaaaaaa') %}"
    "{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
)


def render(source: str, **variables: Any) -> str:
    return ChatTemplate(source).render({"messages": MESSAGES, **variables})


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{{ 1 / 0 }}", "do not suit.*division"),
        ("{{ 10.0 ** 1000 }}", "do not suit.*range"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "do not suit.*recursion"),
        ("{{ messages.nothing.more }}", "do not suit.*no attribute"),
        ("{{ messages + 1 }}", "do not suit"),
        ("{{ 'a' * 10 ** 10 }}", "do not suit.*MemoryError"),
        (DOUBLING, "do not suit.*MemoryError|too much memory"),
        ("{{ 'x' | center(20000000) }}", "would have 20000000 characters"),
        ("{{ ''.__class__.__mro__ }}", "do not suit.*unsafe"),
        ("{% for", "does not compile"),
        ("{{ (" + "(" * 5000 + ")" * 5000 + ") }}", "does not compile"),
        ("{{ raise_exception('not so') }}", "not so"),
    ],
)
def test_what_goes_wrong_is_a_mistake(source: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        render(source)


def test_one_that_never_ends_is_ended_and_others_go_on() -> None:
    template = ChatTemplate("{% if loops %}" + FOREVER + "{% endif %}{{ messages[0].content }}")
    template.start()
    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        looping = pool.submit(template.render, {"messages": MESSAGES, "loops": True})
        while not looping.done():
            assert template.render({"messages": MESSAGES}) == "hi"
        with pytest.raises(ValueError, match="takes too long"):
            looping.result()
        assert time.monotonic() - began < chat_template.TIMEOUT_S + WAIT_S
    assert template.render({"messages": MESSAGES}) == "hi"


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(ValueError, match="must be JSON"):
        render("{{ x }}", x=object())
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="must be JSON"):
        render("{{ x }}", x=deep)
    while deep:  # piece by piece: to free it at once would overflow Python's stack
        deep = deep[0]


def test_its_processes_end_with_it() -> None:
    before = _children()
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render({"messages": MESSAGES}) == "hi"
    (own,) = _children() - before
    del template
    gc.collect()  # which may end those of other tests as well
    assert own not in _children()


def _children() -> set[str]:
    with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
        return set(file.read().split())
