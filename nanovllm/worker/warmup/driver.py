"""What can be known of a GPU, and done with it, before torch is there: by its driver alone.

An executor asks while it still has to load torch, which takes seconds. Nothing depends on what is
found here: which device there is, and whether it works, `device.choose_device` says.
"""

import ctypes
import os
from pathlib import Path
from threading import Thread

from nanovllm.config import Device

SIGNS = ("/dev/nvidiactl", "/dev/dxg")  # of a driver: on Linux; on Windows' own Linux


def is_likely(device: Device) -> bool:
    """Whether a worker that is asked for this will take a GPU, as far as can be told at once."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return device != "cpu" and not hidden and any(Path(sign).exists() for sign in SIGNS)


def wake(number: int = 0) -> Thread:
    """Have the driver make the context in which torch will use that GPU; returns at once.

    Else torch has it made when it first asks for anything, and waits for it.
    """
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch does, which would be too late
    thread = Thread(target=_make_context, args=(number,), name="waking the GPU", daemon=True)
    thread.start()
    return thread


def _make_context(number: int) -> None:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), number) == 0:
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
