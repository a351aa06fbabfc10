"""Which device a worker takes and in which precision it computes there, and why.

`Worker.start` asks; what cannot be had is a `ValueError` that names the field and the remedy.
"""

import logging
import os
from contextlib import suppress
from pathlib import Path

import torch

from nanovllm.config import Device, DType, KVCacheDType
from nanovllm.plan.precision import dtype_for
from nanovllm.worker.quant.fp8 import E4M3, has_native_fp8

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

logger = logging.getLogger(__name__)


def choose_device(device: Device) -> torch.device:
    """The device a configuration means. Raises `ValueError` if it asks for CUDA in vain."""
    if device == "cpu":
        return torch.device("cpu")
    reason = unusable_gpu()
    if reason is None:
        return torch.device("cuda", torch.cuda.current_device())
    if device == "cuda":
        raise ValueError(f"device: 'cuda' was asked for, but {reason}: use 'cpu' or 'auto'")
    if torch.cuda.is_available():
        logger.warning("running on the CPU: %s", reason)
    return torch.device("cpu")


def unusable_gpu() -> str | None:
    """Why there is no GPU that this PyTorch can use, or None if there is one."""
    if not torch.cuda.is_available():
        return "no GPU is usable" if torch.version.cuda else "this PyTorch is built without CUDA"
    capability = torch.cuda.get_device_capability()
    built_for = [arch.removeprefix("sm_") for arch in torch.cuda.get_arch_list() if "sm_" in arch]
    oldest = min((divmod(int(arch.rstrip("af")), 10) for arch in built_for), default=(0, 0))
    if capability < oldest:
        own, least = (".".join(map(str, pair)) for pair in (capability, oldest))
        return (
            f"{torch.cuda.get_device_name()} has compute capability {own}, and this PyTorch is "
            f"built for {least} and later (an older PyTorch may support it)"
        )
    return None


def has_bfloat16(device: torch.device) -> bool:
    """Whether it computes in bfloat16 itself: emulated, that is slower than another precision."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_dtype(dtype: DType, device: torch.device, stored: str | None) -> tuple[torch.dtype, str]:
    """The computing precision, and why, in a sentence (`plan.precision.dtype_for`).

    Raises `ValueError` for a precision that the GPU does not have.
    """
    is_gpu = device.type == "cuda"
    if is_gpu and dtype == "bfloat16" and not has_bfloat16(device):
        raise ValueError(
            f"dtype: {torch.cuda.get_device_name(device)} has no bfloat16 (that begins with "
            "compute capability 8.0): use 'float16' or 'auto'"
        )
    name, why = dtype_for(dtype, is_gpu=is_gpu, has_bfloat16=has_bfloat16(device), stored=stored)
    return DTYPES[name], why


def num_usable_cores() -> int:
    """Cores that this process may use: its affinity, a CPU quota of its container, two threads of
    a core being one."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    num_cores = len({_siblings(cpu) for cpu in allowed}) or os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no control groups, or no quota ("max")
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        num_cores = min(num_cores, max(1, int(quota) // int(period)))
    return num_cores


def _siblings(cpu: int) -> str:
    """The threads of a CPU's core, as Linux lists them; the CPU itself if it does not say."""
    try:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        return (topology / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def describe(device: torch.device) -> str:
    """The device for `WorkerInfo`: its type first."""
    if device.type == "cpu":
        return "cpu"
    return f"{device} ({torch.cuda.get_device_name(device)})"


def choose_kv_dtype(
    kv_cache_dtype: KVCacheDType, device: torch.device, *, has_scales: bool = False
) -> torch.dtype | None:
    """What keys and values are stored as; None: as computed. e4m3 has a scale of 1, as in vLLM, or
    those of the checkpoint. has_scales: it has some; then a GPU that can uses them by default.

    Raises `ValueError` where a GPU's kernels could not write it.
    """
    if kv_cache_dtype == "auto":
        by_default = has_scales and device.type == "cuda" and has_native_fp8(device)
        return E4M3 if by_default else None
    if device.type == "cuda" and not has_native_fp8(device):
        raise ValueError(
            f"kv_cache_dtype: {kv_cache_dtype!r} needs a GPU of compute capability 8.9 (Ada) or "
            "later: use 'auto'"
        )
    return E4M3
