"""Reads the fields of a Hugging Face config.json; a family's file puts a `DecoderSpec` together.

Configs are what users bring: whatever is missing or not supported is a `ValueError` that says so,
never a model that computes something else. `null` means the same as a field that is not there.
"""

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
    Norm,
    Rope,
)
from nanovllm.checkpoint.weight_names import WeightNames

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
FULL, SLIDING = "full_attention", "sliding_attention"
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


def decoder(
    config: Config, *, names: WeightNames, layers: list[LayerSpec], **differences: Any
) -> DecoderSpec:
    """The spec that `config` and a family's `differences` (fields of `DecoderSpec`) give."""
    fields = {
        "tied_embeddings": config.get("tie_word_embeddings", False),
        # transformers 5's name, and the one before
        "dtype": config.get("dtype", config.get("torch_dtype")),
        **differences,
    }
    return DecoderSpec(
        architecture=config["architectures"][0],
        names=names,
        vocab_size=required(config, "vocab_size"),
        hidden_size=required(config, "hidden_size"),
        layers=tuple(layers),
        norm=rms_norm(config),
        max_position_embeddings=required(config, "max_position_embeddings"),
        **fields,
    )


def num_layers(config: Config) -> int:
    count: int = required(config, "num_hidden_layers")
    return count


def rms_norm(config: Config) -> Norm:
    return Norm(eps=config.get("rms_norm_eps", 1e-6))


def attention(config: Config, **differences: Any) -> Attention:
    """As `config` describes it; `differences` are fields of `Attention`."""
    num_heads = required(config, "num_attention_heads")
    head_dim = config.get("head_dim") or required(config, "hidden_size") // num_heads
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads or head_dim % 2:
        raise ValueError(
            f"config.json: num_attention_heads ({num_heads}) must be a multiple of "
            f"num_key_value_heads ({num_kv_heads}), and head_dim ({head_dim}) even"
        )
    fields = {"scale": head_dim**-0.5, "rope": rope(config), **differences}
    return Attention(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, **fields)


def dense(config: Config, *, bias: bool = False) -> Dense:
    inner = required(config, "intermediate_size")
    return Dense(intermediate_size=inner, activation=activation(config), bias=bias)


def activation(config: Config, field: str = "hidden_act") -> Activation:
    name = config.get(field, "silu")
    if name not in ACTIVATIONS:
        raise ValueError(
            f"config.json: {field} {name!r} is not supported: "
            f"supported are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def rope(config: Config, **defaults: Any) -> Rope:
    """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    values: dict[str, Any] = {"rope_theta": config.get("rope_theta") or 10000.0}
    values |= config.get("rope_parameters") or config.get("rope_scaling") or {}
    if values.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("config.json: partial_rotary_factor other than 1 is not supported")
    theta = float(values["rope_theta"])
    match values.get("rope_type", values.get("type", "default")):
        case "default":
            return Rope(theta)
        case "linear":
            return Rope(theta, LinearScaling(required(values, "factor")))
        case "llama3":
            context = values.get("original_max_position_embeddings")
            scaling = Llama3Scaling(
                factor=required(values, "factor"),
                low_freq_factor=required(values, "low_freq_factor"),
                high_freq_factor=required(values, "high_freq_factor"),
                original_context=context or required(config, "max_position_embeddings"),
            )
            return Rope(theta, scaling)
        case kind:
            raise ValueError(
                f"config.json: rope_type {kind!r} is not supported: "
                "supported are default, linear and llama3"
            )


def windows(config: Config) -> list[int | None]:
    """The window of each layer in Qwen's configs, where some layers may slide and others not."""
    count = num_layers(config)
    slides = config.get("use_sliding_window", False)
    first = config.get("max_window_layers", count)
    kinds = config.get("layer_types") or [SLIDING if i >= first else FULL for i in range(count)]
    if len(kinds) != count or not {*kinds} <= {FULL, SLIDING}:
        raise ValueError(
            f"config.json: layer_types must name {count} layers, each {FULL} or {SLIDING}"
        )
    if not slides or SLIDING not in kinds:
        return [None] * count
    window: int = required(config, "sliding_window")
    return [window if kind == SLIDING else None for kind in kinds]
