"""The decoder that all supported models are: its straight-line forward pass, layer by layer.

Built by `startup` from a `DecoderSpec`, run by `model_runner`. It knows no phases and no request: a
`ForwardBatch` says which tokens, `Kernels` and attention backends do the maths that depends on the
device.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from nanovllm.checkpoint.kv_layout import KVLayout, undivided
from nanovllm.checkpoint.quantization import Scheme
from nanovllm.checkpoint.spec import DecoderSpec, Dense, LayerSpec, MoE, count_parameters
from nanovllm.checkpoint.stages import stages_of
from nanovllm.worker.attention.base import ModelAttention
from nanovllm.worker.forward_batch import ForwardBatch
from nanovllm.worker.kernels.base import Kernels, Residual
from nanovllm.worker.layers.linear import Linear, WeightSlot
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.layers.vocabulary import Vocabulary
from nanovllm.worker.models.blocks import AttentionBlock, DenseBlock, ExpertsBlock, rounded
from nanovllm.worker.models.builder import Builder
from nanovllm.worker.models.gemma4_blocks import DenseAndExpertsBlock, LayerInput, LayerInputs
from nanovllm.worker.parallel import SINGLE, TensorParallel
from nanovllm.worker.stage_link import StageLink


class DecoderLayer:
    """Attention, then an MLP, each added to the residual stream."""

    def __init__(
        self,
        build: Builder,
        spec: LayerSpec,
        *,
        module: int,
        cos_sin: Tensor,
        source: AttentionBlock | None = None,
    ) -> None:
        """source: whose keys and values its attention takes, if it has none."""
        self.attention = AttentionBlock(build, spec, module=module, cos_sin=cos_sin, source=source)
        self.input = LayerInput(build, spec) if spec.input_size else None
        self.scale = torch.ones(1, dtype=build.dtype, device=build.device) if spec.scaled else None
        self.mlp: DenseBlock | ExpertsBlock | DenseAndExpertsBlock
        match spec.mlp:
            case Dense() as dense if spec.experts is not None:
                self.mlp = DenseAndExpertsBlock(build, spec, dense, spec.experts, module=module)
            case Dense() as dense:
                self.mlp = DenseBlock(build, spec, dense, module=module)
            case MoE() as experts:
                self.mlp = ExpertsBlock(build, spec, experts, module=module)
        self._is_parallel = spec.parallel

    def forward(
        self,
        residual: Residual,
        *,
        batch: ForwardBatch,
        layer_cache: Tensor,
        next_norm: RMSNorm | None,
        wanted: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Residual:
        """The residual after this layer, of `wanted` tokens if given: as of the last layer the
        others only leave keys and values. next_norm: the norm that comes next. given: this layer's
        input for each token, [num_tokens, input_size], if it takes one."""
        if self._is_parallel:
            return self._forward_parallel(residual, batch, layer_cache, next_norm, wanted)
        residual = self.attention.forward(
            residual,
            batch=batch,
            layer_cache=layer_cache,
            next_norm=self.mlp.norms.pre,
            wanted=wanted,
        )
        if self.input is None and self.scale is None:
            return self.mlp.forward(residual, next_norm=next_norm)
        residual = self.mlp.forward(residual, next_norm=None)
        if self.input is not None:
            assert given is not None
            residual = self.input.forward(residual, given if wanted is None else given[wanted])
        if self.scale is not None:
            residual.hidden.mul_(self.scale)
        return residual

    def _forward_parallel(
        self,
        residual: Residual,
        batch: ForwardBatch,
        layer_cache: Tensor,
        next_norm: RMSNorm | None,
        wanted: Tensor | None,
    ) -> Residual:
        """Attention and MLP of the same residual, both added to it."""
        assert isinstance(self.mlp, DenseBlock)
        # Attention may write over its residual, and the MLP has yet to read it.
        attended = self.attention.forward(
            residual._replace(hidden=residual.hidden.clone()),
            batch=batch,
            layer_cache=layer_cache,
            next_norm=None,
            wanted=wanted,
        )
        if wanted is not None:
            residual = Residual(residual.hidden[wanted])
        norm = self.attention.norms.pre
        return self.mlp.forward_beside(residual, attended.hidden, norm=norm, next_norm=next_norm)

    def linears(self) -> Iterator[Linear]:
        yield from self.attention.linears()
        yield from self.mlp.linears()

    def slots(self, layer: int) -> Iterator[WeightSlot]:
        yield from self.attention.slots(layer)
        yield from self.mlp.slots(layer)
        if self.input is not None:
            yield from self.input.slots(layer)
        if self.scale is not None:
            yield WeightSlot.of_whole("layer_scale", "", self.scale, layer)


def _adds_plainly(layer: LayerSpec) -> bool:
    """Whether all that is done to the residual is to norm it and to add to it."""
    is_plain = layer.pre_norm and not layer.post_norm and not layer.parallel
    return is_plain and layer.experts is None and not layer.input_size and not layer.scaled


class Decoder:
    """Embedding, layers, final norm and head; of a stage of a pipeline, its layers, and what of the
    rest it needs. Weights are unset until `weights.load_weights`.

    link: to the other stages, where there are any; whoever builds the model sets it.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        kernels: Kernels,
        attention: ModelAttention,
        dtype: torch.dtype,
        device: torch.device,
        scheme: Scheme | None = None,
        parallel: TensorParallel = SINGLE,
    ) -> None:
        """scheme: what is kept quantized. Raises `ValueError` for sizes that ranks cannot share."""
        self.spec = spec
        self._parallel = parallel
        # Whether residuals may be shared out, which nobody but blocks that add to them reads then.
        self._shares_rows = parallel.rows is not None and all(map(_adds_plainly, spec.layers))
        self.dtype = dtype
        self.device = device
        self.attention = attention
        self.stage = stages_of(spec, parallel.num_stages)[parallel.stage]
        self.link: StageLink | None = None
        self.lay_out(undivided(spec, stage=self.stage))
        self._kernels = kernels
        build = Builder(
            spec=spec,
            kernels=kernels,
            attention=attention,
            dtype=dtype,
            device=device,
            scheme=scheme,
            parallel=parallel,
        )
        self.vocabulary = Vocabulary.of(spec.vocab_size, parallel)
        own = self.vocabulary.cut
        none = own._replace(size=0)
        embedded = own if self.stage.holds_embedding(spec) else none
        self.embedding = build.vocabulary("embedding", embedded)
        tables = build.rotary_tables()
        self.layers: list[DecoderLayer] = []
        for index in self.stage.layers:
            layer, source = spec.layers[index], None
            if layer.keys_of is not None:
                source = self.layers[layer.keys_of - self.stage.first].attention
            cos_sin = tables[layer.attention]
            made = DecoderLayer(build, layer, module=index, cos_sin=cos_sin, source=source)
            self.layers.append(made)
        self.layer_inputs = LayerInputs(build, self.stage) if spec.input_size else None
        self.final_norm = build.norm(spec.hidden_size, spec.norm)
        if self.stage.is_last and spec.tied_embeddings:
            self.lm_head = replace(self.embedding, parts={"lm_head": own})
        else:
            self.lm_head = build.vocabulary("lm_head", own if self.stage.is_last else none)
        self.num_parameters = sum(count_parameters(spec).values())

    def lay_out(self, layout: KVLayout) -> None:
        """Where in the cache layers keep their keys; all in one group until this is called."""
        self.layout = layout
        kinds = [self.spec.layers[index].attention for index in self.stage.layers]
        self._shapes = [self.attention.spec_of(kind).block_shape for kind in kinds]

    def forward(
        self, batch: ForwardBatch, kv_cache: Tensor, *, wanted: Tensor | None = None
    ) -> Residual:
        """One step. `attention.prepare(batch)` must have run.

        kv_cache: [2, layers of a block, num_blocks, block_size, num_kv_heads, head_dim], in the
        shape of any kind of layer. wanted: [n] int64, the tokens that are asked for; None: all.
        Returns what the last layer leaves of them; if all are asked for, perhaps only normed.
        """
        inputs = list[Tensor | None]([None] * len(self.layers))
        residual = self._shared_out(batch.input_ids)
        if residual is None:
            hidden = batch.received
            if hidden is None or self.layer_inputs is not None:
                embedded = self._embed(batch.input_ids)
                hidden = embedded if hidden is None else hidden
                if self.layer_inputs is not None:
                    inputs = list(self.layer_inputs.of(batch.input_ids, embedded).unbind(1))
            residual = Residual(hidden)
        # What the next stage begins with is not normed ahead here.
        final_norm = self.final_norm if self.stage.is_last else None
        norms = [*(layer.attention.norms.pre for layer in self.layers[1:]), final_norm]
        shape = kv_cache.shape[:3]
        # As layers of each kind see it; within a group, too, they may differ in how heads lie.
        caches = {kind: kv_cache.view(*shape, *kind).unbind(1) for kind in set(self._shapes)}
        layers = zip(self.layers, self.layout.places, self._shapes, norms, inputs, strict=True)
        for layer, (group, index), kind, norm, given in layers:
            residual = layer.forward(
                residual,
                batch=batch.of_group(group),
                layer_cache=caches[kind][index],
                given=given,
                next_norm=norm,
                wanted=wanted if layer is self.layers[-1] else None,
            )
        return residual

    def _shared_out(self, token_ids: Tensor) -> Residual | None:
        """What the first layer takes, if ranks share out its rows."""
        rows, norm = self._parallel.rows, self.layers[0].attention.norms.pre
        if rows is None or not self._shares_rows or not rows.takes(len(token_ids)):
            return None
        part = self.vocabulary.own_part(token_ids, self.embedding, self._kernels.lookup)
        part = self._multiplied(part)
        own = torch.zeros_like(part[rows.share(self._parallel.rank, len(part))])
        return self._kernels.reduce_add(part, own, self._parallel, next_norm=norm)

    def _embed(self, token_ids: Tensor) -> Tensor:
        embedded = self.vocabulary.embed(token_ids, self.embedding, self._kernels.lookup)
        return self._multiplied(embedded)

    def _multiplied(self, embedded: Tensor) -> Tensor:
        if self.spec.embedding_multiplier != 1.0:
            embedded *= rounded(self.spec.embedding_multiplier, embedded.dtype)
        return embedded

    def compute_logits(self, residual: Residual) -> Tensor:
        """residual: of n tokens, from `forward`. Returns new memory, [n, vocab_size] float32."""
        return self.raw_logits(residual).float()

    def raw_logits(self, residual: Residual) -> Tensor:
        """`compute_logits` in the model's own precision."""
        return self.vocabulary.gather(self.own_logits(residual))

    def own_logits(self, residual: Residual) -> Tensor:
        """`raw_logits` of this rank's ids alone."""
        logits = self._kernels.norm_linear(residual, self.final_norm, self.lm_head)
        if self.spec.logit_scale != 1.0:
            logits.mul_(self.spec.logit_scale)
        if self.spec.final_softcap is not None:
            logits.div_(self.spec.final_softcap).tanh_().mul_(self.spec.final_softcap)
        return logits

    @property
    def waits_for_routers(self) -> bool:
        """Whether the host waits for what some router picks."""
        blocks = (layer.mlp for layer in self.layers if not isinstance(layer.mlp, DenseBlock))
        return any(block.experts.waits_for_router for block in blocks)

    def linears(self) -> Iterator[Linear]:
        """Every linear layer, for passes that change how they multiply."""
        for layer in self.layers:
            yield from layer.linears()
        if self.stage.is_last:
            yield self.lm_head

    def slots(self) -> Iterator[WeightSlot]:
        """Every piece that a checkpoint must bring, and where it goes. A tied head brings none."""
        if self.stage.holds_embedding(self.spec):
            yield from self.embedding.slots(None)
        for index, layer in enumerate(self.layers, self.stage.first):
            yield from layer.slots(index)
        if self.layer_inputs is not None:
            yield from self.layer_inputs.slots()
        if self.stage.is_last:
            yield self.final_norm.slot("final_norm", None, self.spec.norm)
            if not self.spec.tied_embeddings:
                yield from self.lm_head.slots(None)
