"""The two ends of a model: ids become vectors, and vectors logits. Ranks hold different ids.

`Decoder` owns one. Embedding and head are linear layers with an output for each id; a tied head is
the embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.parallel import Cut, TensorParallel, own_rows


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Which ids of all this rank has."""

    parallel: TensorParallel
    cut: Cut

    @classmethod
    def of(cls, size: int, parallel: TensorParallel) -> "Vocabulary":
        return cls(parallel, parallel.share_vocabulary(size))

    def embed(
        self, token_ids: Tensor, table: Linear, lookup: Callable[[Tensor, Linear], Tensor]
    ) -> Tensor:
        """token_ids: [n]; table: the vectors of this rank's ids. lookup: as `Kernels.lookup`.
        Returns the vectors on every rank, [n, hidden_size], new memory."""
        if self.is_whole:
            return lookup(token_ids, table)
        return self.parallel.reduce(self.own_part(token_ids, table, lookup))

    def own_part(
        self, token_ids: Tensor, table: Linear, lookup: Callable[[Tensor, Linear], Tensor]
    ) -> Tensor:
        """What of `embed` this rank has: one rank has each vector, and the others add zeros."""
        if not self.cut.size:
            size, dtype = table.weight.shape[1], table.weight.dtype
            return torch.zeros(len(token_ids), size, dtype=dtype, device=token_ids.device)
        return own_rows(token_ids, self.cut.slice, lambda places: lookup(places, table))

    @property
    def is_whole(self) -> bool:
        """Whether there is no other rank with ids."""
        return self.parallel.size == 1

    def gather(self, logits: Tensor) -> Tensor:
        """logits: [n, ids of this rank]. Returns those of all ids, on every rank."""
        if self.is_whole:
            return logits
        assert logits.shape[1] == self.cut.size
        width = self.parallel.vocabulary_width(self.cut.whole)
        parts = self.parallel.gather(F.pad(logits, (0, width - self.cut.size)))
        return torch.cat(parts.unbind(0), dim=1)[:, : self.cut.whole].contiguous()
