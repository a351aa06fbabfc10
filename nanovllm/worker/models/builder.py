"""What the blocks of a decoder are built with: a device, and the form its weights are kept in.

`Decoder` makes one; blocks ask it for layers, and so need not know what is quantized or sharded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from nanovllm.checkpoint.quantization import Scheme
from nanovllm.checkpoint.spec import Attention, DecoderSpec, Norm
from nanovllm.worker.attention.base import ModelAttention
from nanovllm.worker.kernels.base import Kernels
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.layers.rotary import cos_sin_table
from nanovllm.worker.parallel import Cut, TensorParallel
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
        units than there are ranks (KV heads), several hold the same. module: the layer's index,
        and the expert's if it is one."""
        share = partial(self.parallel.share, unit=unit, repeats=True)
        cuts = {part: share(size) for part, size in parts.items()}
        return self._linear(Cut.all_of(inputs), cuts, axis=0, module=module, bias=bias)

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
        return self._linear(taken, cuts, axis=1, module=module, bias=bias)

    def router(self, inputs: int, num_experts: int) -> Linear:
        """Whole on every rank, and never quantized: what it picks decides about all the rest."""
        parts = {"router": num_experts}
        return Linear.empty(
            inputs, parts, bias=False, shard_axis=0, dtype=self.dtype, device=self.device
        )

    def _linear(
        self,
        inputs: Cut,
        parts: dict[str, Cut],
        *,
        axis: Literal[0, 1],
        module: tuple[int, ...],
        bias: bool,
    ) -> Linear:
        # Built nowhere: nothing is ever allocated in a form that it will not be kept in.
        linear = Linear.empty(
            inputs, parts, bias=bias, shard_axis=axis, dtype=self.dtype, device=NOWHERE
        )
        linear.parallel = self.parallel
        names = [self.spec.names.safetensors[part].format(*module) for part in parts]
        kept = None if self.scheme is None else self.scheme.format_of_all(names)
        linear.method = method_for(kept, linear, self.device)
        linear.method.create(linear, self.device)
        return linear

    def norm(self, size: int, spec: Norm) -> RMSNorm:
        return RMSNorm.empty(size, spec, dtype=self.dtype, device=self.device)

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
