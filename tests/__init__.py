"""What holds for every test process, before anything else is imported.

Without a CUDA device Triton kernels run in Triton's interpreter: Triton decides when it is first
imported, and transformers imports it. One thread computes in each process, since test processes
share the cores (as do the cores and ranks that they start): threads of several that wait for each
other take many times as long. Many programs that tests start are in this package and need no torch,
which takes two seconds to import: where no driver shows a GPU it is not asked.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")


def _has_gpu() -> bool:
    if not any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg")):
        return False
    import torch

    return torch.cuda.is_available()


if not _has_gpu():
    os.environ["TRITON_INTERPRET"] = "1"
