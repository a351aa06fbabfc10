"""Which models a CPU runs by native steps, as far as their specs say; no torch.

`worker.models.native` asks, and `nanovllm plan`, since weights then stay as files store them.
"""

from nanovllm.checkpoint.spec import DecoderSpec, Dense, LayerSpec

TILE = 32  # columns that share a scale; those of weights are a multiple


def unsupported(spec: DecoderSpec) -> str | None:
    """Why steps of such a model are not one call; None if they can be."""
    if len({(kind.num_kv_heads, kind.head_dim) for kind in spec.attentions}) > 1:
        return "keys of layers differ in size"
    if any(layer.norm.eps != spec.norm.eps for layer in spec.layers):
        return "norms differ in what they add"
    if spec.hidden_size % TILE:
        return f"hidden_size {spec.hidden_size} is no multiple of {TILE}"
    odd = (_odd(layer) for layer in spec.layers)
    return next((reason for reason in odd if reason is not None), None)


def _odd(layer: LayerSpec) -> str | None:
    attention = layer.attention
    if not isinstance(layer.mlp, Dense) or layer.experts is not None:
        return "a layer has experts"
    if layer.parallel or layer.norm.centers:
        return "attention and MLP are side by side, or norms take off means"
    if attention.v_norm or layer.keys_of is not None or layer.input_size or layer.scaled:
        return "layers have values that are normed, keys of others, inputs or scales of their own"
    heads = attention.num_heads * attention.head_dim
    if layer.mlp.intermediate_size % TILE or heads % TILE:
        return f"a width is no multiple of {TILE}"
    return None
