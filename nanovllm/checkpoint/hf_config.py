"""Reads the fields of a Hugging Face config.json; a family's file puts a `DecoderSpec` together.

Configs are what users bring: whatever is missing or not supported is a `ValueError` that says so,
never a model that computes something else. `null` means the same as a field that is not there.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from nanovllm.checkpoint.spec import (
    Activation,
    Attention,
    DecoderSpec,
    Dense,
    LayerSpec,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    MoE,
    Norm,
    Rope,
    Router,
    YarnScaling,
)
from nanovllm.checkpoint.weight_names import WeightNames

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
MODEL_TYPES = {
    "cohere2": "Cohere2ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4": "Gemma4ForConditionalGeneration",
    "gemma4_text": "Gemma4ForCausalLM",
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "llama": "LlamaForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
MAX_LAYERS = 1024  # a list has an entry for each; the deepest models have some 130
FULL, SLIDING = "full_attention", "sliding_attention"
# transformers' own, of Qwen's configs.
DEFAULT_WINDOW, DEFAULT_MAX_WINDOW_LAYERS = 4096, 28
# rope_type → what belongs to it; what belongs to "default" goes with every type.
ROPE_FIELDS = {
    "default": {
        *("rope_type", "type", "rope_theta", "partial_rotary_factor"),
        "original_max_position_embeddings",
    },
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        *("factor", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    },
    "proportional": {"factor"},
    "longrope": {"factor", "short_factor", "long_factor", "attention_factor"},
}
# Fields that change what some family computes, and values with which they change nothing. A family
# that does not read such a field is not computed rightly if it says anything else.
MATHS: dict[str, tuple[Any, ...]] = {
    "alibi": (None, False),
    "attention_chunk_size": (None,),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1),
    "final_logit_softcapping": (None,),
    "enable_moe_block": (None, False),
    "first_k_dense_replace": (None, 0),
    "hidden_size_per_layer_input": (None, 0),
    "kv_lora_rank": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "mamba_d_state": (None,),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0),
    "num_kv_shared_layers": (None, 0),
    "num_local_experts": (None, 0),
    "parallel_attn": (None, False),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1),
    "use_bidirectional_attention": (None, False),
    "use_qk_norm": (None, False),
    "use_sliding_window": (None, False),
}


class Config(Mapping[str, Any]):
    """The fields of a config.json that are not null; knows which of them have been read."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = {name: value for name, value in fields.items() if value is not None}
        self._nulls = fields.keys() - self._fields.keys()
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def of_text_part(self) -> "Config":
        """The fields of a multimodal model's text decoder, which may lie in an object of theirs."""
        inner = self._fields.get("text_config")
        if inner is None:
            return self
        if not isinstance(inner, Mapping):
            raise ValueError(f"config.json: text_config must be an object, not {inner!r}")
        outer = {name: self._fields.get(name) for name in ("dtype", "torch_dtype")}
        told = {name: value for name, value in outer.items() if value is not None}
        return Config({**told, **inner, "architectures": self._fields.get("architectures")})

    def replaced(self, fields: Mapping[str, Any]) -> "Config":
        """With other values of some fields; whoever reads it has read this one."""
        other = Config({**self._fields, **fields})
        other._nulls, other._read = self._nulls - fields.keys(), self._read
        return other

    def is_null(self, name: str) -> bool:
        """Whether the field is there, and says that there is none."""
        return name in self._nulls

    def check_all_maths_was_read(self) -> None:
        """Raises `ValueError` naming a field that asks for maths which nobody looked at."""
        for name in maths_in(self._fields):
            if name not in self._read:
                raise ValueError(
                    f"config.json: {name}={self._fields[name]!r} changes what a model computes, "
                    f"and is not supported for architectures {self._fields.get('architectures')}"
                )
        kinds = {*self._fields.get("layer_types", [])} - {FULL}
        if "layer_types" not in self._read and kinds:
            raise ValueError(f"config.json: layer_types {sorted(kinds)} are not supported here")


def maths_in(fields: Mapping[str, Any]) -> list[str]:
    """Fields of `MATHS` with values that change something."""
    return [name for name, neutral in MATHS.items() if fields.get(name) not in neutral]


def required(config: Mapping[str, Any], field: str) -> Any:
    value = config.get(field)
    if value is None:
        raise ValueError(f"config.json: {field} is missing: fetch the checkpoint again")
    return value


def whole(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    """A number above 0 that holds for all layers; a list must say the same of each.

    Raises `ValueError` naming the field, also if it is missing and there is no default.
    """
    value = config.get(field, default)
    if value is None:
        raise ValueError(f"config.json: {field} is missing: fetch the checkpoint again")
    if isinstance(value, list) and value and value.count(value[0]) == len(value):
        value = value[0]
    if isinstance(value, list):
        raise ValueError(
            f"config.json: {field} differs by layer ({value}), which is not supported: "
            "use a model whose layers are alike"
        )
    if type(value) is not int or value < 1:
        raise ValueError(f"config.json: {field} must be a whole number above 0, not {value!r}")
    return value


def number(config: Mapping[str, Any], field: str, default: float | None = None) -> float:
    """A finite number above 0. Raises `ValueError` as `whole` does."""
    value = config.get(field, default)
    if value is None:
        raise ValueError(f"config.json: {field} is missing: fetch the checkpoint again")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f"config.json: {field} must be a number above 0, not {value!r}")
    return float(value)


def number_or_none(config: Config, field: str, default: float | None = None) -> float | None:
    """As `number`, of a field that may say that there is none."""
    if config.is_null(field) or (default is None and field not in config):
        return None
    return number(config, field, default)


def decoder(
    config: Config, *, names: WeightNames, layers: list[LayerSpec], **differences: Any
) -> DecoderSpec:
    """The spec that `config` and a family's `differences` (fields of `DecoderSpec`) give."""
    fields = {
        "norm": rms_norm(config),
        "tied_embeddings": config.get("tie_word_embeddings", False),
        # transformers 5's name, and the one before
        "dtype": config.get("dtype", config.get("torch_dtype")),
        **differences,
    }
    positions = whole(config, "max_position_embeddings")
    ropes = {layer.attention.rope for layer in layers}
    match ropes.pop() if len(ropes) == 1 else None:
        # The field tells of those before scaling, or of those after: as for vLLM.
        case Rope(scaling=LinearScaling(factor)):
            positions = int(positions * factor)
        case Rope(scaling=YarnScaling(factor, context)):
            positions = max(positions, int(context * factor))
    return DecoderSpec(
        architecture=architectures(config)[0],
        names=names,
        vocab_size=whole(config, "vocab_size"),
        hidden_size=whole(config, "hidden_size"),
        layers=tuple(layers),
        max_position_embeddings=positions,
        **fields,
    )


def architectures(config: Config) -> list[str]:
    """The names that a config gives itself; where it has none, as its model_type implies."""
    named = config.get("architectures")
    if named is None:
        named = [MODEL_TYPES[kind]] if (kind := config.get("model_type")) in MODEL_TYPES else []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"config.json: architectures must be a list of names, not {named!r}")
    return named


def num_layers(config: Config) -> int:
    count = whole(config, "num_hidden_layers")
    if not 1 <= count <= MAX_LAYERS:
        raise ValueError(
            f"config.json: num_hidden_layers must be in [1, {MAX_LAYERS}], not {count}"
        )
    return count


def rms_norm(config: Config, *, default_eps: float = 1e-6, **differences: Any) -> Norm:
    return Norm(eps=number(config, "rms_norm_eps", default_eps), **differences)


def attention(
    config: Config, *, default_head_dim: int | None = None, **differences: Any
) -> Attention:
    """As `config` describes it; `differences` are fields of `Attention`.

    default_head_dim: of a family whose configs need not tell it; else, and where it is null, it
    follows from the hidden size.
    """
    num_heads = whole(config, "num_attention_heads")
    head_dim = None if config.is_null("head_dim") else default_head_dim
    head_dim = whole(config, "head_dim", head_dim or whole(config, "hidden_size") // num_heads)
    num_kv_heads = whole(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads or head_dim % 2:
        raise ValueError(
            f"config.json: num_attention_heads ({num_heads}) must be a multiple of "
            f"num_key_value_heads ({num_kv_heads}), and head_dim ({head_dim}) even"
        )
    fields = {"scale": head_dim**-0.5, **differences}
    if "rope" not in fields:
        fields["rope"] = rope(config)
    _check_turning(fields["rope"], head_dim)
    return Attention(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, **fields)


def _check_turning(turning: Rope | None, head_dim: int) -> None:
    if turning is None:
        return
    size = int(head_dim * turning.share)
    if size % 2 or not size:
        raise ValueError(
            f"config.json: partial_rotary_factor {turning.share} of head_dim {head_dim} must be an "
            "even number above 0"
        )
    match turning.scaling:
        case LongRopeScaling(short, long) if {len(short), len(long)} != {size // 2}:
            raise ValueError(
                f"config.json: short_factor and long_factor must have {size // 2} numbers, not "
                f"{len(short)} and {len(long)}"
            )


def dense(config: Config, *, bias: bool = False, **differences: Any) -> Dense:
    """As `config` describes it; `differences` are fields of `Dense`."""
    fields = differences or {"activation": activation(config)}
    return Dense(intermediate_size=whole(config, "intermediate_size"), bias=bias, **fields)


def experts(
    config: Config,
    *,
    num_experts: int,
    router: Router,
    size_field: str = "moe_intermediate_size",
    default_top_k: int | None = None,
    **differences: Any,
) -> MoE:
    """As `config` describes them; `differences` are fields of `MoE`.

    size_field: where the intermediate size of one expert stands.
    """
    top_k = whole(config, "num_experts_per_tok", default_top_k)
    if top_k > num_experts:
        raise ValueError(
            f"config.json: num_experts_per_tok ({top_k}) must be at most the number of experts "
            f"({num_experts})"
        )
    fields = {"activation": activation(config), **differences}
    return MoE(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=whole(config, size_field),
        router=router,
        **fields,
    )


def activation(config: Config, field: str = "hidden_act", *, default: str = "silu") -> Activation:
    name = config.get(field, default)
    if name not in ACTIVATIONS:
        raise ValueError(
            f"config.json: {field} {name!r} is not supported: "
            f"supported are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def rope(
    config: Config,
    kind: str | None = None,
    *,
    rope_theta: float = 10000.0,
    theta_field: str = "rope_theta",
    share: float | None = None,
    interleaved: bool = False,
    also: frozenset[str] = frozenset(),
) -> Rope:
    """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

    As in transformers `rope_scaling` comes first where both are there. kind: of layer, where a
    family's configs may tell of each by itself; then `rope_scaling` is that of full attention. The
    others but `also` are what the family's configs need not tell, share: None where heads always
    turn as a whole; also: fields that the family reads itself. Whatever a config says that is not
    understood is a `ValueError`.
    """
    field, values = _rope_values(config, kind)
    name = values.get("rope_type", values.get("type", "default"))
    name = "longrope" if name == "su" else name
    if name not in ROPE_FIELDS:
        raise ValueError(
            f"config.json: rope_type {name!r} is not supported: "
            f"supported are {', '.join([*ROPE_FIELDS][:-1])} and {[*ROPE_FIELDS][-1]}"
        )
    for extra in sorted(values.keys() - ROPE_FIELDS[name] - ROPE_FIELDS["default"] - also):
        raise ValueError(
            f"config.json: {field} has {extra}={values[extra]!r}, which means nothing for "
            f"rope_type {name!r}: name the rope_type it belongs to, or leave it out"
        )
    told = number(values, "partial_rotary_factor", config.get("partial_rotary_factor", share or 1))
    if told > 1 or (share is None and told != 1):
        raise ValueError(
            f"config.json: partial_rotary_factor {told} is not supported for architectures "
            f"{config.get('architectures')}"
        )
    context = config.get("original_max_position_embeddings")
    if context is None:
        context = values.get(
            "original_max_position_embeddings", config.get("max_position_embeddings")
        )
    context = whole(
        {"original_max_position_embeddings": context}, "original_max_position_embeddings"
    )
    return Rope(
        number(values, "rope_theta", number(config, theta_field, rope_theta)),
        _scaling(config, name, values, context=context),
        share=told,
        interleaved=interleaved,
        proportional=name == "proportional",
    )


def _rope_values(config: Config, kind: str | None) -> tuple[str, dict[str, Any]]:
    """What a config says of the rope of one kind of layer, and the field that says it."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    field = "rope_scaling" if old else "rope_parameters"
    given = old or new or {}
    is_object = isinstance(given, Mapping) and isinstance(new or {}, Mapping)
    by_kind = is_object and any(isinstance(value, Mapping) for value in (new or {}).values())
    if kind is not None and new is not None and by_kind:
        own = new.get(kind) or {}
        given = {**own, **(old or {})} if kind == FULL else own
        is_object = isinstance(given, Mapping)
    elif kind == SLIDING:
        given = {}
    if not is_object or any(isinstance(value, Mapping) for value in given.values()):
        raise ValueError(f"config.json: {field} must be one object for all layers, not {given!r}")
    return field, {name: value for name, value in given.items() if value is not None}


def _scaling(
    config: Config, name: str, values: Mapping[str, Any], *, context: int
) -> LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | None:
    """name: a key of `ROPE_FIELDS`; context: the original one, in tokens."""
    match name:
        case "linear":
            return LinearScaling(number(values, "factor"))
        case "proportional":
            return LinearScaling(number(values, "factor")) if "factor" in values else None
        case "llama3":
            low, high = number(values, "low_freq_factor"), number(values, "high_freq_factor")
            return Llama3Scaling(number(values, "factor"), low, high, context)
        case "yarn":
            factor = number(values, "factor", _growth(config, context))
            return YarnScaling(
                factor=factor,
                original_context=context,
                attention_factor=_yarn_attention_factor(values, factor),
                beta_fast=number(values, "beta_fast", 32.0),
                beta_slow=number(values, "beta_slow", 1.0),
                truncates=values.get("truncate", True),
            )
        case "longrope":
            factor = number(values, "factor", _growth(config, context))
            grown = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
            return LongRopeScaling(
                short_factors=_factors(values, "short_factor"),
                long_factors=_factors(values, "long_factor"),
                original_context=context,
                attention_factor=number(values, "attention_factor", grown),
            )
        case _:
            # Within max_position_embeddings "dynamic" scales nothing, and no more are served: past
            # them frequencies change with a sequence's length, and cached keys cannot follow.
            return None


def _growth(config: Config, context: int) -> float:
    return whole(config, "max_position_embeddings") / context


def _yarn_attention_factor(values: Mapping[str, Any], factor: float) -> float:
    def grown(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0

    default = grown(1.0)
    if values.get("mscale") and values.get("mscale_all_dim"):
        default = grown(number(values, "mscale")) / grown(number(values, "mscale_all_dim"))
    return number(values, "attention_factor", default)


def _factors(values: Mapping[str, Any], field: str) -> tuple[float, ...]:
    factors = values.get(field)
    if not isinstance(factors, list) or not factors:
        raise ValueError(f"config.json: {field} must be a list of numbers, not {factors!r}")
    return tuple(number({field: factor}, field) for factor in factors)


def layer_kinds(config: Config, *, every: int, field: str | None = None) -> list[str]:
    """FULL or SLIDING for each layer; by default one in `every` layers is full, the last of them.

    field: where configs told `every` before they told `layer_types`.
    """
    count = num_layers(config)
    if field is not None:
        every = whole(config, field, every)
    implied = [SLIDING if i % every else FULL for i in range(1, count + 1)]
    return _checked(config.get("layer_types") or implied, count)


def windows(config: Config) -> list[int | None]:
    """The window of each layer in Qwen's configs, where some layers may slide and others not."""
    count = num_layers(config)
    window: int | None = None
    if config.get("use_sliding_window", False) and not config.is_null("sliding_window"):
        window = whole(config, "sliding_window", DEFAULT_WINDOW)
    first = config.get("max_window_layers", DEFAULT_MAX_WINDOW_LAYERS)
    kinds = config.get("layer_types") or [SLIDING if i >= first else FULL for i in range(count)]
    return [window if kind == SLIDING else None for kind in _checked(kinds, count)]


def _checked(kinds: list[str], count: int) -> list[str]:
    if len(kinds) != count or not {*kinds} <= {FULL, SLIDING}:
        raise ValueError(
            f"config.json: layer_types must name {count} layers, each {FULL} or {SLIDING}"
        )
    return kinds
