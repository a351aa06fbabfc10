"""Mixtures of experts in plain torch, an expert at a time: for CPUs, and the oracle of kernels.

Both `Kernels` call it. The host waits to know which experts are hit; no others are read.
"""

import torch
from torch import Tensor

from nanovllm.worker.kernels.base import Kernels, Stream
from nanovllm.worker.layers.moe import Experts, choose


def mix_experts(kernels: Kernels, hidden: Tensor, logits: Tensor, experts: Experts) -> Tensor:
    """As `Kernels.experts`, without a residual."""
    spec = experts.spec
    weights, chosen = choose(logits, spec.router, spec.top_k, experts.correction)
    weights = weights.to(hidden.dtype)
    mixed = torch.zeros_like(hidden)
    for expert in torch.unique(chosen).tolist():
        tokens, places = (chosen == expert).nonzero(as_tuple=True)
        gate_up, down = experts.each[expert]
        product = kernels.norm_linear(Stream(hidden[tokens]), None, gate_up)
        inner = kernels.activate(product, spec.activation)
        mixed.index_add_(0, tokens, down.partial(inner) * weights[tokens, places, None])
    return mixed
