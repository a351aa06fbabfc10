"""Without a CUDA device Triton kernels run in Triton's interpreter.

Triton decides when it is first imported, and transformers imports it: so before any conftest.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
