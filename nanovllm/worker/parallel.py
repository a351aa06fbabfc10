"""Parallelism as layers see it: which share of a size is this rank's, and how sums meet.

Carried by linear layers, the vocabulary, and whoever sizes attention. Every rank of a stage calls
`reduce` and `gather` in the same order, and gets the same bits.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor, distributed

if TYPE_CHECKING:
    from nanovllm.worker.layers.norm import RMSNorm

SEGMENT = 128  # ids that stay on one rank: those that enter the race of sampling as one


class Cut(NamedTuple):
    """A piece [start, start + size) of an axis that has `whole` places."""

    start: int
    size: int
    whole: int

    @classmethod
    def all_of(cls, whole: int) -> "Cut":
        return cls(0, whole, whole)

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.size)

    @property
    def is_whole(self) -> bool:
        return self.size == self.whole


class Exchange(Protocol):
    """A faster way for small sums than the group's (`kernels.triton.exchange`). Its sums are None
    of what is too large; all ranks decide alike."""

    def reduce(self, partial: Tensor) -> Tensor | None:
        """The sum of what all ranks hold."""

    def reduce_add(
        self, partial: Tensor, residual: Tensor, next_weight: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None] | None:
        """residual + the sum, written over residual; and if the norm is known that comes next, the
        parts of a `kernels.base.Weighed`."""

    def reduce_normed(self, partial: Tensor, residual: Tensor, norm: "RMSNorm") -> Tensor | None:
        """The same, and what the norm makes of it, [num_tokens, hidden_size]."""

    def for_rows(self, like: Tensor, max_tokens: int) -> "RowExchange | None":
        """What is faster where sums are larger, if there is something; all ranks call it. like: a
        token's row. max_tokens: of a step."""


class RowExchange(Protocol):
    """A way for sums of many tokens, after which each rank has the residual of its share of them,
    and what a norm makes of all (`kernels.triton.row_exchange`)."""

    def takes(self, num_tokens: int) -> bool:
        """Whether so many go this way; all ranks decide alike."""

    def share(self, rank: int, num_tokens: int) -> slice:
        """Which of the tokens are that rank's."""

    def places(self, num_tokens: int) -> Iterable[tuple[slice, Tensor]]:
        """Tokens, and where this rank's products of them are to be written, [tokens, columns]."""

    def add_normed(self, residual: Tensor, norm: "RMSNorm", num_tokens: int) -> Tensor:
        """Adds what all ranks have written to its `places` to this rank's rows of the residual, in
        place. Returns what the norm makes of the rows of all, [num_tokens, columns], in memory that
        the next call writes to."""


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """This rank among the `size` that share every layer of its stage, one of `num_stages` of a
    pipeline. group: those ranks, in `torch.distributed`; None: its default one.
    spreads_experts: ranks hold whole experts, and not a part of each.
    """

    rank: int = 0
    size: int = 1
    spreads_experts: bool = False
    group: distributed.ProcessGroup | None = None
    exchange: Exchange | None = None
    rows: RowExchange | None = None
    stage: int = 0
    num_stages: int = 1

    @property
    def number(self) -> int:
        """Of this rank among those of all stages."""
        return self.stage * self.size + self.rank

    @property
    def num_ranks(self) -> int:
        """Of all stages."""
        return self.size * self.num_stages

    @property
    def is_only_stage(self) -> bool:
        return self.num_stages == 1

    @property
    def is_alone(self) -> bool:
        """Whether no other rank has a part of the model."""
        return self.num_ranks == 1

    def share(self, whole: int, *, unit: int = 1, repeats: bool = False) -> Cut:
        """This rank's part of an axis, in multiples of `unit` (a head, a group of weights).

        repeats: if there are fewer units than ranks, several ranks have the same one (KV heads).
        Raises `ValueError` if the units cannot be shared out evenly.
        """
        num_units = whole // unit
        num_shares = min(self.size, num_units) if repeats else self.size
        if whole % unit or num_units % num_shares or self.size % num_shares:
            possible = [n for n in range(1, num_units + 1) if num_units % n == 0]
            raise ValueError(
                f"tensor_parallel_size: {num_units} units of {unit} cannot be shared by "
                f"{self.size} ranks: possible are {', '.join(map(str, possible))}"
            )
        size = num_units // num_shares * unit
        return Cut(self.rank * num_shares // self.size * size, size, whole)

    def share_experts(self, whole: int) -> Cut:
        """Which experts this rank holds: all of them, unless they are spread. Ranks have equally
        many, or one more or less; whether each has one, `checkpoint.num_ranks` sees to."""
        if not self.spreads_experts:
            return Cut.all_of(whole)
        start = self.rank * whole // self.size
        return Cut(start, (self.rank + 1) * whole // self.size - start, whole)

    def share_vocabulary(self, whole: int) -> Cut:
        """This rank's ids, whole segments of them. The last ranks have fewer, or none."""
        width = self.vocabulary_width(whole)
        start = min(self.rank * width, whole)
        return Cut(start, min(width, whole - start), whole)

    def vocabulary_width(self, whole: int) -> int:
        """Ids of each rank but the last ones; all, of a single rank."""
        return whole if self.size == 1 else -(-whole // (self.size * SEGMENT)) * SEGMENT

    def reduce(self, partial: Tensor) -> Tensor:
        """The sum of what all ranks hold, perhaps written over `partial`."""
        if self.size > 1:
            found = None if self.exchange is None else self.exchange.reduce(partial)
            if found is not None:
                return found
            distributed.all_reduce(partial, group=self.group)
        return partial

    def rows_of(self, hidden: Tensor, wanted: Tensor, num_tokens: int) -> Tensor:
        """hidden[wanted] of all `num_tokens`, new memory, on every rank; hidden: of all, or of this
        rank's share."""
        if self.rows is None or len(hidden) == num_tokens:
            return hidden[wanted]
        if not len(hidden):
            return self.reduce(hidden.new_zeros(len(wanted), hidden.shape[1]))
        own = self.rows.share(self.rank, num_tokens)
        return self.reduce(own_rows(wanted, own, hidden.__getitem__))

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all ranks, [size, *part.shape]: all are of one shape."""
        if self.size == 1:
            return part[None]
        # As a sum to which the others add zeros, exactly: of what is small it takes no longer.
        parts = part.new_zeros(self.size, *part.shape)
        parts[self.rank] = part
        return self.reduce(parts)


def own_rows(places: Tensor, held: slice, look_up: Callable[[Tensor], Tensor]) -> Tensor:
    """Rows of a table of which this rank holds some, not none; zeros for all others.

    places: [n] int64, in the whole table. look_up: rows by their places among those that are held.
    Returns new memory, [n, columns].
    """
    inside = places.clamp(held.start, held.stop - 1)
    return look_up(inside - held.start).masked_fill_((places != inside)[:, None], 0)


SINGLE = TensorParallel()
