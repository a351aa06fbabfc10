"""The decoder that all supported models are: its straight-line forward pass, layer by layer.

Built by `startup` from a `DecoderSpec`, run by `model_runner`. It knows no phases and no request: a
`ForwardBatch` says which tokens, `Kernels` and attention backends do the maths that depends on the
device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nanovllm.checkpoint.spec import Attention, DecoderSpec, Dense, LayerSpec
from nanovllm.worker.attention.base import ModelAttention, Rotary
from nanovllm.worker.forward_batch import ForwardBatch
from nanovllm.worker.kernels.base import Kernels, Stream
from nanovllm.worker.layers.linear import Linear, WeightSlot
from nanovllm.worker.layers.rotary import cos_sin_table


@dataclass(slots=True, eq=False)
class PerHeadNorm:
    """Weights of Qwen3's norms of queries and keys (a `kernels.base.QKNorm`)."""

    q_weight: Tensor  # [head_dim]
    k_weight: Tensor  # [head_dim]
    eps: float


class DecoderLayer:
    """Attention and MLP, each behind an RMS norm, added to the residual stream."""

    def __init__(
        self,
        spec: DecoderSpec,
        layer: LayerSpec,
        *,
        kernels: Kernels,
        attention: ModelAttention,
        cos_sin: Tensor,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert isinstance(layer.mlp, Dense) and layer.pre_norm and not layer.post_norm
        self._kernels = kernels
        self._attention = attention.of(layer.attention)
        self._eps = layer.norm.eps
        hidden, inner, heads = spec.hidden_size, layer.mlp.intermediate_size, layer.attention
        q, kv = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
        # Their memory comes with the weights, once it is known in which form those are kept.
        nowhere = torch.device("meta")
        outputs = partial(Linear.empty, shard_axis=0, dtype=dtype, device=nowhere)
        inputs = partial(Linear.empty, shard_axis=1, dtype=dtype, device=nowhere)
        self.qkv = outputs(hidden, {"q": q, "k": kv, "v": kv}, bias=heads.qkv_bias)
        self.o = inputs(q, {"o": hidden}, bias=heads.o_bias)
        self.gate_up = outputs(hidden, {"gate": inner, "up": inner}, bias=layer.mlp.bias)
        self.down = inputs(inner, {"down": hidden}, bias=layer.mlp.bias)
        ones = partial(torch.ones, dtype=dtype, device=device)
        self.input_norm = ones(hidden)
        self.post_norm = ones(hidden)
        self.qk_norm: PerHeadNorm | None = None
        if heads.qk_norm == "head":
            self.qk_norm = PerHeadNorm(ones(heads.head_dim), ones(heads.head_dim), self._eps)
        self._rotary = Rotary(kernels, cos_sin, self.qk_norm)

    def forward(
        self,
        stream: Stream,
        *,
        batch: ForwardBatch,
        layer_cache: Tensor,
        next_norm: Tensor,
        wanted: Tensor | None = None,
    ) -> Stream:
        """The stream after this layer, of `wanted` tokens if given: as of the last layer the others
        only leave keys and values. next_norm: the weight of the norm that comes next."""
        kernels = self._kernels
        qkv = kernels.norm_linear(stream, self.input_norm, self._eps, self.qkv)
        attended = self._attention.forward(qkv, self._rotary, layer_cache, batch)
        hidden = stream.hidden
        if wanted is not None:
            attended, hidden = attended[wanted], hidden[wanted]
        stream = kernels.linear_add(attended.flatten(1), self.o, hidden, self.post_norm)
        return kernels.mlp(stream, self.post_norm, self._eps, self.gate_up, self.down, next_norm)

    def linears(self) -> Iterator[Linear]:
        yield from (self.qkv, self.o, self.gate_up, self.down)

    def slots(self, layer: int) -> Iterator[WeightSlot]:
        for linear in self.linears():
            yield from linear.slots(layer)
        norms = {"attention_norm": self.input_norm, "mlp_norm": self.post_norm}
        if self.qk_norm is not None:
            norms |= {"q_norm": self.qk_norm.q_weight, "k_norm": self.qk_norm.k_weight}
        for part, weight in norms.items():
            yield WeightSlot(part, "weight", layer, weight, None)


class Decoder:
    """Embedding, layers, final norm and head. Weights are unset until `weights.load_weights`."""

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        kernels: Kernels,
        attention: ModelAttention,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self.attention = attention
        self._kernels = kernels
        shape = spec.vocab_size, spec.hidden_size
        self.embedding = torch.empty(shape, dtype=dtype, device=device)
        tables = {kind: self._cos_sin(kind) for kind in spec.attentions}
        self.layers = [
            DecoderLayer(
                spec,
                layer,
                kernels=kernels,
                attention=attention,
                cos_sin=tables[layer.attention],
                dtype=dtype,
                device=device,
            )
            for layer in spec.layers
        ]
        self.final_norm = torch.ones(spec.hidden_size, dtype=dtype, device=device)
        head = self.embedding if spec.tied_embeddings else torch.empty_like(self.embedding)
        self.lm_head = Linear(head, None, {"lm_head": spec.vocab_size}, shard_axis=0)
        self.num_parameters = sum(slot.target.numel() for slot in self.slots())

    def _cos_sin(self, attention: Attention) -> Tensor:
        return cos_sin_table(
            attention.rope,
            head_dim=attention.head_dim,
            max_positions=self.spec.max_position_embeddings,
            device=self.device,
        )

    def forward(
        self, batch: ForwardBatch, kv_cache: Tensor, *, wanted: Tensor | None = None
    ) -> Stream:
        """One step. `attention.prepare(batch)` must have run.

        kv_cache: [2, num_layers, num_blocks, block_size, num_kv_heads, head_dim]. wanted: [n]
        int64, the tokens that are asked for; None: all. Returns what the last layer leaves of them.
        """
        stream = Stream(F.embedding(batch.input_ids, self.embedding))
        norms = [*(layer.input_norm for layer in self.layers[1:]), self.final_norm]
        for layer, layer_cache, norm in zip(self.layers, kv_cache.unbind(1), norms, strict=True):
            stream = layer.forward(
                stream,
                batch=batch,
                layer_cache=layer_cache,
                next_norm=norm,
                wanted=wanted if layer is self.layers[-1] else None,
            )
        return stream

    def compute_logits(self, stream: Stream) -> Tensor:
        """stream: of n tokens, from `forward`. Returns new memory, [n, vocab_size] float32."""
        return self.raw_logits(stream).float()

    def raw_logits(self, stream: Stream) -> Tensor:
        """`compute_logits` in the model's own precision."""
        eps = self.spec.norm.eps
        return self._kernels.norm_linear(stream, self.final_norm, eps, self.lm_head)

    def linears(self) -> Iterator[Linear]:
        """Every linear layer, for passes that change how they multiply."""
        for layer in self.layers:
            yield from layer.linears()
        yield self.lm_head

    def slots(self) -> Iterator[WeightSlot]:
        """Every tensor a checkpoint must bring, and where it goes. A tied head brings none."""
        yield WeightSlot("embedding", "weight", None, self.embedding, 0)
        for index, layer in enumerate(self.layers):
            yield from layer.slots(index)
        yield WeightSlot("final_norm", "weight", None, self.final_norm, None)
        if not self.spec.tied_embeddings:
            yield from self.lm_head.slots(None)
