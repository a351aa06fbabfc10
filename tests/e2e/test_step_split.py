"""Where a step's host time goes is told without a GPU: the benchmark, in small."""

import os
import re
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "step_split.py"
WANTED = "--hollow --load-format dummy --rounds 1 --workload ask_one_schema --calls"


def test_a_hollow_device_runs_steps_of_every_kind(smollm2_path: Path) -> None:
    """It stands in for what runs graphs and samples, and has to keep up with it."""
    mixed = ["--mixed", "all", "--seconds", "0.2", "--rate", "20"]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *WANTED.split(), *mixed],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "Traceback" not in said, said
    assert re.search(r"^ask_one_schema: [1-9]\d* tokens in", said, re.M), said
    assert len(re.findall(r"^all: [1-9]\d* tokens in", said, re.M)) == 2, said
    for half in ("submit", "sample"):
        assert re.search(rf"operations in {half}: \d", said), said
