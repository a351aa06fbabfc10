"""What tells one decoder from another, as values: the maths of each layer, and what surrounds them.

`facts` makes a `DecoderSpec` of a checkpoint's config; the memory plan, the worker and the program
that compiles kernels ahead build from it. Sizes are those of the whole model, whatever a rank holds
of it. No torch here.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from nanovllm.checkpoint.weight_names import WeightNames

Activation = Literal["silu", "gelu_tanh"]
WeightGroup = Literal["embedding", "attention", "mlp", "norms", "head"]


class LinearScaling(Struct, frozen=True, tag=True):
    """Positions are divided by `factor` (Chen et al. 2023, "position interpolation")."""

    factor: float


class Llama3Scaling(Struct, frozen=True, tag=True):
    """Llama 3.1's: only frequencies too low to turn within `original_context` are divided.

    A frequency that turns at least `high_freq_factor` times within the original context stays, one
    that turns at most `low_freq_factor` times is divided by `factor`; between, it is blended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int  # tokens


class YarnScaling(Struct, frozen=True, tag=True):
    """YaRN (Peng et al. 2023): frequencies that turn fast within `original_context` stay, slow ones
    are divided by `factor`; between the two a ramp.

    beta_fast, beta_slow: turns within the original context at which the ramp begins and ends.
    truncates: its ends are rounded outwards to whole pairs. attention_factor: of cosines and sines.
    """

    factor: float
    original_context: int  # tokens
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncates: bool = True


class LongRopeScaling(Struct, frozen=True, tag=True):
    """LongRoPE (Ding et al. 2024): a divisor of its own for each frequency.

    Those of `long_factors` where more than `original_context` positions are served, else those of
    `short_factors`. One table serves all sequences, as vLLM's does: cached keys cannot change when
    a sequence grows past the original context. attention_factor: of cosines and sines.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_context: int  # tokens
    attention_factor: float


class Rope(Struct, frozen=True):
    """Base and scaling of the rotary frequencies, and which numbers of a head they turn.

    share: of a head's numbers, the first, that turn at all. interleaved: the two numbers of a pair
    are neighbours in checkpoints, else half the turning numbers apart; in memory they are always
    half a head apart (`worker.layers.rotary`). proportional: frequencies are those of a head that
    turns as a whole, of which those that turn are the first (Gemma 4).
    """

    theta: float
    scaling: LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | None = None
    share: float = 1.0
    interleaved: bool = False
    proportional: bool = False


class QueryGrowth(Struct, frozen=True):
    """Queries grow with their position p, by 1 + beta * log(1 + p // context) (Llama 4)."""

    beta: float
    context: int  # tokens


class Norm(Struct, frozen=True, kw_only=True):
    """An RMS norm (Zhang & Sennrich 2019), or a layer norm without bias.

    centers: the mean is taken off first, which makes it a layer norm. rounds_last: it multiplies in
    fp32, and then rounds; else rounds, and then multiplies, as Llama's do. adds_one: it multiplies
    by 1 + weight, as Gemma's do, which round last.
    """

    eps: float
    rounds_last: bool = False
    adds_one: bool = False
    centers: bool = False


class Attention(Struct, frozen=True, kw_only=True):
    """Causal attention with grouped queries.

    scale: of the products of queries and keys. rope: None leaves positions out. window: tokens a
    query sees, itself included; None sees all. softcap: products become softcap * tanh(product /
    softcap). sinks: one more weight per head, which goes to nothing. qk_norm: queries and keys are
    normed, each head by itself or all heads of a token at once. v_norm: values are, by norms of
    heads without weights. values_are_keys: values are what keys are before they are normed.
    query_growth: of queries with their position.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    qk_norm: Literal["head", "full"] | None = None
    v_norm: bool = False
    values_are_keys: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    query_growth: QueryGrowth | None = None


class Dense(Struct, frozen=True, kw_only=True, tag=True):
    """A gated MLP: down(activation(gate) * up)."""

    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False


class Router(Struct, frozen=True, kw_only=True):
    """How logits, one per expert, become the experts of a token and their weights.

    scores: what an expert is weighed by: its share of the softmax over all, or the sigmoid of its
    logit. renormalizes: the weights of those chosen add up to 1; of a softmax it is the same
    whether it is taken before or after. bias: of the logits. corrects: experts are chosen by their
    score plus a stored number, and weighed by the score alone (DeepSeek-V3). num_groups: experts
    are chosen from the `top_groups` whose two best add up to the most. scale: of the weights.
    norms: it takes the layer's input by a norm of its own, over the root of its size, and what an
    expert is weighed by is multiplied by a stored number (Gemma 4).
    """

    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalizes: bool = False
    bias: bool = False
    corrects: bool = False
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    norms: bool = False


class ClampedSwiGLU(Struct, frozen=True):
    """gate * sigmoid(alpha * gate) * (up + 1): gates at most `limit`, ups within it (gpt-oss)."""

    alpha: float
    limit: float


class MoE(Struct, frozen=True, kw_only=True, tag=True):
    """A mixture of `num_experts` gated MLPs, of which a router picks `top_k` for each token.

    intermediate_size: of one expert. bias: of its products. takes_turns: gates and ups are one
    tensor, in which they take turns. clamped: what gates and ups become instead of `activation`.
    shared_size: of one more MLP that every token passes through; 0: there is none. shared_gate: it
    is weighed by the sigmoid of a product of its own.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    router: Router
    activation: Activation = "silu"
    bias: bool = False
    takes_turns: bool = False
    clamped: ClampedSwiGLU | None = None
    shared_size: int = 0
    shared_gate: bool = False


class LayerSpec(Struct, frozen=True, kw_only=True):
    """Attention, then an MLP, each added to the residual.

    pre_norm: what each of the two takes is normed; post_norm: what each gives is, before it is
    added. All norms of a layer are of one kind. parallel: both take what the first norm gives, and
    there is no second.

    experts: a mixture beside a dense MLP, each with norms of its own, whose sum is what the MLP
    gives. keys_of: an earlier layer whose keys and values it attends to, having none. input_size:
    of a vector per token and layer that gates what is added last; 0: there is none. scaled: all
    that leaves the layer is multiplied by a stored number.
    """

    attention: Attention
    mlp: Dense | MoE
    norm: Norm
    pre_norm: bool = True
    post_norm: bool = False
    parallel: bool = False
    experts: MoE | None = None
    keys_of: int | None = None
    input_size: int = 0
    scaled: bool = False

    @property
    def mixture(self) -> MoE | None:
        """Its experts, be they the MLP or beside one."""
        return self.mlp if isinstance(self.mlp, MoE) else self.experts


class DecoderSpec(Struct, frozen=True, kw_only=True):
    """A whole decoder: embedding, layers, a norm, and the head.

    dtype: the precision the checkpoint was saved in, as torch calls it; None if it does not say.
    embedding_multiplier: of what the embedding gives. logit_scale and final_softcap: of the logits.
    """

    architecture: str
    names: WeightNames
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm: Norm
    max_position_embeddings: int
    tied_embeddings: bool
    dtype: str | None = None
    embedding_multiplier: float = 1.0
    logit_scale: float = 1.0
    final_softcap: float | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def input_size(self) -> int:
        """Of the vectors that layers are given for each token; 0: there are none."""
        return self.layers[0].input_size

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """Each kind of attention that some layer has, once."""
        return tuple(dict.fromkeys(layer.attention for layer in self.layers))

    def shortened(self, num_layers: int) -> "DecoderSpec":
        """The same with few layers: one of each kind, and at least `num_layers`."""
        kinds = list(dict.fromkeys(self.layers))
        kinds += self.layers[: max(0, num_layers - len(kinds))]
        own = {layer.attention: at for at, layer in enumerate(kinds) if layer.keys_of is None}
        layers = (
            layer if layer.keys_of is None else replace(layer, keys_of=own[layer.attention])
            for layer in kinds
        )
        return replace(self, layers=tuple(layers))


MERGED = {"q": "qkv", "k": "qkv", "v": "qkv"} | dict.fromkeys(("gate", "up"), "gate_up")
MERGED |= dict.fromkeys(("shared_gate", "shared_up"), "shared_gate_up")


class LinearPart(NamedTuple):
    """A matrix of a layer as checkpoints have it, or as many of them as there are experts."""

    name: str  # a part, as in `WeightNames`
    group: WeightGroup
    outputs: int
    inputs: int
    bias: bool = False
    copies: int = 1

    @property
    def num_weights(self) -> int:
        return self.copies * self.outputs * self.inputs

    @property
    def layer(self) -> str:
        """Parts that are multiplied as one are of the same."""
        return MERGED.get(self.name, self.name)


def linear_parts(layer: LayerSpec, hidden: int) -> Iterator[LinearPart]:
    """All matrices of a layer. hidden: the model's hidden size."""
    attention, mlp = layer.attention, layer.mlp
    queries = attention.num_heads * attention.head_dim
    keys = attention.num_kv_heads * attention.head_dim
    yield LinearPart("q", "attention", queries, hidden, attention.qkv_bias)
    if layer.keys_of is None:
        yield LinearPart("k", "attention", keys, hidden, attention.qkv_bias)
    if layer.keys_of is None and not attention.values_are_keys:
        yield LinearPart("v", "attention", keys, hidden, attention.qkv_bias)
    yield LinearPart("o", "attention", hidden, queries, attention.o_bias)
    yield from _mlp_parts(mlp, hidden)
    if layer.experts is not None:
        yield from _mlp_parts(layer.experts, hidden)


def _mlp_parts(mlp: Dense | MoE, hidden: int) -> Iterator[LinearPart]:
    inner, bias, copies = mlp.intermediate_size, False, 1
    match mlp:
        case Dense():
            bias = mlp.bias
        case MoE():
            bias, copies, shared = mlp.bias, mlp.num_experts, mlp.shared_size
            yield LinearPart("router", "mlp", copies, hidden, mlp.router.bias)
            if shared:
                yield LinearPart("shared_gate", "mlp", shared, hidden)
                yield LinearPart("shared_up", "mlp", shared, hidden)
                yield LinearPart("shared_down", "mlp", hidden, shared)
            if mlp.shared_gate:
                yield LinearPart("shared_expert_gate", "mlp", 1, hidden)
    prefix = "" if isinstance(mlp, Dense) else "expert_"
    if isinstance(mlp, MoE) and mlp.takes_turns:
        yield LinearPart("expert_gate_up", "mlp", 2 * inner, hidden, bias, copies)
    else:
        yield LinearPart(f"{prefix}gate", "mlp", inner, hidden, bias, copies)
        yield LinearPart(f"{prefix}up", "mlp", inner, hidden, bias, copies)
    yield LinearPart(f"{prefix}down", "mlp", hidden, inner, bias, copies)


def num_idle_weights(spec: DecoderSpec) -> int:
    """Of experts that a token does not pass through."""
    return sum(
        count * (mixture.num_experts - mixture.top_k) // mixture.num_experts
        for mixture, count in expert_weights(spec)
    )


def expert_weights(spec: DecoderSpec) -> Iterator[tuple[MoE, int]]:
    """The mixture of each layer that has one, and how many weights all of its experts have."""
    for layer in spec.layers:
        if (mixture := layer.mixture) is not None:
            parts = linear_parts(layer, spec.hidden_size)
            yield mixture, sum(part.num_weights for part in parts if part.copies > 1)


def count_parameters(spec: DecoderSpec) -> dict[WeightGroup, int]:
    """How many numbers each group of weights has; a tied head has none."""
    embedding, hidden = spec.vocab_size * spec.hidden_size, spec.hidden_size
    counts: dict[WeightGroup, int] = {
        "embedding": embedding,
        "attention": 0,
        "mlp": 0,
        "norms": hidden,
        "head": 0 if spec.tied_embeddings else embedding,
    }
    per_layers = spec.num_layers * spec.input_size
    if per_layers:
        counts["embedding"] += spec.vocab_size * per_layers
        counts["mlp"] += per_layers * hidden
        counts["norms"] += spec.input_size
    for layer in spec.layers:
        for part in linear_parts(layer, hidden):
            counts[part.group] += part.num_weights + part.copies * part.outputs * part.bias
        attention = layer.attention
        if layer.input_size:
            counts["mlp"] += 2 * layer.input_size * hidden
            counts["norms"] += hidden
        if layer.experts is not None:
            counts["mlp"] += layer.experts.num_experts
            counts["norms"] += 4 * hidden
        counts["norms"] += layer.scaled
        counts["attention"] += attention.num_heads * attention.sinks
        if isinstance(layer.mlp, MoE) and layer.mlp.router.corrects:
            counts["mlp"] += layer.mlp.num_experts
        num_pre = layer.pre_norm * (1 if layer.parallel else 2)
        counts["norms"] += hidden * (num_pre + 2 * layer.post_norm)
        match attention.qk_norm:
            case "head":
                counts["norms"] += (1 if layer.keys_of is not None else 2) * attention.head_dim
            case "full":
                num_heads = attention.num_heads + attention.num_kv_heads
                counts["norms"] += num_heads * attention.head_dim
    return counts
