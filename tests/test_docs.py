"""What README and docs show is run, so that a flag or a name that changes in the code shows here.

Python runs as it stands. Commands are read by the parsers of the programs that they name, and run
if they come to an end by themselves. A small model stands in for SmolLM2, one core and one server
for those that a reader has started. Blocks in other languages are not run, nor other programs.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nanovllm import cli, launch
from tests.conftest import SIZES
from tests.e2e.processes import wait_until
from tests.frontend.server.test_serve import Program
from tests.frontend.vocabulary import CHAT_TEMPLATE, SPECIAL_TOKENS, save
from tests.waiting import WAIT_S

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
PROGRAMS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "nanovllm": cli.make_parser,
    "nanovllm-core": launch.make_parser,
}
# Others last until they are stopped (chat, serve, top, a core), take minutes (bench), want a
# network (fetch) or a file that is not there (replay). Fixtures run a core and a server.
RUN = ("generate", "plan", "keys")
LARGE = 4096  # tokens of context: to the small model each byte is a token


def blocks(*languages: str) -> list[Any]:
    """Each with its document and its line."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text()
        for block in BLOCK.finditer(text):
            if block[1] in languages:
                name = f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, block.start()) + 1}"
                found.append(pytest.param(block[2], id=name))
    return found


def commands() -> list[Any]:
    """The words of each, without comments, of programs that are known here."""
    found = []
    for block in blocks("", "sh"):
        for number, line in enumerate(block.values[0].replace("\\\n", " ").splitlines()):
            if line.split(" ")[0] in (*PROGRAMS, "curl", "make"):
                words = shlex.split(line, comments=True)
                found.append(
                    pytest.param(words, id=f"{block.id}: {' '.join(words[:3])} ({number})")
                )
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands in for SmolLM2: of two layers, and with a tokenizer that speaks bytes."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 320, "num_hidden_layers": 2, "max_position_embeddings": LARGE}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(path)
    save(path)
    # Drawn at random, a first token may end the answer, or be half a letter: nothing to print. Its
    # answers do not end by themselves.
    defaults, own = path / "generation_config.json", {"temperature": 0, "max_new_tokens": 64}
    defaults.write_text(json.dumps({**json.loads(defaults.read_text()), **own}))
    settings = {"chat_template": CHAT_TEMPLATE, **SPECIAL_TOKENS}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


Replaced = Callable[[str], str]


@pytest.fixture(scope="module")
def address(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a core that is started as README says, but for the model and the address."""
    (words,) = (one.values[0] for one in commands() if one.values[0][0] == "nanovllm-core")
    path = tmp_path_factory.mktemp("core") / "core.sock"
    assert words[-2] == "--address"
    flags = [word.replace("smollm2", str(model)) for word in words[1:-1]]
    flags = ["--served-model-name", "smollm2", *flags]
    command = [sys.executable, "-m", "nanovllm.launch", *flags, f"ipc://{path}"]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}) as core:
        wait_until(path.exists, timeout_s=WAIT_S, what="core bound")
        yield f"ipc://{path}"
        core.terminate()


@pytest.fixture(scope="module")
def server(address: str, model: Path) -> Iterator[str]:
    """Of a server in front of that core, as docs/serving.md starts it."""
    program = Program("--connect", address)
    try:
        yield program.hear(r"ready after .*: http://(\S+)/v1")[1]
    finally:
        program.end()


@pytest.fixture
def replaced(model: Path, request: pytest.FixtureRequest) -> Replaced:
    """Puts what this test has started in the places of what the documents name."""

    def replace(source: str) -> str:
        source = source.replace("max_model_len=2048", f"max_model_len={LARGE}")
        if "//127.0.0.1:8000" in source or "localhost:8000" in source:
            server = request.getfixturevalue("server")
            return re.sub(r"(127\.0\.0\.1|localhost):8000", server, source)
        if "ipc:///tmp/nanovllm.sock" in source:
            address = request.getfixturevalue("address")
            source = source.replace("ipc:///tmp/nanovllm.sock", address)
        return source.replace('"smollm2"', repr(str(model)))

    return replace


def run_python(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(source, "example", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


@pytest.mark.parametrize("source", blocks("python"))
def test_python(source: str, replaced: Replaced, capsys: pytest.CaptureFixture[str]) -> None:
    run_python(replaced(source), capsys)


EXAMPLES = [pytest.param(path, id=path.name) for path in sorted(ROOT.glob("examples/*.py"))]


@pytest.mark.parametrize("path", EXAMPLES)
def test_examples(path: Path, replaced: Replaced, capsys: pytest.CaptureFixture[str]) -> None:
    run_python(replaced(path.read_text()), capsys)


@pytest.mark.parametrize("words", commands())
def test_commands(
    words: list[str],
    model: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, *arguments = words
    if program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "curl":
        asked = curl(arguments)
        url = asked.url.replace("localhost:8000", "http://" + request.getfixturevalue("server"))
        headers = dict(re.split(": *", one, maxsplit=1) for one in asked.headers)
        answer = httpx.post(url, content=asked.body, headers=headers, timeout=WAIT_S)
        assert answer.status_code == 200, answer.text
    else:
        PROGRAMS[program]().parse_args(arguments)
    if program == "nanovllm" and arguments[0] in RUN:
        monkeypatch.setenv("HOME", str(tmp_path))
        models = ["smollm2", "MODEL", "Qwen/Qwen3-8B"]
        arguments = [str(model) if one in models else one for one in arguments]
        arguments = [one.replace("~", str(tmp_path)) for one in arguments]
        if arguments[0] == "generate":
            arguments += ["--model", str(model), "--max-tokens", "4"]
        assert cli.main(arguments) == 0


def curl(arguments: list[str]) -> argparse.Namespace:
    """Where to, the body and the headers, as curl has them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("-d", dest="body")
    parser.add_argument("-H", dest="headers", action="append", default=[])
    return parser.parse_args(arguments)
