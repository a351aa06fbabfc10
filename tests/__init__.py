"""What holds for every test process, before anything else is imported.

Without a CUDA device Triton kernels run in Triton's interpreter: Triton decides when it is first
imported, and transformers imports it. One thread computes in each process, since test processes
share the cores (as do the cores and ranks that they start): threads of several that wait for each
other take many times as long.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
