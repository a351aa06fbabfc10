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
    MoE,
    Norm,
    Rope,
    Router,
)
from nanovllm.checkpoint.weight_names import WeightNames

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
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
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
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
    "first_k_dense_replace": (None, 0),
    "kv_lora_rank": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "mamba_d_state": (None,),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "parallel_attn": (None, False),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1),
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

    def is_null(self, name: str) -> bool:
        """Whether the field is there, and says that there is none."""
        return name in self._nulls

    def check_all_maths_was_read(self) -> None:
        """Raises `ValueError` naming a field that asks for maths which nobody looked at."""
        for name, neutral in MATHS.items():
            value = self._fields.get(name)
            if name not in self._read and value not in neutral:
                raise ValueError(
                    f"config.json: {name}={value!r} changes what a model computes, and is not "
                    f"supported for architectures {self._fields.get('architectures')}"
                )
        kinds = {*self._fields.get("layer_types", [])} - {FULL}
        if "layer_types" not in self._read and kinds:
            raise ValueError(f"config.json: layer_types {sorted(kinds)} are not supported here")


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
    scaling = rope(config).scaling
    if isinstance(scaling, LinearScaling):  # the field tells of those before scaling, as for vLLM
        positions = int(positions * scaling.factor)
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
    fields = {"scale": head_dim**-0.5, "rope": rope(config), **differences}
    return Attention(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, **fields)


def dense(config: Config, *, bias: bool = False) -> Dense:
    inner = whole(config, "intermediate_size")
    return Dense(intermediate_size=inner, activation=activation(config), bias=bias)


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


def activation(config: Config, field: str = "hidden_act") -> Activation:
    name = config.get(field, "silu")
    if name not in ACTIVATIONS:
        raise ValueError(
            f"config.json: {field} {name!r} is not supported: "
            f"supported are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def rope(config: Config, **defaults: Any) -> Rope:
    """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

    As in transformers `rope_scaling` comes first where both are there. Whatever they say that is
    not understood is a `ValueError`.
    """
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    given = old or new or {}
    field = "rope_scaling" if old else "rope_parameters"
    if not isinstance(given, Mapping) or any(isinstance(v, Mapping) for v in given.values()):
        raise ValueError(f"config.json: {field} must be one object for all layers, not {given!r}")
    values = {name: value for name, value in given.items() if value is not None}
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ROPE_FIELDS:
        raise ValueError(
            f"config.json: rope_type {kind!r} is not supported: "
            f"supported are {', '.join([*ROPE_FIELDS][:-1])} and {[*ROPE_FIELDS][-1]}"
        )
    partial = values.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError("config.json: partial_rotary_factor other than 1 is not supported")
    for name in sorted(values.keys() - ROPE_FIELDS[kind] - ROPE_FIELDS["default"]):
        raise ValueError(
            f"config.json: {field} has {name}={values[name]!r}, which means nothing for rope_type "
            f"{kind!r}: name the rope_type it belongs to, or leave it out"
        )
    default = defaults.get("rope_theta", 10000.0)
    theta = number(values, "rope_theta", number(config, "rope_theta", default))
    match kind:
        case "linear":
            return Rope(theta, LinearScaling(number(values, "factor")))
        case "llama3":
            scaling = Llama3Scaling(
                factor=number(values, "factor"),
                low_freq_factor=number(values, "low_freq_factor"),
                high_freq_factor=number(values, "high_freq_factor"),
                original_context=whole(
                    values,
                    "original_max_position_embeddings",
                    whole(config, "max_position_embeddings"),
                ),
            )
            return Rope(theta, scaling)
        case _:
            return Rope(theta)


def windows(config: Config) -> list[int | None]:
    """The window of each layer in Qwen's configs, where some layers may slide and others not."""
    count = num_layers(config)
    window: int | None = None
    if config.get("use_sliding_window", False) and not config.is_null("sliding_window"):
        window = whole(config, "sliding_window", DEFAULT_WINDOW)
    first = config.get("max_window_layers", DEFAULT_MAX_WINDOW_LAYERS)
    kinds = config.get("layer_types") or [SLIDING if i >= first else FULL for i in range(count)]
    if len(kinds) != count or not {*kinds} <= {FULL, SLIDING}:
        raise ValueError(
            f"config.json: layer_types must name {count} layers, each {FULL} or {SLIDING}"
        )
    return [window if kind == SLIDING else None for kind in kinds]
