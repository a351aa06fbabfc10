"""Who multiplies by weights of which form, together with what surrounds the product.

`layer_kernels` asks `products_of` a layer. A few tokens go through our own products, which take
norms, gate and residual along; more go through cuBLAS. A new form of weights is a class here, under
the name of its method (`LinearMethod.kind`).
"""

from typing import Protocol, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nanovllm.checkpoint.spec import Activation
from nanovllm.worker.kernels.base import Residual
from nanovllm.worker.kernels.triton.fp8_linear import (
    GROUP,
    can_group,
    group_add,
    group_gated,
    group_linear,
    row_add,
    row_linear,
)
from nanovllm.worker.kernels.triton.gated_linear import can_gate, gated_linear
from nanovllm.worker.kernels.triton.launch import converts_fp8
from nanovllm.worker.kernels.triton.linear_tuning import (
    MAX_TOKENS,
    are_grouped,
    are_rows,
    beats_cublas,
)
from nanovllm.worker.kernels.triton.packed_linear import (
    can_multiply,
    fewest_unpacked,
    packed_add,
    packed_linear,
    unpacked,
)
from nanovllm.worker.kernels.triton.rows import (
    act_and_mul,
    act_and_mul_fp8,
    quantize,
    quantize_groups,
    rms_norm,
)
from nanovllm.worker.kernels.triton.skinny_linear import skinny_add, skinny_linear
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.pieces import pieces
from nanovllm.worker.quant.fp8 import Fp8, QuantizedGroups
from nanovllm.worker.quant.packed import Packed
from nanovllm.worker.quant.scaled_rows import QuantizedRows

MOST_UNPACKED = 2**27  # weights at a time: a head may have several times as many
SEGMENT = 128  # outputs, of which any number begin where memory is aligned


def weight_of(next_norm: RMSNorm | None) -> Tensor | None:
    """What the residual is weighed by for the norm that comes next, if that divides and no more."""
    return None if next_norm is None or next_norm.centers else next_norm.weight


class FusedProduct(Protocol):
    """`skinny_linear`, or the same for weights of another form."""

    def __call__(
        self,
        x: Tensor,
        linear: Linear,
        *,
        norm: tuple[Tensor, float] | None = None,
        gate: Activation | None = None,
    ) -> Tensor: ...


class Products:
    """By the layer's own method, with kernels of their own for what surrounds it."""

    def serves(self, linear: Linear) -> bool:
        """Whether these kernels run for the layer, on its device."""
        return True

    def multiply(self, x: Tensor, linear: Linear) -> Tensor:
        """linear(x), of this rank alone."""
        return linear.method.apply(linear, x)

    def lookup(self, places: Tensor, table: Linear) -> Tensor:
        """As `Kernels.lookup`, by an ordinary launch (`TritonAttention.prepare`)."""
        return table.lookup(places)

    def multiply_into(self, linear: Linear, x: Tensor, out: Tensor) -> None:
        """The same, written to `out`, which may lie in another GPU's memory."""
        out.copy_(self.multiply(x, linear))

    def norm_linear(self, residual: Residual, norm: RMSNorm | None, linear: Linear) -> Tensor:
        """As `Kernels.norm_linear`."""
        return self.multiply(_normed(residual, norm), linear)

    def gated(
        self, residual: Residual, norm: RMSNorm | None, linear: Linear, activation: Activation
    ) -> Tensor | None:
        """activation(gate) * up, whose halves never go to memory; None: not here, or not faster."""
        return None

    def mlp(
        self,
        residual: Residual,
        norm: RMSNorm | None,
        gate_up: Linear,
        activation: Activation,
        down: Linear,
        hidden: Tensor,
        next_norm: RMSNorm | None,
    ) -> Residual | None:
        """hidden + down(activation(gate) * up), if these two have a way of their own between them.

        residual, norm: what is multiplied, as of `norm_linear`.
        """
        return None

    def linear_add(
        self, x: Tensor, linear: Linear, residual: Tensor, next_norm: RMSNorm | None
    ) -> Residual:
        """residual + linear(x), perhaps written over residual."""
        return Residual(residual.add_(self.multiply(x, linear)))

    def gated_linear_add(
        self,
        gate_up: Tensor,
        activation: Activation,
        linear: Linear,
        residual: Tensor,
        next_norm: RMSNorm | None,
    ) -> Residual:
        """residual + linear(activation(gate) * up)."""
        return self.linear_add(act_and_mul(gate_up, activation), linear, residual, next_norm)


class SkinnyProducts(Products):
    """Of weights that `skinny_linear` reads: a few tokens are its, the others go another way."""

    def is_skinny(self, x: Tensor, linear: Linear, *, gated: bool = False) -> bool:
        """Whether our own product is the faster one."""
        return beats_cublas(len(x), linear.weight, gated=gated)

    def multiply(self, x: Tensor, linear: Linear) -> Tensor:
        return skinny_linear(x, linear) if self.is_skinny(x, linear) else self.wide(x, linear)

    def wide(self, x: Tensor, linear: Linear, norm: RMSNorm | None = None) -> Tensor:
        """linear(norm(x)), of many tokens."""
        return linear.method.apply(linear, x if norm is None else rms_norm(x, norm))

    def norm_linear(self, residual: Residual, norm: RMSNorm | None, linear: Linear) -> Tensor:
        if self.is_skinny(residual.hidden, linear):
            return _skinny(residual, norm, linear)
        return self.wide(residual.hidden, linear, norm)

    def gated(
        self, residual: Residual, norm: RMSNorm | None, linear: Linear, activation: Activation
    ) -> Tensor | None:
        if self.is_skinny(residual.hidden, linear, gated=True):
            return _skinny(residual, norm, linear, activation)
        return None

    def linear_add(
        self, x: Tensor, linear: Linear, residual: Tensor, next_norm: RMSNorm | None
    ) -> Residual:
        if self.is_skinny(x, linear):
            return skinny_add(x, linear, residual, next_norm=weight_of(next_norm))
        return self.wide_add(x, linear, residual)

    def wide_add(self, x: Tensor, linear: Linear, residual: Tensor) -> Residual:
        """residual + linear(x), of many tokens."""
        return Residual(residual.add_(self.wide(x, linear)))


class PlainProducts(SkinnyProducts):
    """Of weights in the model's precision. Of a prompt's tokens the gated product is ours, too."""

    def is_skinny(self, x: Tensor, linear: Linear, *, gated: bool = False) -> bool:
        return x.dtype == linear.weight.dtype and super().is_skinny(x, linear, gated=gated)

    def gated(
        self, residual: Residual, norm: RMSNorm | None, linear: Linear, activation: Activation
    ) -> Tensor | None:
        few = super().gated(residual, norm, linear, activation)
        if few is None and can_gate(residual.hidden, linear):
            return gated_linear(_normed(residual, norm), linear, activation)
        return few

    def wide_add(self, x: Tensor, linear: Linear, residual: Tensor) -> Residual:
        if linear.bias is None:
            return Residual(residual.addmm_(x, linear.weight.t()))
        return super().wide_add(x, linear, residual)

    def multiply_into(self, linear: Linear, x: Tensor, out: Tensor) -> None:
        if linear.bias is None and x.dtype == out.dtype and not self.is_skinny(x, linear):
            torch.mm(x, linear.weight.t(), out=out)
        else:
            super().multiply_into(linear, x, out)


class PackedProducts(Products):
    """Of packed weights: by our own product, but of many tokens by cuBLAS, once unpacked."""

    def serves(self, linear: Linear) -> bool:
        return can_multiply(_packed(linear).weight)

    def multiply(self, x: Tensor, linear: Linear) -> Tensor:
        x = _packed(linear).ordered(x)
        if self._are_few(x, linear):
            return packed_linear(x, linear)
        weight, num_outputs = _packed(linear).weight, len(linear.weight)
        if num_outputs * weight.inputs <= MOST_UNPACKED:
            return F.linear(x, unpacked(weight, x.dtype), linear.bias)
        out = x.new_empty(len(x), num_outputs)
        for rows in pieces(num_outputs, weight.inputs, most_values=MOST_UNPACKED, unit=SEGMENT):
            torch.mm(x, unpacked(weight.rows(rows), x.dtype).t(), out=out[:, rows])
        return out if linear.bias is None else out.add_(linear.bias)

    def lookup(self, places: Tensor, table: Linear) -> Tensor:
        return unpacked(_packed(table).weight, table.weight.dtype, places=places)

    def norm_linear(self, residual: Residual, norm: RMSNorm | None, linear: Linear) -> Tensor:
        if self._is_fused(residual.hidden, linear):
            return _skinny(residual, norm, linear, product=packed_linear)
        return super().norm_linear(residual, norm, linear)

    def gated(
        self, residual: Residual, norm: RMSNorm | None, linear: Linear, activation: Activation
    ) -> Tensor | None:
        if self._is_fused(residual.hidden, linear):
            return _skinny(residual, norm, linear, activation, product=packed_linear)
        return None

    def linear_add(
        self, x: Tensor, linear: Linear, residual: Tensor, next_norm: RMSNorm | None
    ) -> Residual:
        if not self._are_few(x, linear):
            return super().linear_add(x, linear, residual, next_norm)
        weight = None if next_norm is None else next_norm.weight
        return packed_add(_packed(linear).ordered(x), linear, residual, next_norm=weight)

    def _is_fused(self, x: Tensor, linear: Linear) -> bool:
        """Whether norm and gate are part of the product, for which inputs must lie as they are."""
        return self._are_few(x, linear) and _packed(linear).order is None

    def _are_few(self, x: Tensor, linear: Linear) -> bool:
        """Whether our own product is the faster one."""
        return len(x) < fewest_unpacked(_packed(linear).weight)


class Fp8Products(SkinnyProducts):
    """Of e4m3 weights. Tokens are quantized once: by the product before or, where cuBLAS or
    something else comes before, by a kernel of their own; a handful of them by our own product."""

    def serves(self, linear: Linear) -> bool:
        return converts_fp8(linear.weight.device)

    def multiply(self, x: Tensor, linear: Linear) -> Tensor:
        if self.is_grouped(x, linear):
            return group_linear(quantize_groups(x, GROUP), linear, x.dtype)
        return super().multiply(x, linear)

    def norm_linear(self, residual: Residual, norm: RMSNorm | None, linear: Linear) -> Tensor:
        if self.is_grouped(residual.hidden, linear):
            x, scale = _grouped(residual, norm)
            return group_linear(x, linear, residual.hidden.dtype, norm=scale)
        return super().norm_linear(residual, norm, linear)

    def linear_add(
        self, x: Tensor, linear: Linear, residual: Tensor, next_norm: RMSNorm | None
    ) -> Residual:
        if self.is_grouped(x, linear):
            tokens = quantize_groups(x, GROUP)
            return group_add(tokens, linear, residual, next_norm=weight_of(next_norm))
        return super().linear_add(x, linear, residual, next_norm)

    def mlp(
        self,
        residual: Residual,
        norm: RMSNorm | None,
        gate_up: Linear,
        activation: Activation,
        down: Linear,
        hidden: Tensor,
        next_norm: RMSNorm | None,
    ) -> Residual | None:
        if not all(self.is_grouped(residual.hidden, linear) for linear in (gate_up, down)):
            return None
        x, scale = _grouped(residual, norm)
        inner = group_gated(x, gate_up, activation, norm=scale)
        return group_add(inner, down, hidden, next_norm=weight_of(next_norm))

    def wide(self, x: Tensor, linear: Linear, norm: RMSNorm | None = None) -> Tensor:
        if are_rows(len(x), linear.weight):
            return row_linear(quantize(x, norm), linear, x.dtype)
        return _multiply_fp8(linear, quantize(x, norm), x)

    def wide_add(self, x: Tensor, linear: Linear, residual: Tensor) -> Residual:
        if are_rows(len(x), linear.weight):
            return row_add(quantize(x), linear, residual)
        return super().wide_add(x, linear, residual)

    def gated(
        self, residual: Residual, norm: RMSNorm | None, linear: Linear, activation: Activation
    ) -> Tensor | None:
        hidden = residual.hidden
        if are_rows(len(hidden), linear.weight):
            return row_linear(quantize(hidden, norm), linear, hidden.dtype, gate=activation)
        return super().gated(residual, norm, linear, activation)

    def gated_linear_add(
        self,
        gate_up: Tensor,
        activation: Activation,
        linear: Linear,
        residual: Tensor,
        next_norm: RMSNorm | None,
    ) -> Residual:
        if self.is_skinny(residual, linear) or self.is_grouped(residual, linear):
            return super().gated_linear_add(gate_up, activation, linear, residual, next_norm)
        product = _multiply_fp8(linear, act_and_mul_fp8(gate_up, activation), residual)
        return Residual(residual.add_(product))

    def is_grouped(self, x: Tensor, linear: Linear) -> bool:
        """Whether the product of tokens quantized in groups is the fastest one."""
        return can_group(linear) and are_grouped(len(x), linear.weight)


ANY = Products()
OF_KIND: dict[str, Products] = {
    "plain": PlainProducts(),
    "fp8": Fp8Products(),
    "packed": PackedProducts(),
}


def products_of(linear: Linear) -> Products:
    """Those for the form of its weights, if they run on its device."""
    found = OF_KIND.get(linear.method.kind, ANY)
    return found if found.serves(linear) else ANY


def form_for(num_tokens: int, linear: Linear) -> Linear:
    """The layer, or its unquantized copy where that is there and faster.

    A single token is not quantized either, so that it reads half the bytes for nothing.
    """
    if linear.copy is not None and 1 < num_tokens <= MAX_TOKENS:
        return linear.copy
    return linear


def _normed(residual: Residual, norm: RMSNorm | None) -> Tensor:
    return residual.hidden if norm is None else rms_norm(residual.hidden, norm)


def _grouped(
    residual: Residual, norm: RMSNorm | None
) -> tuple[QuantizedGroups, tuple[Tensor, float] | None]:
    """A residual's rows, normed, but for the norm's scale if they came weighed and quantized."""
    weighed = residual.weighed
    if norm is None or weighed is None or weighed.scale is None:
        return quantize_groups(residual.hidden, GROUP, norm), None
    x = QuantizedGroups(weighed.values, weighed.scale)
    return x, (weighed.squares, norm.eps)


def _skinny(
    residual: Residual,
    norm: RMSNorm | None,
    linear: Linear,
    gate: Activation | None = None,
    *,
    product: FusedProduct = skinny_linear,
) -> Tensor:
    """Norm and product of a few tokens; in one kernel if the residual comes weighed."""
    weighed = residual.weighed
    if norm is None or weighed is None or weighed.scale is not None:
        return product(_normed(residual, norm), linear, gate=gate)
    return product(weighed.values, linear, norm=(weighed.squares, norm.eps), gate=gate)


def _packed(linear: Linear) -> Packed:
    return cast(Packed, linear.method)


def _multiply_fp8(linear: Linear, rows: QuantizedRows, like: Tensor) -> Tensor:
    return cast(Fp8, linear.method).multiply(linear, rows, like.dtype)
