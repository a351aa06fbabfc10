"""By how many ranks a model can be shared; no torch. Asked by workers and by `nanovllm plan`."""

from nanovllm.checkpoint.spec import DecoderSpec, Dense, LayerSpec


def possible_num_ranks(spec: DecoderSpec, *, spreads_experts: bool = False) -> list[int]:
    """Every number of ranks that heads and MLPs can be cut for, ascending.

    KV heads are repeated where there are fewer than ranks; the vocabulary can always be cut.
    spreads_experts: each rank holds some of them whole, at least one of each layer.
    """
    most = min(layer.attention.num_heads for layer in spec.layers)
    kinds = tuple(dict.fromkeys(spec.layers))
    return [
        num
        for num in range(1, most + 1)
        if all(_can_share(kind, num, spreads_experts=spreads_experts) for kind in kinds)
    ]


def check_num_ranks(spec: DecoderSpec, num_ranks: int, *, spreads_experts: bool = False) -> None:
    """Raises `ValueError` naming the numbers that would do, or that there are no experts."""
    mixtures = [found for layer in spec.layers if (found := layer.mixture) is not None]
    if spreads_experts and not mixtures:
        raise ValueError(
            f"enable_expert_parallel: {spec.architecture} has no experts: omit it, and ranks share "
            "the MLPs"
        )
    possible = possible_num_ranks(spec, spreads_experts=spreads_experts)
    if num_ranks not in possible:
        attention = spec.layers[0].attention
        mlps = f"MLPs of {spec.layers[0].mlp.intermediate_size}"
        if spreads_experts:
            mlps = f"{min(mixture.num_experts for mixture in mixtures)} experts"
        raise ValueError(
            f"tensor_parallel_size: {spec.architecture} with {attention.num_heads} heads, "
            f"{attention.num_kv_heads} KV heads and {mlps} cannot be shared by {num_ranks} ranks: "
            f"use one of {', '.join(map(str, possible))}"
        )


def _can_share(layer: LayerSpec, num_ranks: int, *, spreads_experts: bool) -> bool:
    attention, mixture = layer.attention, layer.mixture
    kv_heads = attention.num_kv_heads
    shares_keys = kv_heads % num_ranks == 0 or num_ranks % kv_heads == 0
    sizes = [attention.num_heads]
    if isinstance(layer.mlp, Dense):
        sizes.append(layer.mlp.intermediate_size)
    if mixture is not None:
        sizes.append(mixture.shared_size)
        if spreads_experts and num_ranks > mixture.num_experts:
            return False
        if not spreads_experts:
            sizes.append(mixture.intermediate_size)
    return shares_keys and all(size % num_ranks == 0 for size in sizes)
