"""`nanovllm serve --data-parallel-size N`: one address, several cores, and what becomes of one."""

import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.processes import core_children
from tests.frontend.server.test_serve import TIMEOUT_S, program
from tests.frontend.vocabulary import save

NUM_TOKENS = 120


def complete(url: str, index: int) -> str:
    body = {
        "prompt": [index + 3] * 80,
        "max_tokens": NUM_TOKENS,
        "seed": index,
        "ignore_eos": True,
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == NUM_TOKENS
    return str(answer.json()["choices"][0]["text"])


def generated(url: str) -> dict[str, float]:
    """Tokens by engine, as `/metrics` has them."""
    text = httpx.get(f"{url}/metrics", timeout=TIMEOUT_S).text
    found = re.findall(r'nanovllm:generation_tokens_total\{engine="(\d)".*\} ([\d.e+]+)', text)
    return {engine: float(value) for engine, value in found}


@pytest.mark.parametrize("frontends", ["1", "2"])
def test_replicas_share_the_load_and_one_may_die(frontends: str, tmp_path: Path) -> None:
    save(tmp_path)
    flags = ("--data-parallel-size", "2", "--frontends", frontends, "--tokenizer", str(tmp_path))
    flags += ("--load-format", "synthetic", "--step-ms", "10")
    with program(*flags) as server, ThreadPoolExecutor(8) as threads:
        url = server.hear(r"ready after .*: (http://127.0.0.1:\d+)/v1")[1]
        expected = list(threads.map(lambda index: complete(url, index), range(8)))
        deadline = time.monotonic() + TIMEOUT_S
        while sum((by_engine := generated(url)).values()) < 8 * NUM_TOKENS:
            assert time.monotonic() < deadline, by_engine
            time.sleep(0.05)  # statuses of the cores come once a second
        assert by_engine.keys() == {"0", "1"}
        assert sum(by_engine.values()) == 8 * NUM_TOKENS
        assert min(by_engine.values()) > 0
        answers = [threads.submit(complete, url, index) for index in range(8)]
        time.sleep(0.5)
        os.kill(core_children(server.pid)[0], signal.SIGKILL)
        assert [answer.result() for answer in answers] == expected
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
