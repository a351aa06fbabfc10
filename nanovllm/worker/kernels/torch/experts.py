"""Mixtures of experts in plain torch, an expert at a time: for CPUs, and the oracle of kernels.

Both `Kernels` call it. The host waits to know which experts are hit; no others are read.
"""

import torch
from torch import Tensor

from nanovllm.checkpoint.spec import MoE
from nanovllm.worker.kernels.base import Kernels, Residual
from nanovllm.worker.layers.moe import Experts, choose


def mix_experts(kernels: Kernels, hidden: Tensor, logits: Tensor, experts: Experts) -> Tensor:
    """As `Kernels.experts`, without a residual."""
    spec, own = experts.spec, experts.own
    weights, chosen = choose(logits, spec.router, spec.top_k, experts.correction, experts.factors)
    weights = weights.to(hidden.dtype)
    mixed = torch.zeros_like(hidden)
    is_here = (chosen >= own.start) & (chosen < own.start + own.size)
    for expert in torch.unique(chosen[is_here]).tolist():
        tokens, places = (chosen == expert).nonzero(as_tuple=True)
        gate_up, down = experts.each[expert - own.start]
        product = kernels.norm_linear(Residual(hidden[tokens]), None, gate_up)
        inner = _activated(kernels, product, spec)
        mixed.index_add_(0, tokens, down.partial(inner) * weights[tokens, places, None])
    return mixed


def _activated(kernels: Kernels, gate_up: Tensor, spec: MoE) -> Tensor:
    """What gates and ups become. gate_up: [num_tokens, 2 * intermediate_size]."""
    if spec.takes_turns:
        gate_up = gate_up.view(len(gate_up), -1, 2).transpose(-1, -2).flatten(-2)
    if spec.clamped is None:
        return kernels.activate(gate_up, spec.activation)
    alpha, limit = spec.clamped.alpha, spec.clamped.limit
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))
