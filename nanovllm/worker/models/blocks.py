"""What a decoder layer is made of: attention and an MLP, each with its norms and its residual.

`DecoderLayer` runs them one after the other. New maths is a block here.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nanovllm.checkpoint.spec import Dense, LayerSpec, MoE
from nanovllm.worker.attention.base import Rotary
from nanovllm.worker.forward_batch import ForwardBatch
from nanovllm.worker.kernels.base import Residual
from nanovllm.worker.layers.linear import Linear, WeightSlot
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.models.builder import Builder
from nanovllm.worker.parallel import Cut


@dataclass(slots=True, eq=False)
class HeadNorms:
    """Norms of queries and keys, each head by itself (a `kernels.base.QKNorm`)."""

    q_weight: Tensor  # [head_dim]
    k_weight: Tensor  # [head_dim]
    eps: float


class CacheScales:
    """What a layer's keys and values are divided by to be kept in FP8, and queries and what comes
    of attention multiplied by, so that kernels need not know.

    Rounded up to powers of two: nothing that they multiply loses a digit, and nothing is clamped
    that the scales themselves would not clamp.
    """

    def __init__(self) -> None:
        self._scales = {"key_scale": 1.0, "value_scale": 1.0}

    @property
    def key(self) -> float:
        return self._scales["key_scale"]

    @property
    def value(self) -> float:
        return self._scales["value_scale"]

    def slots(self, layer: int) -> Iterator[WeightSlot]:
        for part in self._scales:
            put = partial(self._put, part)
            yield WeightSlot.of_whole(part, "", torch.empty(1), layer, put=put)

    def _put(self, part: str, values: Tensor, rows: slice) -> None:
        scale = float(values)
        if not 0 < scale < math.inf:
            raise ValueError(f"is {scale}, not a number above 0: fetch it again")
        self._scales[part] = 2.0 ** math.ceil(math.log2(scale))


class Norms:
    """The norms around a block, of what it takes and of what it gives; None: there is none."""

    def __init__(self, build: Builder, layer: LayerSpec, name: str) -> None:
        """name: of the block, in the parts that checkpoints have ("attention_norm")."""
        hidden = build.spec.hidden_size
        has_pre = layer.pre_norm and not (layer.parallel and name == "mlp")
        self.pre = build.norm(hidden, layer.norm) if has_pre else None
        self.post = build.norm(hidden, layer.norm) if layer.post_norm else None
        self._spec = layer.norm
        self._name = name

    def slots(self, layer: int) -> Iterator[WeightSlot]:
        if self.pre is not None:
            yield self.pre.slot(f"{self._name}_norm", layer, self._spec)
        if self.post is not None:
            yield self.post.slot(f"{self._name}_post_norm", layer, self._spec)


class AttentionBlock:
    """residual + o(attention(qkv(residual))), with norms where the layer has them."""

    def __init__(
        self,
        build: Builder,
        layer: LayerSpec,
        *,
        module: int,
        cos_sin: Tensor,
        source: "AttentionBlock | None" = None,
    ) -> None:
        """source: of an earlier layer whose keys and values this one takes, having none."""
        spec, hidden = layer.attention, build.spec.hidden_size
        q, kv, head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        sizes = {"q": q * head_dim}
        if source is None:
            sizes |= {"k": kv * head_dim, "v": kv * head_dim}
        self._keeps_keys = False  # for layers whose source it is
        self._kept: Tensor | None = None  # the step's keys and values as qkv has them
        self._source = source
        if source is not None:
            source._keeps_keys = True
        self.qkv = build.column(hidden, sizes, module=(module,), bias=spec.qkv_bias, unit=head_dim)
        self.o = build.row(
            q * head_dim, {"o": hidden}, module=(module,), bias=spec.o_bias, unit=head_dim
        )
        self.norms = Norms(build, layer, "attention")
        self.q_norm = self.k_norm = self.head_norms = None
        if spec.qk_norm is not None:
            wide = spec.qk_norm == "full"
            shares = self.qkv.parts
            self.q_norm = build.norm(shares["q"].size if wide else head_dim, layer.norm)
            if source is not None:
                self.k_norm = source.k_norm
            else:
                self.k_norm = build.norm(shares["k"].size if wide else head_dim, layer.norm)
            if not wide:
                assert self.k_norm is not None
                weights = self.q_norm.weight, self.k_norm.weight
                self.head_norms = HeadNorms(*weights, layer.norm.eps)
        self.sinks = self._shared = None
        if spec.sinks:
            self._shared = build.parallel.share(q)
            self.sinks = torch.zeros(self._shared.size, dtype=torch.float32, device=build.device)
        growth = spec.query_growth
        self.growth = None if growth is None else build.query_growth(growth)
        self._spec = spec
        scheme = build.scheme
        has_scales = scheme is not None and scheme.has_kv_scales
        self.scales = CacheScales() if has_scales and source is None else None
        self._attention_spec = build.attention.spec_of(spec)
        self._factors: Tensor | None = None  # [outputs of qkv], by the scales of the cache
        self._norm_spec = layer.norm
        self._kernels = build.kernels
        self._parallel = build.parallel
        self.backend = build.attention.of(spec)
        self.rotary = Rotary(build.kernels, cos_sin, self.head_norms)

    def forward(
        self,
        residual: Residual,
        *,
        batch: ForwardBatch,
        layer_cache: Tensor,
        next_norm: RMSNorm | None,
        wanted: Tensor | None = None,
    ) -> Residual:
        """wanted: the tokens that are asked for; the others only leave keys and values."""
        qkv = self._kernels.norm_linear(residual, self.norms.pre, self.qkv)
        if self.head_norms is None and self.q_norm is not None:
            self._norm_all_heads(qkv)
        if self.growth is not None:  # by the same for all of a head, so it may come before rotation
            queries = qkv[:, : self.qkv.parts["q"].size]
            queries *= self.growth[batch.positions, None].to(qkv.dtype)
        if self._source is not None:
            assert self._source._kept is not None
            # Keys are written to the cache once more, with the same numbers.
            qkv = torch.cat((qkv, self._source._kept), dim=1)
        elif self._spec.v_norm:
            self._norm_values(qkv)
        if self._keeps_keys:
            self._kept = qkv[:, self.qkv.parts["q"].size :].clone()
        if self._factors is not None:
            qkv *= self._factors
        attended = self.backend.forward(qkv, self.rotary, layer_cache, batch, self.sinks)
        if self._factors is not None and self.scales is not None:
            attended = attended.mul_(self.scales.value)
        hidden = residual.hidden
        if wanted is not None:
            hidden = self._parallel.rows_of(hidden, wanted, len(attended))
            attended = attended[wanted]
        return self._kernels.linear_add(
            attended.flatten(1), self.o, hidden, post_norm=self.norms.post, next_norm=next_norm
        )

    def settle(self) -> None:
        """Once, when weights are there: let the scales of an FP8 cache multiply what they may."""
        scales, norms, spec = self.scales, self.head_norms, self._attention_spec
        if scales is None or spec.cache_dtype != torch.float8_e4m3fn:
            return
        each = {"q": scales.key, "k": 1 / scales.key, "v": 1 / scales.value}
        if norms is not None:  # they come after the factors, which they would undo
            norms.q_weight.mul_(each["q"])
            norms.k_weight.mul_(each["k"])
            each |= {"q": 1.0, "k": 1.0}
        parts = self.qkv.parts.items()
        factors = [torch.full((cut.size,), each[part], dtype=spec.dtype) for part, cut in parts]
        self._factors = torch.cat(factors).to(spec.device)

    def _norm_values(self, qkv: Tensor) -> None:
        """Each head by itself, in place, by norms without weights."""
        size, head_dim = self.qkv.parts["v"].size, self._spec.head_dim
        values = qkv[:, -size:].view(len(qkv), -1, head_dim)
        wide = values.float()
        squares = wide.square().mean(-1, keepdim=True)
        values.copy_(wide * torch.rsqrt(squares + self._norm_spec.eps))

    def _norm_all_heads(self, qkv: Tensor) -> None:
        """All queries of a token, and all its keys, in place."""
        assert self.q_norm is not None and self.k_norm is not None
        sizes = [cut.size for cut in self.qkv.parts.values()]
        queries, keys, _ = torch.split(qkv, sizes, dim=1)
        if self._parallel.size == 1:
            for heads, norm in ((queries, self.q_norm), (keys, self.k_norm)):
                heads.copy_(self._kernels.rms_norm(heads.contiguous(), norm))
            return
        # The heads that several ranks have count as often in the sum as in what it is divided by.
        squares = [heads.float().square().sum(-1, keepdim=True) for heads in (queries, keys)]
        sums = self._parallel.reduce(torch.cat(squares, dim=1))
        for index, (heads, norm) in enumerate(((queries, self.q_norm), (keys, self.k_norm))):
            mean = sums[:, index, None] / (heads.shape[1] * self._parallel.size)
            heads.copy_(norm.scale(heads, mean))

    def linears(self) -> Iterator[Linear]:
        yield from (self.qkv, self.o)

    def slots(self, layer: int) -> Iterator[WeightSlot]:
        for linear in self.linears():
            for slot in linear.slots(layer):
                is_copy = self._spec.values_are_keys and slot.part == "v"
                yield replace(slot, part="k") if is_copy else slot
        yield from self.norms.slots(layer)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = (None, None) if self.head_norms is not None else self._head_cuts()
            yield self.q_norm.slot("q_norm", layer, self._norm_spec, cut=q)
            if self._source is None:
                yield self.k_norm.slot("k_norm", layer, self._norm_spec, cut=k)
        if self.scales is not None:
            yield from self.scales.slots(layer)
        if self.sinks is not None and self._shared is not None:
            yield WeightSlot("sinks", "", self.sinks, (self._shared,), layer)

    def _head_cuts(self) -> tuple[Cut, Cut]:
        """Which of all queries and of all keys are here."""
        return self.qkv.parts["q"], self.qkv.parts["k"]


class DenseBlock:
    """residual + down(activation(gate) * up), with norms where the layer has them."""

    def __init__(self, build: Builder, layer: LayerSpec, spec: Dense, *, module: int) -> None:
        hidden, inner = build.spec.hidden_size, spec.intermediate_size
        sizes = {"gate": inner, "up": inner}
        self.gate_up = build.column(hidden, sizes, module=(module,), bias=spec.bias)
        self.down = build.row(inner, {"down": hidden}, module=(module,), bias=spec.bias)
        self.norms = Norms(build, layer, "mlp")
        self._activation = spec.activation
        self._kernels = build.kernels

    def product(self, residual: Residual) -> Tensor:
        """What it makes of the residual, before the norm of what it gives, added to nothing."""
        product = self._kernels.norm_linear(residual, self.norms.pre, self.gate_up)
        return self.down(self._kernels.activate(product, self._activation))

    def forward_beside(
        self, residual: Residual, onto: Tensor, *, norm: RMSNorm | None, next_norm: RMSNorm | None
    ) -> Residual:
        """As `forward`, but added to `onto`. norm: of the block beside this one."""
        product = self._kernels.norm_linear(residual, norm, self.gate_up)
        return self._kernels.linear_add(
            self._kernels.activate(product, self._activation),
            self.down,
            onto,
            post_norm=self.norms.post,
            next_norm=next_norm,
        )

    def forward(self, residual: Residual, *, next_norm: RMSNorm | None) -> Residual:
        return self._kernels.mlp(
            residual,
            self.norms.pre,
            self.gate_up,
            self.down,
            activation=self._activation,
            post_norm=self.norms.post,
            next_norm=next_norm,
        )

    def linears(self) -> Iterator[Linear]:
        yield from (self.gate_up, self.down)

    def slots(self, layer: int) -> Iterator[WeightSlot]:
        for linear in self.linears():
            yield from linear.slots(layer)
        yield from self.norms.slots(layer)


class ExpertsBlock:
    """residual + the MLPs that the router picks for each token, weighed, and a shared one."""

    def __init__(self, build: Builder, layer: LayerSpec, spec: MoE, *, module: int) -> None:
        hidden = build.spec.hidden_size
        self.router = build.router(hidden, spec)
        self.experts = build.experts(hidden, spec, module=module)
        self.shared = SharedExpert(build, spec, module=module) if spec.shared_size else None
        self.norms = Norms(build, layer, "mlp")
        self._kernels = build.kernels
        self._parallel = build.parallel

    def forward(self, residual: Residual, *, next_norm: RMSNorm | None) -> Residual:
        kernels, hidden = self._kernels, residual.hidden
        if residual.normed is not None:
            hidden = residual.normed
        elif self.norms.pre is not None:
            hidden = kernels.rms_norm(hidden, self.norms.pre)
        routed = Residual(hidden.to(self.router.weight.dtype))
        logits = kernels.norm_linear(routed, None, self.router)
        if self.shared is None and self.norms.post is None and self._parallel.size == 1:
            return Residual(kernels.experts(hidden, logits, self.experts, residual=residual.hidden))
        mixed = kernels.experts(hidden, logits, self.experts)
        if self.shared is not None:
            mixed = mixed.add_(self.shared.partial(hidden))
        norms = {"post_norm": self.norms.post, "next_norm": next_norm}
        return kernels.reduce_add(mixed, residual.hidden, self._parallel, **norms)

    def linears(self) -> Iterator[Linear]:
        yield from self.experts.linears()
        if self.shared is not None:
            yield from (self.shared.gate_up, self.shared.down)

    def slots(self, layer: int) -> Iterator[WeightSlot]:
        yield from self.router.slots(layer)
        yield from self.experts.slots(layer)
        if self.shared is not None:
            yield from self.shared.slots(layer)
        yield from self.norms.slots(layer)


class SharedExpert:
    """The MLP beside those of experts that every token passes through, perhaps weighed."""

    def __init__(self, build: Builder, spec: MoE, *, module: int) -> None:
        hidden, inner = build.spec.hidden_size, spec.shared_size
        sizes = {"shared_gate": inner, "shared_up": inner}
        self.gate_up = build.column(hidden, sizes, module=(module,), bias=False)
        self.down = build.row(inner, {"shared_down": hidden}, module=(module,), bias=False)
        self.gate = build.whole(hidden, {"shared_expert_gate": 1}) if spec.shared_gate else None
        self._activation = spec.activation
        self._kernels = build.kernels

    def partial(self, hidden: Tensor) -> Tensor:
        """This rank's share. hidden: normed, [num_tokens, hidden_size]. Returns new memory."""
        product = self._kernels.norm_linear(Residual(hidden), None, self.gate_up)
        product = self.down.partial(self._kernels.activate(product, self._activation))
        return product if self.gate is None else product.mul_(self.gate(hidden).sigmoid())

    def slots(self, layer: int) -> Iterator[WeightSlot]:
        for linear in (self.gate_up, self.down, self.gate):
            if linear is not None:
                yield from linear.slots(layer)


def rounded(value: float, dtype: torch.dtype) -> float:
    """As Gemma rounds what it multiplies by: to the precision of what is multiplied. It is a number
    of the host's: a graph being captured cannot take a tensor to the device."""
    return torch.tensor(value, dtype=dtype, device="cpu").item()
