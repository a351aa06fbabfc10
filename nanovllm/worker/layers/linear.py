"""The linear layer of every model: which share of it a rank holds, and who multiplies by it.

A `LinearMethod` owns the form weights are kept in: it makes their memory, says which pieces of
which checkpoint tensors go where (`WeightSlot`, read by `weights`), and multiplies. Methods of
quantized weights are in `quant`; models only call the layer.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, Self, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nanovllm.checkpoint.gguf import GGUFTensor
from nanovllm.worker.parallel import SINGLE, Cut, TensorParallel

ALL = slice(None)


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """A piece of a checkpoint tensor, and where it goes.

    part: what the tensor is ("q", "gate", "embedding" …), a key of `WeightNames`; kind: the end of
    its name, empty if it has none. piece: what of each axis of the whole part is taken; expert:
    which place along a leading axis, if the part is one expert's. target: of the piece's shape, or
    one that it spreads to. dtype: the only one a file may hold it in; None: any but those that need
    a scale. note: what of the config says so, for an error. put(values, rows): how some rows come
    into target; None: they are copied. outputs: the axis of the part's outputs, along which lie the
    parts that a file fuses into one tensor; None: such a tensor says the same of all. keep: takes
    the rows of a GGUF tensor as they are stored, in the order of the slot's; then target has a
    shape and no memory. is_optional: a checkpoint may lack it, and target is of no size.
    """

    part: str
    kind: str
    target: Tensor
    piece: tuple[Cut, ...]
    layer: int | None = None
    expert: Cut | None = None
    dtype: torch.dtype | None = None
    note: str = ""
    put: Callable[[Tensor, slice], None] | None = None
    outputs: int | None = 0
    keep: Callable[[GGUFTensor], None] | None = None
    is_optional: bool = False

    @classmethod
    def of_whole(
        cls,
        part: str,
        kind: str,
        target: Tensor,
        layer: int | None = None,
        *,
        put: Callable[[Tensor, slice], None] | None = None,
    ) -> Self:
        """Of a tensor that every rank takes whole."""
        return cls(part, kind, target, tuple(map(Cut.all_of, target.shape)), layer, put=put)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole part, as a checkpoint has it."""
        return tuple(cut.whole for cut in self.piece)

    def write(self, values: Tensor, rows: slice = ALL) -> None:
        """values: of those rows of the piece."""
        if self.put is None:
            self.target[rows].copy_(values)
        else:
            self.put(values, rows)


class LinearMethod(Protocol):
    """A form that weights are kept in.

    kind: by which kernels know it; those that do not know it leave the product to `apply`.
    """

    @property
    def kind(self) -> str: ...

    def create(self, linear: "Linear", device: torch.device) -> None:
        """Give a layer whose weight is on the meta device memory; its weights are yet unset."""

    def slots(self, linear: "Linear") -> Iterator[WeightSlot]:
        """What checkpoints must bring, while rows of the weight are still rows in memory."""

    def tensors(self, linear: "Linear") -> Iterator[Tensor]:
        """What the layer's weights take memory for."""

    def apply(self, linear: "Linear", x: Tensor) -> Tensor:
        """x: [n, in_features]. Returns new memory, [n, out_features]."""


class TableMethod(LinearMethod, Protocol):
    """A form that an embedding may be kept in, too."""

    def lookup(self, linear: "Linear", places: Tensor) -> Tensor:
        """As `Linear.lookup`."""


class Unquantized:
    """The weight as it is, [out_features, in_features]."""

    kind: ClassVar[str] = "plain"

    def create(self, linear: "Linear", device: torch.device) -> None:
        # Not by `empty_like`: the first use of it on the meta device imports all of sympy.
        linear.weight = torch.empty(linear.weight.shape, dtype=linear.weight.dtype, device=device)
        linear.allocate_bias(device)

    def slots(self, linear: "Linear") -> Iterator[WeightSlot]:
        for part, cut, rows in linear.rows():
            yield WeightSlot(part, "weight", linear.weight[rows], (cut, linear.inputs))
            yield from linear.bias_slots(part, cut, rows)

    def tensors(self, linear: "Linear") -> Iterator[Tensor]:
        yield linear.weight

    def apply(self, linear: "Linear", x: Tensor) -> Tensor:
        return F.linear(x, linear.weight, linear.bias)

    def lookup(self, linear: "Linear", places: Tensor) -> Tensor:
        return F.embedding(places, linear.weight)


UNQUANTIZED = Unquantized()


@dataclass(slots=True, eq=False)
class Linear:
    """y = x Wᵀ + b, of which this rank holds some outputs, or multiplies some inputs.

    shard_axis: 0 if ranks hold different outputs (q/k/v, gate/up), 1 if different inputs (o, down):
    then y is the sum of what all ranks compute. parts: the checkpoint tensors stacked in W, and
    which of their outputs. inputs: which of all inputs; None: all.
    """

    weight: Tensor  # [out_features, in_features] of this rank, unless `method` keeps it otherwise
    bias: Tensor | None  # [out_features]
    parts: dict[str, Cut]
    shard_axis: Literal[0, 1]
    method: LinearMethod = UNQUANTIZED
    scale: Tensor | None = None  # of weights that `method` keeps quantized; by channel: [outputs]
    copy: "Linear | None" = None  # the same unquantized, if `method` keeps both: for few tokens
    taken: Cut | None = None
    parallel: TensorParallel = SINGLE

    @classmethod
    def empty(
        cls,
        inputs: int | Cut,
        parts: Mapping[str, int | Cut],
        *,
        bias: bool,
        shard_axis: Literal[0, 1],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        """A layer whose weights are yet to be loaded. Sizes without a cut are whole."""
        taken = _as_cut(inputs)
        cuts = {part: _as_cut(size) for part, size in parts.items()}
        num_outputs = sum(cut.size for cut in cuts.values())
        weight = torch.empty(num_outputs, taken.size, dtype=dtype, device=device)
        zeros = torch.zeros(num_outputs, dtype=dtype, device=device) if bias else None
        return cls(weight, zeros, cuts, shard_axis, taken=taken)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [n, inputs of this rank]. Returns new memory, the same on all ranks if they share
        the inputs."""
        return self.reduce(self.partial(x))

    def partial(self, x: Tensor) -> Tensor:
        """What this rank has of the product."""
        return self.method.apply(self, x)

    def lookup(self, places: Tensor) -> Tensor:
        """The weights of some outputs, [n, inputs], in the model's precision and in new memory;
        places: [n] int64. The layer's method must be a `TableMethod`."""
        return cast(TableMethod, self.method).lookup(self, places)

    @property
    def is_partial(self) -> bool:
        """Whether a product is only this rank's share of a sum: nothing may be added to it yet."""
        return self.shard_axis == 1 and self.parallel.size > 1

    def reduce(self, product: Tensor) -> Tensor:
        """What all ranks' products add up to, where they do."""
        return self.parallel.reduce(product) if self.is_partial else product

    @property
    def inputs(self) -> Cut:
        return self.taken or Cut.all_of(self.weight.shape[1])

    def rows(self) -> Iterator[tuple[str, Cut, slice]]:
        """Each part, which of its outputs are here, and in which rows of the weight."""
        start = 0
        for part, cut in self.parts.items():
            yield part, cut, slice(start, start + cut.size)
            start += cut.size

    def allocate_bias(self, device: torch.device) -> None:
        if self.bias is not None:
            self.bias = torch.zeros(self.bias.shape, dtype=self.bias.dtype, device=device)

    def bias_slots(self, part: str, cut: Cut, rows: slice) -> Iterator[WeightSlot]:
        """Of one of `rows`. A bias is added once: of a sum over ranks, the others' stays zero."""
        if self.bias is not None:
            adds = self.shard_axis == 0 or self.parallel.rank == 0
            put = None if adds else _put_nothing
            yield WeightSlot(part, "bias", self.bias[rows], (cut,), put=put)

    def slots(self, layer: int | None, expert: Cut | None = None) -> Iterator[WeightSlot]:
        """One slot per checkpoint tensor."""
        assert self.weight.layout is torch.strided
        for slot in self.method.slots(self):
            yield replace(slot, layer=layer, expert=expert)


def _as_cut(size: int | Cut) -> Cut:
    return Cut.all_of(size) if isinstance(size, int) else size


def _put_nothing(values: Tensor, rows: slice) -> None:
    pass
