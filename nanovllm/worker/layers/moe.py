"""The experts of a layer as data: their weights, and which of them a token goes to.

Built by `models.builder`, filled by `weights`; `Kernels.experts` multiplies. `choose` is the oracle
of kernels that route by themselves.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.checkpoint.spec import MoE, Router
from nanovllm.worker.layers.linear import Linear, WeightSlot
from nanovllm.worker.parallel import Cut

LEAST_SUM = 1e-20  # of sigmoids that are divided by it


@dataclass(slots=True, eq=False)
class Experts:
    """`each` is (gate and up, down) of every expert that is here, those from number `first` on.

    stacked: the same weights as two matrices, those of all of them one below the other, where a
    device multiplies by them at once; the layers of `each` are then views. correction: what is
    added to scores before experts are chosen. factors: what their weights are multiplied by.
    """

    spec: MoE
    each: list[tuple[Linear, Linear]]
    stacked: tuple[Linear, Linear] | None = None
    correction: Tensor | None = None  # [num_experts] fp32
    factors: Tensor | None = None  # [num_experts] fp32
    first: int = 0

    @property
    def own(self) -> Cut:
        """Which of all experts are here; other ranks have the others."""
        return Cut(self.first, len(self.each), self.spec.num_experts)

    @property
    def waits_for_router(self) -> bool:
        """Whether the host has to know what the router picks: then no graph can be captured."""
        return self.stacked is None

    def linears(self) -> Iterator[Linear]:
        for pair in self.each:
            yield from pair

    def slots(self, layer: int) -> Iterator[WeightSlot]:
        for expert, pair in enumerate(self.each, self.first):
            for linear in pair:
                yield from linear.slots(layer, Cut(expert, 1, self.spec.num_experts))
        if self.correction is not None:
            yield WeightSlot.of_whole("router_correction", "bias", self.correction, layer)
        if self.factors is not None:
            yield WeightSlot.of_whole("expert_scale", "", self.factors, layer)


def choose(
    logits: Tensor,
    router: Router,
    top_k: int,
    correction: Tensor | None,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights (fp32) and indices (int64) of each token's experts, both [num_tokens, top_k].

    logits: [num_tokens, num_experts]; correction and factors: as of `Experts`.
    """
    wide = logits.float()
    scores = wide.softmax(-1) if router.scores == "softmax" else wide.sigmoid()
    keys = scores if correction is None else scores + correction
    if router.num_groups > 1:
        groups = keys.view(len(keys), router.num_groups, -1)
        best = groups.topk(2, dim=-1).values.sum(-1).topk(router.top_groups, dim=-1).indices
        kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, True)
        keys = groups.masked_fill(~kept[..., None], -torch.inf).view_as(keys)
    indices = keys.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, indices)
    if router.renormalizes:
        weights = weights / weights.sum(-1, keepdim=True).clamp_(min=LEAST_SUM)
    if factors is not None:
        weights = weights * factors[indices]
    return weights * router.scale, indices
