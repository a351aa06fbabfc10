"""The interpreter runs what compilers may refuse: every kernel is compiled for Hopper, too."""

import json
import os
import subprocess
import sys
from pathlib import Path

LAUNCHED = {
    "_expand_kernel",
    "plan_kernel",
    "stream_plan_kernel",
    "_vector_kernel",
    "_matrix_kernel",
    "_rows_kernel",
    "_silu_and_mul_kernel",
    "_rope_and_cache_kernel",
    "prefill_kernel",
    "decode_kernel",
    "stream_kernel",
    "combine_kernel",
    "shared_prefix_kernel",
    "_segments_kernel",
    "_choose_kernel",
}


def test_every_kernel_as_it_is_launched() -> None:
    """In a process of its own, where Triton compiles. No GPU is needed for it."""
    program = Path(__file__).with_name("compile_launches.py")
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, str(program)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout).keys() == LAUNCHED
