"""The two ends of a model: ids become vectors, and vectors logits. Ranks hold different ids.

`Decoder` owns one. A tied head multiplies by the embedding's own rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nanovllm.worker.parallel import Cut, TensorParallel


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Which ids of all this rank has."""

    parallel: TensorParallel
    cut: Cut

    @classmethod
    def of(cls, size: int, parallel: TensorParallel) -> "Vocabulary":
        return cls(parallel, parallel.share_vocabulary(size))

    def embed(self, token_ids: Tensor, embedding: Tensor) -> Tensor:
        """token_ids: [n]; embedding: [ids of this rank, hidden_size]. Returns the vectors on every
        rank, [n, hidden_size], new memory: one rank has each, and the others add zeros."""
        if self.cut.is_whole:
            return F.embedding(token_ids, embedding)
        if not self.cut.size:
            return self.parallel.reduce(embedding.new_zeros(len(token_ids), embedding.shape[1]))
        places = token_ids - self.cut.start
        is_elsewhere = (places < 0) | (places >= self.cut.size)
        vectors = F.embedding(places.masked_fill_(is_elsewhere, 0), embedding)
        return self.parallel.reduce(vectors.masked_fill_(is_elsewhere[:, None], 0))

    @property
    def is_whole(self) -> bool:
        """Whether this rank has all ids."""
        return self.cut.is_whole

    def gather(self, logits: Tensor) -> Tensor:
        """logits: [n, ids of this rank]. Returns those of all ids, on every rank."""
        if self.is_whole:
            return logits
        assert logits.shape[1] == self.cut.size
        width = self.parallel.vocabulary_width(self.cut.whole)
        parts = self.parallel.gather(F.pad(logits, (0, width - self.cut.size)))
        return torch.cat(parts.unbind(0), dim=1)[:, : self.cut.whole].contiguous()
