"""Triton on a Hopper that is not there: it compiles for it, and a launch only counts.

For programs of their own, as Triton decides at its import whether it interprets.
"""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

LAUNCHES: Counter[str] = Counter()
SHARED_MEMORY = 232448  # bytes that a kernel may have


class PretendedDriver:
    """What Triton asks of a device's driver."""

    def __init__(self, shared_memory: int) -> None:
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 1, 32, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": shared_memory},
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(*_: Any) -> None:
            LAUNCHES[metadata.name] += 1

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: Any = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def pretend(*, shared_memory: int = SHARED_MEMORY) -> None:
    """From here on kernels are compiled and launched as on an H200, for tensors of the CPU."""
    driver.set_active(PretendedDriver(shared_memory))
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]
