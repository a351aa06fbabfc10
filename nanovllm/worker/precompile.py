"""Kernels compiled beside the engine, before steps ask for them.

`Worker` starts the program `triton_precompile.py`, which compiles into Triton's cache on
disk; whoever launches a kernel then only loads it. What is in the cache already is not compiled
again, and a program that fails costs nothing but the time it would have saved.
"""

import subprocess
import sys
from contextlib import suppress
from typing import Any

import msgspec
import torch

from nanovllm.config import StepLimits
from nanovllm.worker.attention.base import AttentionSpec

PROGRAM = "nanovllm.worker.triton_precompile"


class Job(msgspec.Struct, frozen=True):
    """Whose steps are gone through. Precisions by their names in torch."""

    checkpoint_config: dict[str, Any]
    max_model_len: int
    block_size: int
    dtype: str
    kv_dtype: str | None
    limits: StepLimits
    gpu: tuple[tuple[int, int], int]  # a `triton_launch.Gpu`; Triton is not loaded to pass it on


def start(
    checkpoint_config: dict[str, Any],
    attention: AttentionSpec,
    limits: StepLimits,
    *,
    max_model_len: int,
    gpu: tuple[tuple[int, int], int],
) -> "subprocess.Popen[bytes]":
    """A process that compiles what an engine that has chosen these will launch.

    It ends by itself, and soon after this one at the latest.
    """
    job = Job(
        checkpoint_config,
        max_model_len,
        attention.block_size,
        _name(attention.dtype),
        None if attention.kv_dtype is None else _name(attention.kv_dtype),
        limits,
        gpu,
    )
    program = subprocess.Popen(
        [sys.executable, "-m", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert program.stdin is not None
    with suppress(BrokenPipeError), program.stdin as stdin:  # it may have failed by now
        stdin.write(msgspec.json.encode(job))
    return program


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
