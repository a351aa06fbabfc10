"""The maths of a decoder layer but for attention, as a seam: plain torch, or fused Triton on CUDA.

One object, chosen once at start (`select`) and handed to every layer.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from nanovllm.checkpoint.spec import Activation
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.layers.moe import Experts
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.parallel import TensorParallel


class Weighed(NamedTuple):
    """An RMS norm but for its scale, which belongs to the token and may follow the next product."""

    values: Tensor  # [num_tokens, hidden_size]: the residual times the norm's weight
    squares: Tensor  # [num_tokens, num_parts] fp32, whose sums are those of the residual's squares
    scale: Tensor | None = None  # [num_groups, num_tokens] fp32: of values that are quantized


class Residual(NamedTuple):
    """What the decoder's blocks read and add to. Where `TensorParallel.rows` takes a step's sums,
    hidden are the rows of this rank's share of the tokens, and normed is there, of all."""

    hidden: Tensor  # [num_tokens, hidden_size]
    # For the norm that comes next, if who added to it did so: weighed, or what it makes of hidden.
    weighed: Weighed | None = None
    normed: Tensor | None = None  # [num_tokens, hidden_size]


class Kernels(Protocol):
    """What layers ask for besides attention.

    Products with what surrounds them are one call each, so that a device may fuse them. Whether it
    may depends on the layer: a product that is only this rank's share of a sum is reduced before
    anything is added, and a norm behind the product (post_norm) comes before the residual. None
    stands for a norm that is not there; next_norm is the one that comes next, by which a result
    may be `Weighed`, or normed already. If the residual that is added to has fewer rows than there
    are tokens, they are this rank's share; then there is a next norm, and no other.
    """

    def rms_norm(self, hidden: Tensor, norm: RMSNorm) -> Tensor:
        """hidden: [num_tokens, size], kept. Returns new memory. A layer norm if norm.centers."""

    def lookup(self, places: Tensor, table: Linear) -> Tensor:
        """The weights of some outputs, [n, inputs], new memory. places: [n] int64."""

    def norm_linear(self, residual: Residual, norm: RMSNorm | None, linear: Linear) -> Tensor:
        """linear(norm(residual)), new memory; residual is kept."""

    def linear_add(
        self,
        hidden: Tensor,
        linear: Linear,
        residual: Tensor,
        *,
        post_norm: RMSNorm | None = None,
        next_norm: RMSNorm | None = None,
    ) -> Residual:
        """residual + post_norm(linear(hidden)), perhaps written over residual."""

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
        """residual + post_norm(down(activation(gate) * up)), as `linear_add`.

        gate and up: the halves of gate_up(norm(residual)).
        """

    def activate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """activation(gate) * up. gate_up: [num_tokens, 2 * size], gates first; perhaps
        overwritten."""

    def add(
        self,
        product: Tensor,
        residual: Tensor,
        *,
        post_norm: RMSNorm | None = None,
        next_norm: RMSNorm | None = None,
    ) -> Residual:
        """residual + post_norm(product), perhaps written over either."""

    def reduce_add(
        self,
        partial: Tensor,
        residual: Tensor,
        parallel: TensorParallel,
        *,
        post_norm: RMSNorm | None = None,
        next_norm: RMSNorm | None = None,
    ) -> Residual:
        """residual + post_norm(the sum of what all ranks hold), perhaps written over either."""

    @property
    def stacked_kinds(self) -> frozenset[str]:
        """Forms of weights (`LinearMethod.kind`) that `experts` multiplies from `Experts.stacked`,
        all at once and without the host; others are multiplied an expert at a time."""

    def experts(
        self, hidden: Tensor, logits: Tensor, experts: Experts, *, residual: Tensor | None = None
    ) -> Tensor:
        """What the experts that a router picks make of each token, weighed and added up: those of
        them that are here.

        hidden: [num_tokens, hidden_size]; logits: of the router, [num_tokens, num_experts].
        residual: is added, and perhaps written over; only where no sum over ranks is to come.
        """

    def rope_and_cache(
        self,
        qkv: Tensor,
        *,
        cos_sin: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        layer_cache: Tensor,
        qk_norm: "QKNorm | None",
    ) -> Tensor:
        """Split, (QK-)norm, rotate (neox halves), and write keys and values to their slots.

        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], perhaps of no query heads,
        and lines may lie apart; cos_sin: [max_positions, head_dim] fp32, cosines then sines;
        layer_cache as in `AttentionBackend.forward`. Returns the queries, [num_tokens, num_heads,
        head_dim], in the memory of qkv; there, too, lie keys and values, as whoever reads them
        from the cache finds them.
        """


def add_rows(
    x: Tensor,
    write: Callable[[Tensor, Tensor], None],
    residual: Tensor,
    parallel: TensorParallel,
    next_norm: RMSNorm | None,
) -> Residual:
    """What adds to a residual of which this rank has its share. write(x, out): makes this rank's
    part of the sum, of some tokens. x: what it makes it of, of all."""
    assert parallel.rows is not None and next_norm is not None
    for tokens, out in parallel.rows.places(len(x)):
        write(x[tokens], out)
    return Residual(residual, normed=parallel.rows.add_normed(residual, next_norm, len(x)))


def copied(partial: Tensor, out: Tensor) -> None:
    """`add_rows`' write, of what is already a part of the sum."""
    out.copy_(partial)


class QKNorm(Protocol):
    """Per-head RMS norms of queries and keys (Qwen3)."""

    q_weight: Tensor  # [head_dim]
    k_weight: Tensor  # [head_dim]
    eps: float
