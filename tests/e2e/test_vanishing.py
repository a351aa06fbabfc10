"""Clients of a real server on a real core that vanish: the benchmark, with fewer of them."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "vanishing.py"


def test_clients_that_vanish_leave_nothing_behind() -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--clients", "80"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "nothing was left behind" in said
    assert "Traceback" not in said and "ASGI" not in said, said
