"""Triton on a Hopper that is not there: it compiles for it, and a launch only counts.

A program of its own (run by its path), as Triton decides at its import
whether it interprets. Prints what one start of a worker compiled and launched, as JSON.
"""

import json
import sys
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from nanovllm.config import EngineConfig
from nanovllm.worker import worker as worker_module
from nanovllm.worker.attention import select as attention_select
from nanovllm.worker.attention import triton_attention
from nanovllm.worker.kernels import triton_launch
from nanovllm.worker.kernels.compile_ahead import CompileAhead
from nanovllm.worker.kernels.select import DeviceKernels
from nanovllm.worker.kernels.triton_kernels import TritonKernels
from nanovllm.worker.kernels.triton_sampler import sample_tokens
from nanovllm.worker.worker import Worker

LAUNCHES: Counter[str] = Counter()
COMPILED: Counter[str] = Counter()
LARGE_SHARED_MEMORY = 232448


class PretendedDriver:
    """What Triton asks of a device's driver."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 32, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": LARGE_SHARED_MEMORY},
    )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        COMPILED[metadata.name] += 1

        def launch(*_: Any) -> None:
            LAUNCHES[metadata.name] += 1

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: Any = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def pretend() -> None:
    """From here on kernels are chosen, compiled and launched as on an H200, for CPU tensors."""
    driver.set_active(PretendedDriver())
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=132)
    for module in (triton_launch, triton_attention):
        module.unusable = lambda *_: None
    kernels = DeviceKernels(
        layers=TritonKernels(),
        sample_tokens=sample_tokens,
        why="pretended",
        compile_ahead=CompileAhead,
    )
    worker_module.select_kernels = lambda *_, **__: kernels
    attention_select.PREFERENCES["cpu"] = ("triton",)


def start(settings: dict[str, Any]) -> dict[str, Any]:
    """Start a worker; returns its phases, and what was compiled and launched."""
    pretend()
    config = EngineConfig.from_kwargs(
        **{"device": "cpu", "dtype": "bfloat16", "load_format": "dummy", **settings}
    )
    worker = Worker(config, lambda phase, progress: None)
    started = time.perf_counter()
    info = worker.start()
    return {
        "seconds": time.perf_counter() - started,
        "phases": info.phase_seconds,
        "notes": info.notes,
        "compiled": COMPILED,
        "launches": LAUNCHES,
        "triton": triton.__version__,
    }


if __name__ == "__main__":
    print(json.dumps(start(json.loads(sys.argv[1]))))
