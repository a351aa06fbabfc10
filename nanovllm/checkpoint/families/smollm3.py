"""SmolLM3 (2025): Llama in which every fourth layer knows no positions (NoPE)."""

from nanovllm.checkpoint.hf_config import (
    FULL,
    SLIDING,
    Config,
    attention,
    decoder,
    dense,
    layer_kinds,
    num_layers,
    rms_norm,
    rope,
    whole,
)
from nanovllm.checkpoint.spec import DecoderSpec, LayerSpec
from nanovllm.checkpoint.weight_names import LLAMA


def spec(config: Config) -> DecoderSpec:
    bias, count = config.get("attention_bias", False), num_layers(config)
    every = whole(config, "no_rope_layer_interval", 4)
    turns = config.get("no_rope_layers") or [i % every != 0 for i in range(1, count + 1)]
    if not isinstance(turns, list) or len(turns) < count:
        raise ValueError(f"config.json: no_rope_layers must tell of {count} layers, not {turns!r}")
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    kinds = [FULL] * count
    if window is not None:
        told = config.get("layer_types")
        kinds = [FULL if turn else SLIDING for turn in turns[:count]]
        kinds = kinds if told is None else layer_kinds(config, every=4)
    layers = [
        LayerSpec(
            attention=attention(
                config,
                rope=rope(config, rope_theta=2_000_000.0) if turn else None,
                window=window if kind == SLIDING else None,
                qkv_bias=bias,
                o_bias=bias,
            ),
            mlp=dense(config, bias=config.get("mlp_bias", False)),
            norm=rms_norm(config),
        )
        for turn, kind in zip(turns, kinds, strict=False)
    ]
    tied = config.get("tie_word_embeddings", True)
    return decoder(config, names=LLAMA, layers=layers, tied_embeddings=tied)
