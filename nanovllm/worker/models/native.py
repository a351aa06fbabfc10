"""A decoder whose steps are one call into the native kernels each: the model of CPUs.

`startup` asks whether there is one for a model (`unsupported`), prepares it for its weights
(`take_as_stored`) and wraps it. Activations are float32 between products, whatever `dtype` is.
"""

import ctypes
import weakref
from collections import Counter

import torch
from torch import Tensor

from nanovllm.checkpoint.spec import DecoderSpec, Dense, LayerSpec
from nanovllm.worker.attention.base import ModelAttention
from nanovllm.worker.attention.native import NativeAttention, describe_batch, describe_cache
from nanovllm.worker.forward_batch import ForwardBatch
from nanovllm.worker.kernels.base import Stream
from nanovllm.worker.kernels.native import library as native
from nanovllm.worker.kernels.native.packed import Packed, pack_bfloat16
from nanovllm.worker.layers.linear import UNQUANTIZED, Linear
from nanovllm.worker.models.decoder import Decoder, DecoderLayer
from nanovllm.worker.quant.gguf import (
    PackedLinear,
    PartKeeper,
    keep_as_stored,
    lay_out_packed,
    pack_linear,
    without_memory,
)
from nanovllm.worker.quant.packed import Packed as PackedMethod


def unsupported(spec: DecoderSpec, attention: ModelAttention) -> str | None:
    """Why steps of such a model are not one call; None if they can be."""
    if attention.spec.dtype != torch.bfloat16:
        return f"{attention.spec.dtype} is computed as torch does"
    if not all(isinstance(attention.of(kind), NativeAttention) for kind in spec.attentions):
        return "attention is not native"
    if (spec.embedding_multiplier, spec.logit_scale, spec.final_softcap) != (1.0, 1.0, None):
        return "embeddings or logits are scaled"
    if spec.hidden_size % native.TILE:
        return f"hidden_size {spec.hidden_size} is no multiple of {native.TILE}"
    odd = (_odd(layer) for layer in spec.layers)
    return next((reason for reason in odd if reason is not None), None)


def _odd(layer: LayerSpec) -> str | None:
    if not isinstance(layer.mlp, Dense) or layer.mlp.activation != "silu":
        return "an MLP is not a plain gated one"
    norm = layer.norm
    if not layer.pre_norm or layer.post_norm or layer.parallel or norm.adds_one or norm.centers:
        return "norms lie elsewhere than before attention and MLP"
    if layer.attention.query_growth is not None:
        return "queries grow with their position"
    if layer.attention.qk_norm == "full":
        return "queries and keys are normed as a whole"
    heads = layer.attention.num_heads * layer.attention.head_dim
    if layer.mlp.intermediate_size % native.TILE or heads % native.TILE:
        return f"a width is no multiple of {native.TILE}"
    return None


def take_as_stored(model: Decoder) -> None:
    """Have a model that was just built keep what a GGUF file brings as it is stored."""
    for linear in model.linears():
        keep_as_stored(linear, model.device)
    model.embedding_keeper = PartKeeper({}, "embedding")
    model.embedding = without_memory(model.embedding)


class NativeDecoder:
    """Implements `model_runner.Model` with the weights of a loaded `Decoder`, which it lays out.

    Streams are float32.
    """

    def __init__(self, model: Decoder) -> None:
        self._hidden_size, self._vocab_size = model.spec.hidden_size, model.spec.vocab_size
        embedding = self._embedding = _pack_embedding(model)
        if model.spec.tied_embeddings:
            model.lm_head.method = PackedLinear({"lm_head": embedding})
        for linear in model.linears():
            if linear.method is UNQUANTIZED:
                pack_linear(linear)
            elif isinstance(linear.method, PackedMethod):
                lay_out_packed(linear, linear.method.weight)
        self._kept: list[Tensor | PackedLinear] = []  # what addresses point into
        layers = (native.Layer * len(model.layers))(*map(self._layer, model.layers))
        parts = native.DecoderParts(
            layers,
            len(layers),
            self._hidden_size,
            model.spec.norm.eps,
            0.0,
            self._address(model.final_norm.weight),
            embedding.matrix,
            self._linear(model.lm_head),
        )
        self._decoder = native.library().nv_decoder(ctypes.byref(parts))
        weakref.finalize(self, native.library().nv_decoder_free, self._decoder)

    def forward(
        self, batch: ForwardBatch, kv_cache: Tensor, *, wanted: Tensor | None = None
    ) -> Stream:
        """As `Decoder.forward`."""
        num_wanted = batch.num_tokens if wanted is None else len(wanted)
        hidden = torch.empty(num_wanted, self._hidden_size)
        native.library().nv_decoder_forward(
            self._decoder,
            batch.input_ids.data_ptr(),
            ctypes.byref(describe_batch(batch)),
            ctypes.byref(describe_cache(kv_cache[:, 0])),
            kv_cache.stride(1) * kv_cache.element_size(),
            None if wanted is None else wanted.data_ptr(),
            num_wanted,
            hidden.data_ptr(),
        )
        return Stream(hidden)

    def compute_logits(self, stream: Stream) -> Tensor:
        """As `Decoder.compute_logits`."""
        hidden = stream.hidden.contiguous()
        logits = torch.empty(len(hidden), self._vocab_size)
        native.library().nv_decoder_logits(
            self._decoder, hidden.data_ptr(), len(hidden), logits.data_ptr()
        )
        return logits

    def raw_logits(self, stream: Stream) -> Tensor:
        """As `compute_logits`: they are float32."""
        return self.compute_logits(stream)

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

    def _layer(self, layer: DecoderLayer) -> native.Layer:
        attention, mlp = layer.attention, layer.mlp
        assert isinstance(attention.backend, NativeAttention)
        assert attention.norms.pre is not None and mlp.norms.pre is not None
        norms = attention.head_norms
        if attention.sinks is not None:
            self._kept.append(attention.sinks)
        return native.Layer(
            *map(self._linear, layer.linears()),
            self._address(attention.norms.pre.weight),
            self._address(mlp.norms.pre.weight),
            None if norms is None else self._address(norms.q_weight),
            None if norms is None else self._address(norms.k_weight),
            self._address(attention.rotary.cos_sin),
            attention.backend.heads(attention.sinks),
        )

    def _linear(self, linear: Linear) -> native.Linear:
        assert isinstance(linear.method, PackedLinear)
        self._kept.append(linear.method)
        return linear.method.describe(linear)

    def _address(self, values: Tensor) -> int:
        """Of the values in float32."""
        wide = values.float().contiguous()
        self._kept.append(wide)
        return wide.data_ptr()


def _pack_embedding(model: Decoder) -> Packed:
    """The embedding as it was kept, or laid out now."""
    keeper = model.embedding_keeper
    if isinstance(keeper, PartKeeper):
        return keeper.parts[keeper.part]
    packed = pack_bfloat16(model.embedding)
    model.embedding = without_memory(model.embedding)
    if model.spec.tied_embeddings:
        model.lm_head.weight = model.embedding
    return packed
