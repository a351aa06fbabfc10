"""Runs a program of this folder where Triton compiles, though the tests around it interpret."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_compiling(name: str, *arguments: str) -> dict[str, Any]:
    """The JSON object that it prints. No GPU is needed for it."""
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(name)), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found
