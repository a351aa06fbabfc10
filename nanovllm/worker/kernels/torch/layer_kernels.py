"""The elementwise maths in plain torch: for CPUs, and the oracle for faster kernels.

Handed to every layer by `worker`. Casts are where transformers has them, so that token ids agree;
a decode step on a CPU is many small calls, so each method makes few of them.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nanovllm.checkpoint.spec import Activation
from nanovllm.worker.kernels.base import QKNorm, Residual, add_rows, copied
from nanovllm.worker.kernels.torch.experts import mix_experts
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.layers.moe import Experts
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.parallel import TensorParallel


class TorchKernels:
    """Implements `kernels.base.Kernels`, where the shapes are."""

    stacked_kinds: ClassVar[frozenset[str]] = frozenset()

    def rms_norm(self, hidden: Tensor, norm: RMSNorm) -> Tensor:
        wide = hidden.float()
        if norm.centers:
            wide = wide - wide.mean(-1, keepdim=True)
            return norm.scale(wide, wide.square().mean(-1, keepdim=True)).to(hidden.dtype)
        return norm.scale(hidden, wide.square().mean(-1, keepdim=True))

    def lookup(self, places: Tensor, table: Linear) -> Tensor:
        return table.lookup(places)

    def norm_linear(self, residual: Residual, norm: RMSNorm | None, linear: Linear) -> Tensor:
        if residual.normed is not None:
            return linear(residual.normed)
        return linear(residual.hidden if norm is None else self.rms_norm(residual.hidden, norm))

    def linear_add(
        self,
        hidden: Tensor,
        linear: Linear,
        residual: Tensor,
        *,
        post_norm: RMSNorm | None = None,
        next_norm: RMSNorm | None = None,
    ) -> Residual:
        if len(residual) < len(hidden):
            return self.reduce_add(
                linear.partial(hidden), residual, linear.parallel, next_norm=next_norm
            )
        return self.add(linear(hidden), residual, post_norm=post_norm)

    def mlp(
        self,
        residual: Residual,
        norm: RMSNorm | None,
        gate_up: Linear,
        down: Linear,
        *,
        activation: Activation = "silu",
        post_norm: RMSNorm | None = None,
        next_norm: RMSNorm | None = None,
    ) -> Residual:
        inner = self.activate(self.norm_linear(residual, norm, gate_up), activation)
        return self.linear_add(
            inner, down, residual.hidden, post_norm=post_norm, next_norm=next_norm
        )

    def activate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        return gated(gate_up, activation)

    def add(
        self,
        product: Tensor,
        residual: Tensor,
        *,
        post_norm: RMSNorm | None = None,
        next_norm: RMSNorm | None = None,
    ) -> Residual:
        if post_norm is not None:
            product = self.rms_norm(product, post_norm)
        return Residual(product.add_(residual))

    def reduce_add(
        self,
        partial: Tensor,
        residual: Tensor,
        parallel: TensorParallel,
        *,
        post_norm: RMSNorm | None = None,
        next_norm: RMSNorm | None = None,
    ) -> Residual:
        if len(residual) < len(partial):
            return add_rows(partial, copied, residual, parallel, next_norm)
        return self.add(parallel.reduce(partial), residual, post_norm=post_norm)

    def experts(
        self, hidden: Tensor, logits: Tensor, experts: Experts, *, residual: Tensor | None = None
    ) -> Tensor:
        mixed = mix_experts(self, hidden, logits, experts)
        return mixed if residual is None else mixed.add_(residual)

    def rope_and_cache(
        self,
        qkv: Tensor,
        *,
        cos_sin: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        layer_cache: Tensor,
        qk_norm: QKNorm | None,
    ) -> Tensor:
        num_tokens, (num_kv_heads, head_dim) = len(qkv), layer_cache.shape[-2:]
        heads = qkv.view(num_tokens, -1, head_dim)
        num_heads = heads.shape[1] - 2 * num_kv_heads
        queries, keys_values = heads[:, :num_heads], heads[:, num_heads:]
        if qk_norm is not None:
            keys = keys_values[:, :num_kv_heads]
            queries.copy_(self.rms_norm(queries, RMSNorm(qk_norm.q_weight, qk_norm.eps)))
            keys.copy_(self.rms_norm(keys, RMSNorm(qk_norm.k_weight, qk_norm.eps)))

        # Queries and keys, each head as its two halves: [num_tokens, heads, 2, head_dim / 2]
        rotating = heads[:, :-num_kv_heads].view(num_tokens, -1, 2, head_dim // 2)
        cos_sin = cos_sin.index_select(0, positions).view(num_tokens, 1, 2, -1)
        cos, sin = cos_sin.unbind(2)
        wide = rotating.float()
        first, second = wide.unbind(2)
        rotated = wide * cos.unsqueeze(2)
        rotated[:, :, 0].addcmul_(second, sin, value=-1)
        rotated[:, :, 1].addcmul_(first, sin)
        rotating.copy_(rotated)

        slots = layer_cache.view(2, -1, num_kv_heads, head_dim)
        keys_values = keys_values.view(num_tokens, 2, num_kv_heads, head_dim).transpose(0, 1)
        if slots.dtype == torch.float8_e4m3fn:
            # Larger numbers would become NaN. As bytes: torch indexes no FP8.
            most = torch.finfo(slots.dtype).max
            narrow = keys_values.clamp(-most, most).to(slots.dtype)
            keys_values.copy_(narrow)
            keys_values, slots = narrow.view(torch.uint8), slots.view(torch.uint8)
        slots.index_copy_(1, slot_mapping, keys_values)
        return queries


def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up. gate_up: [num_tokens, 2 * size], gate first; overwritten."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gate).mul_(up)
    return F.gelu(gate, approximate="tanh").mul_(up)
