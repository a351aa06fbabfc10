"""A decoder whose steps are one call into the native kernels each: the model of CPUs.

`startup` asks whether there is one for a model (`unsupported`), prepares it for its weights
(`take_as_stored`) and wraps it. Activations are float32 between products, whatever `dtype` is.
"""

import ctypes
import weakref
from collections import Counter

import torch
from torch import Tensor

from nanovllm.checkpoint import native_steps
from nanovllm.checkpoint.spec import DecoderSpec, Dense, LayerSpec
from nanovllm.worker.attention.base import ModelAttention
from nanovllm.worker.attention.native import NativeAttention, describe_batch, describe_cache
from nanovllm.worker.forward_batch import ForwardBatch
from nanovllm.worker.kernels.base import Residual
from nanovllm.worker.kernels.native import library as native
from nanovllm.worker.kernels.native.packed import Packed
from nanovllm.worker.layers.linear import UNQUANTIZED, Linear
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.models.blocks import rounded
from nanovllm.worker.models.decoder import Decoder, DecoderLayer
from nanovllm.worker.quant.gguf import (
    PackedLinear,
    keep_as_stored,
    lay_out_packed,
    pack_linear,
)
from nanovllm.worker.quant.packed import Packed as PackedMethod


def unsupported(spec: DecoderSpec, attention: ModelAttention) -> str | None:
    """Why steps of such a model are not one call; None if they can be."""
    if attention.spec.dtype != torch.bfloat16:
        return f"{attention.spec.dtype} is computed as torch does"
    if not all(isinstance(attention.of(kind), NativeAttention) for kind in spec.attentions):
        return "attention is not native"
    return native_steps.unsupported(spec)


def take_as_stored(model: Decoder) -> None:
    """Have a model that was just built lay out its weights as they are read, those of GGUF files as
    they are stored: so no other copy of them is ever there."""
    for linear in (model.embedding, *model.linears()):
        if linear.method is UNQUANTIZED:
            keep_as_stored(linear, model.device)


class NativeDecoder:
    """Implements `model_runner.Model` with the weights of a loaded `Decoder`, which it lays out.

    Streams are float32.
    """

    link: None = None  # ranks, and so stages, do without

    def __init__(self, model: Decoder) -> None:
        self._hidden_size, self._vocab_size = model.spec.hidden_size, model.spec.vocab_size
        _lay_out(model.embedding)
        embedding = self._embedding = _parts(model.embedding)["embedding"]
        if model.spec.tied_embeddings:
            model.lm_head.method = PackedLinear({"lm_head": embedding})
            model.lm_head.weight = model.embedding.weight
        for linear in model.linears():
            _lay_out(linear)
        self._kept: list[Tensor | PackedLinear] = []  # what addresses point into
        self._num_groups = len(model.layout.groups)
        eps = model.spec.norm.eps
        layers = (native.Layer * len(model.layers))(
            *(
                self._layer(layer, spec, place, eps)
                for layer, spec, place in zip(
                    model.layers, model.spec.layers, model.layout.places, strict=True
                )
            )
        )
        parts = native.DecoderParts(
            layers,
            len(layers),
            self._hidden_size,
            eps,
            rounded(model.spec.embedding_multiplier, model.dtype),
            model.spec.logit_scale,
            model.spec.final_softcap or 0.0,
            self._address(model.final_norm.weight),
            embedding.matrix,
            self._linear(model.lm_head),
        )
        self._decoder = native.library().nv_decoder(ctypes.byref(parts))
        weakref.finalize(self, native.library().nv_decoder_free, self._decoder)

    def forward(
        self, batch: ForwardBatch, kv_cache: Tensor, *, wanted: Tensor | None = None
    ) -> Residual:
        """As `Decoder.forward`."""
        num_wanted = batch.num_tokens if wanted is None else len(wanted)
        hidden = torch.empty(num_wanted, self._hidden_size)
        seen = (describe_batch(batch.of_group(group)) for group in range(self._num_groups))
        batches = (native.Batch * self._num_groups)(*seen)
        native.library().nv_decoder_forward(
            self._decoder,
            batch.input_ids.data_ptr(),
            batches,
            ctypes.byref(describe_cache(kv_cache[:, 0])),
            kv_cache.stride(1) * kv_cache.element_size(),
            None if wanted is None else wanted.data_ptr(),
            num_wanted,
            hidden.data_ptr(),
        )
        return Residual(hidden)

    def compute_logits(self, residual: Residual) -> Tensor:
        """As `Decoder.compute_logits`."""
        hidden = residual.hidden.contiguous()
        logits = torch.empty(len(hidden), self._vocab_size)
        native.library().nv_decoder_logits(
            self._decoder, hidden.data_ptr(), len(hidden), logits.data_ptr()
        )
        return logits

    def raw_logits(self, residual: Residual) -> Tensor:
        """As `compute_logits`: they are float32."""
        return self.compute_logits(residual)

    def own_logits(self, residual: Residual) -> Tensor:
        """As `raw_logits`: there is no other rank."""
        return self.compute_logits(residual)

    @property
    def weight_bytes(self) -> int:
        """Of all packed weights."""
        return sum(one.num_bytes for one in self._weights())

    def describe(self) -> str:
        """A note for the user: what weights are kept as, and by what they are multiplied."""
        kinds = Counter(one.kind for one in self._weights())
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        return f"weights multiplied as stored ({counts}) by {native.in_use()}"

    def _weights(self) -> list[Packed]:
        """Each once: a tied head is the embedding."""
        linears = (kept for kept in self._kept if isinstance(kept, PackedLinear))
        parts = [part for linear in linears for part in linear.parts.values()]
        return list({id(part): part for part in (self._embedding, *parts)}.values())

    def _layer(
        self, layer: DecoderLayer, spec: LayerSpec, place: tuple[int, int], eps: float
    ) -> native.Layer:
        """place: the group and place of its keys (`KVLayout.places`)."""
        attention, mlp = layer.attention, layer.mlp
        assert isinstance(attention.backend, NativeAttention) and isinstance(spec.mlp, Dense)
        if attention.sinks is not None:
            self._kept.append(attention.sinks)
        rope = native.Rope(
            self._address(attention.rotary.cos_sin),
            self._weight(attention.q_norm),
            self._weight(attention.k_norm),
            None if attention.growth is None else self._address(attention.growth),
            eps,
            spec.attention.qk_norm == "full",
        )
        return native.Layer(
            *map(self._linear, layer.linears()),
            self._weight(attention.norms.pre),
            self._weight(attention.norms.post),
            self._weight(mlp.norms.pre),
            self._weight(mlp.norms.post),
            rope,
            attention.backend.heads(attention.sinks),
            native.ACTIVATIONS.index(spec.mlp.activation),
            *place,
            0,
        )

    def _linear(self, linear: Linear) -> native.Linear:
        assert isinstance(linear.method, PackedLinear)
        self._kept.append(linear.method)
        return linear.method.describe(linear)

    def _weight(self, norm: RMSNorm | None) -> int | None:
        return None if norm is None else self._address(norm.weight)

    def _address(self, values: Tensor) -> int:
        """Of the values in float32."""
        wide = values.float().contiguous()
        self._kept.append(wide)
        return wide.data_ptr()


def _lay_out(linear: Linear) -> None:
    """For the native products, unless it is kept so already."""
    if linear.method is UNQUANTIZED:
        pack_linear(linear)
    elif isinstance(linear.method, PackedMethod):
        lay_out_packed(linear, linear.method.weight)


def _parts(linear: Linear) -> dict[str, Packed]:
    assert isinstance(linear.method, PackedLinear)
    return linear.method.parts
