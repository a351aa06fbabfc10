"""What Gemma 4 has besides attention and an MLP: experts beside the MLP, and inputs of layers.

Built by `decoder` where a `LayerSpec` asks for it. Plain operations: only products are fused.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nanovllm.checkpoint.spec import Dense, LayerSpec, MoE
from nanovllm.checkpoint.stages import Stage
from nanovllm.worker.kernels.base import Residual
from nanovllm.worker.layers.linear import Linear, WeightSlot
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.models.blocks import DenseBlock, rounded
from nanovllm.worker.models.builder import Builder
from nanovllm.worker.parallel import Cut


class DenseAndExpertsBlock:
    """residual + norm(norm(dense MLP of it) + norm(experts of it))."""

    def __init__(
        self, build: Builder, layer: LayerSpec, dense: Dense, moe: MoE, *, module: int
    ) -> None:
        hidden = build.spec.hidden_size
        self.dense = DenseBlock(build, layer, dense, module=module)
        self.norms = self.dense.norms
        self.router = build.router(hidden, moe)
        self.experts = build.experts(hidden, moe, module=module)
        names = "router_norm", "dense_post_norm", "experts_norm", "experts_post_norm"
        self._own = {name: build.norm(hidden, layer.norm) for name in names}
        self._norm_spec = layer.norm
        self._router_scale = hidden**-0.5
        self._kernels = build.kernels
        self._parallel = build.parallel

    def forward(self, residual: Residual, *, next_norm: RMSNorm | None) -> Residual:
        kernels, hidden = self._kernels, residual.hidden
        dense = self.dense.product(residual)
        scaled = kernels.rms_norm(hidden, self._own["router_norm"]).mul_(self._router_scale)
        routed = Residual(scaled.to(self.router.weight.dtype))
        logits = kernels.norm_linear(routed, None, self.router)
        taken = kernels.rms_norm(hidden, self._own["experts_norm"])
        mixed = self._parallel.reduce(kernels.experts(taken, logits, self.experts))
        both = kernels.rms_norm(dense, self._own["dense_post_norm"])
        both = both.add_(kernels.rms_norm(mixed, self._own["experts_post_norm"]))
        return kernels.add(both, hidden, post_norm=self.norms.post, next_norm=next_norm)

    def linears(self) -> Iterator[Linear]:
        yield from self.dense.linears()
        yield from self.experts.linears()

    def slots(self, layer: int) -> Iterator[WeightSlot]:
        yield from self.dense.slots(layer)
        yield from self.router.slots(layer)
        yield from self.experts.slots(layer)
        for name, norm in self._own.items():
            slot = norm.slot(name, layer, self._norm_spec)
            # Called a scale there, and of no module.
            yield (
                slot if name != "router_norm" else WeightSlot.of_whole(name, "", norm.weight, layer)
            )


class LayerInput:
    """residual + norm(out(activation(gate(residual)) * what the layer is given for the token))."""

    def __init__(self, build: Builder, layer: LayerSpec) -> None:
        hidden, size = build.spec.hidden_size, layer.input_size
        assert isinstance(layer.mlp, Dense) and layer.mlp.activation == "gelu_tanh"
        self.gate = build.whole(hidden, {"layer_gate": size})
        self.out = build.whole(size, {"layer_out": hidden})
        self.norm = build.norm(hidden, layer.norm)
        self._norm_spec = layer.norm
        self._kernels = build.kernels

    def forward(self, residual: Residual, given: Tensor) -> Residual:
        """given: [num_tokens, input_size]."""
        gate = F.gelu(self.gate(residual.hidden), approximate="tanh")
        product = self.out(gate.mul_(given))
        return self._kernels.add(product, residual.hidden, post_norm=self.norm)

    def slots(self, layer: int) -> Iterator[WeightSlot]:
        yield from self.gate.slots(layer)
        yield from self.out.slots(layer)
        yield self.norm.slot("layer_post_norm", layer, self._norm_spec)


class LayerInputs:
    """What each layer of a stage is given for a token: a vector of its id's, and a projection of
    the embedding. The same on every rank of the stage."""

    def __init__(self, build: Builder, stage: Stage) -> None:
        spec = build.spec
        size, self._num_layers = spec.input_size, len(stage.layers)
        own = Cut(stage.first * size, self._num_layers * size, spec.num_layers * size)
        shape = spec.vocab_size, own.size
        self.embedding = torch.empty(shape, dtype=build.dtype, device=build.device)
        self.projection = build.whole(spec.hidden_size, {"layer_projection": own})
        self.norm = build.norm(size, spec.norm)
        self._piece = Cut.all_of(spec.vocab_size), own
        self._spec = spec
        self._kernels = build.kernels

    def of(self, token_ids: Tensor, hidden: Tensor) -> Tensor:
        """hidden: the embedding, [num_tokens, hidden_size]. Returns [num_tokens, layers of the
        stage, input_size]."""
        size = self._spec.input_size
        own = F.embedding(token_ids, self.embedding)
        own *= rounded(size**0.5, own.dtype)
        projected = self.projection(hidden).mul_(self._spec.hidden_size**-0.5)
        shape = len(hidden), self._num_layers, size
        projected = self._kernels.rms_norm(projected.view(-1, size), self.norm)
        return projected.view(shape).add_(own.view(shape)).mul_(2**-0.5)

    def slots(self) -> Iterator[WeightSlot]:
        yield WeightSlot("layer_embedding", "weight", self.embedding, self._piece)
        yield from self.projection.slots(None)
        yield self.norm.slot("layer_projection_norm", None, self._spec.norm)
