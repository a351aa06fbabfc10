"""What the blocks of a decoder are built with: a device, and the form its weights are kept in.

`Decoder` makes one; blocks ask it for layers, and so need not know what is quantized or sharded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from nanovllm.checkpoint.quantization import Scheme
from nanovllm.checkpoint.spec import Attention, DecoderSpec, MoE, Norm, QueryGrowth
from nanovllm.worker.attention.base import ModelAttention
from nanovllm.worker.kernels.base import Kernels
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.layers.moe import Experts
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.layers.rotary import cos_sin_table
from nanovllm.worker.parallel import SINGLE, Cut, TensorParallel
from nanovllm.worker.quant.select import method_for

NOWHERE = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class Builder:
    """Makes the layers of one rank's model. Weights are unset until `weights.load_weights`."""

    spec: DecoderSpec
    kernels: Kernels
    attention: ModelAttention
    dtype: torch.dtype
    device: torch.device
    scheme: Scheme | None
    parallel: TensorParallel

    def column(
        self,
        inputs: int,
        parts: Mapping[str, int],
        *,
        module: tuple[int, ...],
        bias: bool,
        unit: int = 1,
    ) -> Linear:
        """Ranks hold different outputs of each part, in multiples of `unit`; where a part has fewer
        units than there are ranks (KV heads), several hold the same. module: the layer's index."""
        share = partial(self.parallel.share, unit=unit, repeats=True)
        cuts = {part: share(size) for part, size in parts.items()}
        return self._made(self._unmade(Cut.all_of(inputs), cuts, axis=0, module=module, bias=bias))

    def row(
        self,
        inputs: int,
        parts: Mapping[str, int],
        *,
        module: tuple[int, ...],
        bias: bool,
        unit: int = 1,
    ) -> Linear:
        """Ranks multiply different inputs, in multiples of `unit`, and add up their products."""
        taken = self.parallel.share(inputs, unit=unit)
        cuts = {part: Cut.all_of(size) for part, size in parts.items()}
        return self._made(self._unmade(taken, cuts, axis=1, module=module, bias=bias))

    def vocabulary(self, part: str, own: Cut) -> Linear:
        """The embedding or the head: a layer with an output for each id; own: this rank's ids."""
        whole = Cut.all_of(self.spec.hidden_size)
        linear = self._bare(whole, {part: own}, axis=0, bias=False)
        if own.size and self.scheme is not None:
            kept = self.scheme.format_of_end(self.spec.names.safetensors[part])
            linear.method = method_for(kept, linear, self.device)
        return self._made(linear)

    def router(self, inputs: int, spec: MoE) -> Linear:
        """Whole on every rank, and never quantized: what it picks decides about all the rest. In
        fp32 where sigmoids are compared, as transformers does."""
        wide = spec.router.scores == "sigmoid"
        return self.whole(inputs, {"router": spec.num_experts}, bias=spec.router.bias, wide=wide)

    def whole(
        self, inputs: int, parts: Mapping[str, int | Cut], *, bias: bool = False, wide: bool = False
    ) -> Linear:
        """A small layer that every rank of a stage has all of, unquantized; wide: in fp32."""
        dtype = torch.float32 if wide else self.dtype
        return Linear.empty(inputs, parts, bias=bias, shard_axis=0, dtype=dtype, device=self.device)

    def experts(self, inputs: int, spec: MoE, *, module: int) -> Experts:
        """Ranks hold a part of every expert, or some experts whole, as if each were alone with
        them. Stacked, if the kernels multiply by that form."""
        own = self.parallel.share_experts(spec.num_experts)
        maker = self if own.is_whole else replace(self, parallel=SINGLE)
        inner, whole = maker.parallel.share(spec.intermediate_size), Cut.all_of(inputs)
        first, second = {"expert_gate": inner, "expert_up": inner}, {"expert_down": whole}
        if spec.takes_turns:
            first = {"expert_gate_up": Cut(*(2 * size for size in inner))}
        each = []
        for expert in range(own.start, own.start + own.size):
            build = partial(maker._unmade, module=(module, expert), bias=spec.bias)
            each.append((build(whole, first, axis=0), build(inner, second, axis=1)))
        made = Experts(spec, each, first=own.start)
        if spec.router.corrects:
            made.correction = torch.zeros(spec.num_experts, device=self.device)
        if spec.router.norms:
            made.factors = torch.ones(spec.num_experts, device=self.device)
        kinds = {linear.method.kind for linear in made.linears()}
        if len(kinds) == 1 and kinds <= self.kernels.stacked_kinds:
            gate_ups, downs = zip(*each, strict=True)
            made.stacked = self._stack(gate_ups), self._stack(downs)
        else:
            for linear in made.linears():
                self._made(linear)
        return made

    def _stack(self, linears: Sequence[Linear]) -> Linear:
        """A layer of all their rows, in the memory of which they become views."""
        first = linears[0]
        num_rows = len(first.weight)
        stack = Linear.empty(
            first.inputs,
            {"experts": num_rows * len(linears)},
            bias=first.bias is not None,
            shard_axis=first.shard_axis,
            dtype=self.dtype,
            device=NOWHERE,
        )
        stack.method = first.method
        self._made(stack)
        for index, linear in enumerate(linears):
            rows = slice(index * num_rows, (index + 1) * num_rows)
            linear.weight = stack.weight[rows]
            linear.scale = None if stack.scale is None else stack.scale[rows]
            linear.bias = None if stack.bias is None else stack.bias[rows]
        return stack

    def _made(self, linear: Linear) -> Linear:
        """With the memory that its method keeps it in."""
        linear.method.create(linear, self.device)
        return linear

    def _unmade(
        self,
        inputs: Cut,
        parts: dict[str, Cut],
        *,
        axis: Literal[0, 1],
        module: tuple[int, ...],
        bias: bool,
    ) -> Linear:
        """`_bare`, to be kept as its scheme says. module: the layer's index, and the expert's if it
        is one."""
        linear = self._bare(inputs, parts, axis=axis, bias=bias)
        linear.parallel = self.parallel
        names = [self.spec.names.safetensors[part].format(*module) for part in parts]
        kept = None if self.scheme is None else self.scheme.format_of_all(names)
        linear.method = method_for(kept, linear, self.device)
        return linear

    def _bare(
        self, inputs: Cut, parts: dict[str, Cut], *, axis: Literal[0, 1], bias: bool
    ) -> Linear:
        """A layer without memory: nothing is ever allocated in a form that it will not be kept
        in."""
        return Linear.empty(
            inputs, parts, bias=bias, shard_axis=axis, dtype=self.dtype, device=NOWHERE
        )

    def norm(self, size: int, spec: Norm) -> RMSNorm:
        return RMSNorm.empty(size, spec, dtype=self.dtype, device=self.device)

    def query_growth(self, growth: QueryGrowth) -> Tensor:
        """By how much queries grow at each position: [max_positions] fp32."""
        positions = torch.arange(self.spec.max_position_embeddings, device=self.device)
        return 1 + growth.beta * torch.log1p((positions // growth.context).float())

    def rotary_tables(self) -> dict[Attention, Tensor]:
        """Cosines and sines for each kind of attention; one table for all that turn alike."""
        tables = {
            (kind.rope, kind.head_dim): cos_sin_table(
                kind.rope,
                head_dim=kind.head_dim,
                max_positions=self.spec.max_position_embeddings,
                device=self.device,
            )
            for kind in self.spec.attentions
        }
        return {kind: tables[kind.rope, kind.head_dim] for kind in self.spec.attentions}
