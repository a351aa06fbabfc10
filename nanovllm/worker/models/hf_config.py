"""Reads a Hugging Face config.json into a `DecoderSpec`; the models' files say what differs.

Configs are what users bring: whatever is missing or not supported is a `ValueError` that says so,
never a model that computes something else.
"""

from typing import Any

from nanovllm.worker.layers.rotary import LinearScaling, Llama3Scaling, Rope
from nanovllm.worker.models.decoder import DecoderSpec

Config = dict[str, Any]


def dense_decoder(config: Config, **differences: Any) -> DecoderSpec:
    """The spec that `config` and an architecture's `differences` (fields of `DecoderSpec`) give."""
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act {config['hidden_act']!r} is not supported")
    num_heads = required(config, "num_attention_heads")
    hidden_size = required(config, "hidden_size")
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    head_dim = config.get("head_dim") or hidden_size // num_heads
    if num_heads % num_kv_heads or head_dim % 2:
        raise ValueError(
            f"config.json: num_attention_heads ({num_heads}) must be a multiple of "
            f"num_key_value_heads ({num_kv_heads}), and head_dim ({head_dim}) even"
        )
    return DecoderSpec(
        architecture=config["architectures"][0],
        vocab_size=required(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=required(config, "intermediate_size"),
        num_layers=required(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope=rope(config),
        max_position_embeddings=required(config, "max_position_embeddings"),
        tied_embeddings=config.get("tie_word_embeddings", False),
        **differences,
    )


def required(config: Config, field: str) -> Any:
    value = config.get(field)
    if value is None:
        raise ValueError(f"config.json: {field} is missing: fetch the checkpoint again")
    return value


def rope(config: Config) -> Rope:
    """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    values: Config = {"rope_theta": config.get("rope_theta") or 10000.0}
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


def layer_window(config: Config) -> int | None:
    """The window of Qwen's configs, where some layers may slide and others not."""
    if not config.get("use_sliding_window", False):
        return None
    num_layers = required(config, "num_hidden_layers")
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", num_layers)
        kinds = ["sliding_attention" if i >= first else "" for i in range(num_layers)]
    num_sliding = kinds.count("sliding_attention")
    if num_sliding == 0:
        return None
    if num_sliding < num_layers:
        raise ValueError(
            f"config.json: {num_sliding} of {num_layers} layers use a sliding window, which is "
            "supported for all layers or none: set use_sliding_window to false"
        )
    window: int = required(config, "sliding_window")
    return window
