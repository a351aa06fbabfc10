"""By how many ranks a model can be shared; no torch. Asked by workers and by `nanovllm plan`."""

from nanovllm.checkpoint.spec import DecoderSpec, LayerSpec


def possible_num_ranks(spec: DecoderSpec) -> list[int]:
    """Every number of ranks that heads and MLPs can be cut for, ascending.

    KV heads are repeated where there are fewer than ranks; the vocabulary can always be cut.
    """
    most = min(layer.attention.num_heads for layer in spec.layers)
    kinds = tuple(dict.fromkeys(spec.layers))
    return [num for num in range(1, most + 1) if all(_can_share(kind, num) for kind in kinds)]


def check_num_ranks(spec: DecoderSpec, num_ranks: int) -> None:
    """Raises `ValueError` naming the numbers that would do."""
    possible = possible_num_ranks(spec)
    if num_ranks not in possible:
        attention = spec.layers[0].attention
        raise ValueError(
            f"tensor_parallel_size: {spec.architecture} with {attention.num_heads} heads, "
            f"{attention.num_kv_heads} KV heads and MLPs of "
            f"{spec.layers[0].mlp.intermediate_size} cannot be shared by {num_ranks} ranks: use "
            f"one of {', '.join(map(str, possible))}"
        )


def _can_share(layer: LayerSpec, num_ranks: int) -> bool:
    attention, inner = layer.attention, layer.mlp.intermediate_size
    kv_heads = attention.num_kv_heads
    shares_keys = kv_heads % num_ranks == 0 or num_ranks % kv_heads == 0
    sizes = [attention.num_heads, inner]
    if layer.experts is not None:
        sizes.append(layer.experts.intermediate_size)
    return shares_keys and all(size % num_ranks == 0 for size in sizes)
