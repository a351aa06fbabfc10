"""How every Triton kernel here is launched: on which device, and overlapping its predecessor.

Programmatic dependent launch (PDL, compute capability ≥ 9.0) lets a kernel start while the one
before it still runs. What keeps it safe: every program of a kernel launched so calls `gdc_wait()`,
and before that writes nothing and reads nothing but arguments, weights and a step's finished lists.
"""

from functools import cache
from threading import Thread
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.runtime.cache import triton_key

INTERPRETED = bool(knobs.runtime.interpret)  # TRITON_INTERPRET=1: kernels run in NumPy, on a CPU
MIN_CAPABILITY = (8, 0)
ADA = (8, 9)
HOPPER = (9, 0)
BLACKWELL = (10, 0)
MAX_ARRIVALS = 65536  # output tiles of one launch whose parts can be counted


class Gpu(NamedTuple):
    """What kernels are chosen, cut and compiled by."""

    capability: tuple[int, int]
    num_multiprocessors: int


_stand_in: list[Gpu] = []


def stand_in(gpu: Gpu) -> None:
    """From now on all devices are like this one: for a process that compiles and runs nothing."""
    _stand_in[:] = [gpu]


@cache
def gpu_of(device: torch.device) -> Gpu:
    """The facts of a CUDA device."""
    if _stand_in:
        return _stand_in[0]
    facts = torch.cuda.get_device_properties(device)
    return Gpu(torch.cuda.get_device_capability(device), facts.multi_processor_count)


def name_kernels_ahead() -> Thread:
    """Started, and to be joined before the first launch.

    Triton names what it caches by all it consists of, and so reads itself: 400 MB, which takes most
    of a second, once, and holds no lock of Python's.
    """
    naming = Thread(target=triton_key, name="naming kernels", daemon=True)
    naming.start()
    return naming


def unusable(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`, or None if they can."""
    if INTERPRETED or _stand_in:
        return None
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, not {device.type}"
    capability = gpu_of(device).capability
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0 (Ampere)"
    return None


def num_multiprocessors(device: torch.device) -> int:
    """Of the device; a small odd number in the interpreter, so that loops over work are walked."""
    return 3 if INTERPRETED else gpu_of(device).num_multiprocessors


def has_tensor_memory_accelerator(device: torch.device) -> bool:
    """Whether tiles can be fetched by descriptor, without a thread's help (Hopper and later)."""
    return INTERPRETED or gpu_of(device).capability >= HOPPER


def is_hopper(device: torch.device) -> bool:
    """Whether kernels in Gluon for its instructions run, which nothing interprets."""
    return not INTERPRETED and HOPPER <= gpu_of(device).capability < BLACKWELL


def converts_fp8(device: torch.device) -> bool:
    """Whether kernels may load and store e4m3 (Ada and later)."""
    return INTERPRETED or gpu_of(device).capability >= ADA


@cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """Keywords of every launch: `PDL`, which kernels read, and `launch_pdl`, which Triton does."""
    pdl = not INTERPRETED and gpu_of(device).capability >= HOPPER
    return {"PDL": pdl, "launch_pdl": True} if pdl else {"PDL": False}


@cache
def arrival_counters(device: torch.device) -> torch.Tensor:
    """[MAX_ARRIVALS] int32, which every launch leaves at zero. Launches of one stream share them:
    whoever's programs add something up lets the last one to arrive do it."""
    return torch.zeros(MAX_ARRIVALS, dtype=torch.int32, device=device)
