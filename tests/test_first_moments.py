"""The first moments of a command: Ctrl-C while it still imports, and what a terminal shows by then.

A finder of modules, first in the line, acts at the very moment that one is looked for.
"""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import WAIT_S

ENGINE = "nanovllm.frontend.async_llm"  # whose import takes seconds
# Of a program that runs `nanovllm generate`: what it does when it looks for a module.
PROGRAM = """
import os, signal, sys
class Finder:
    def find_spec(name, path, target=None):
        if name == {module!r}:
            {action}
sys.meta_path.insert(0, Finder)
sys.argv = ["nanovllm", "generate", "hi", "--model", "nowhere/at-all"]
from nanovllm.__main__ import main
sys.exit(main())
"""
INTERRUPT = "os.kill(os.getpid(), signal.SIGINT)"
TELL = "print('the engine is loaded', file=sys.stderr, flush=True)"
# A shell that runs in the background has Ctrl-C ignored, and so has what it starts.
HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"


def command(module: str, action: str) -> list[str]:
    source = HEARS + PROGRAM.format(module=module, action=action)
    return [sys.executable, "-c", source]


@pytest.mark.parametrize("module", ["nanovllm.cli", "nanovllm.flags", "uvloop", ENGINE])
def test_ctrl_c_while_it_imports_ends_it_quietly(module: str, tmp_path: Path) -> None:
    done = subprocess.run(
        command(module, INTERRUPT),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 130 and done.stdout == ""
    assert "Traceback" not in done.stderr and "Error" not in done.stderr


def test_a_terminal_shows_something_before_the_engine_is_loaded(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(ENGINE, TELL),
        cwd=tmp_path,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 1 << 16)
        except OSError:  # it has ended, and so has the terminal
            break
    os.close(ours)
    assert process.wait(WAIT_S) == 2
    before, told, after = shown.partition(b"the engine is loaded")
    assert b"starting" in before and told and b"nowhere/at-all" in after
