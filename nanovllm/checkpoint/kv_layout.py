"""Which layers keep keys and values in one block, and how many blocks a sequence holds at most.

Layers that see as far (a window, or all) are cut into groups of about as many layers as the rarer
kind has. A group has block tables of its own, and all groups take blocks of one pool, so what is
freed behind a window serves any layer (vLLM's hybrid KV cache). The plan, core and worker share it.
"""

from collections.abc import Iterable
from itertools import pairwise

from msgspec import Struct

from nanovllm.checkpoint.spec import Attention, DecoderSpec
from nanovllm.checkpoint.stages import Stage, whole

MOSTLY_EQUAL = 1.25  # of numbers of layers of two kinds: one group each, and some of a block unused


class KVGroup(Struct, frozen=True):
    """Layers whose keys and values lie in the same blocks. window: as in `spec.Attention`. blocks:
    that it takes where the others take one, as its keys are so many times as large."""

    window: int | None
    layers: tuple[int, ...]
    blocks: int = 1


class KVLayout(Struct, frozen=True):
    """All groups of a model. A block has room for `layers_per_block` layers, whoever's it is.

    Of a stage of a pipeline, which has blocks for its own layers alone: all stages have the same
    groups, as they have the same block tables, and each the layers of them that it owns.
    places: of each layer, the group and which of the layers in a block it is; a layer that attends
    to another's keys has the other's place.
    """

    groups: tuple[KVGroup, ...]
    places: tuple[tuple[int, int], ...]

    @property
    def layers_per_block(self) -> int:
        return max(len(group.layers) for group in self.groups)

    @property
    def blocks(self) -> tuple[int, ...]:
        """That each group takes of the same tokens."""
        return tuple(group.blocks for group in self.groups)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each block that a group takes of the same tokens."""
        return tuple(group.window for group in self.groups for _ in range(group.blocks))


def kv_layout(spec: DecoderSpec, *, num_ranks: int = 1, stage: Stage | None = None) -> KVLayout:
    """What a model's layers need, or a stage's. Models whose layers are alike have one group.

    Raises `ValueError` for keys whose sizes are no multiples of the smallest.
    """
    times = _blocks_of_kinds(spec, num_ranks)
    kinds: dict[tuple[int | None, int], list[int]] = {}
    for index, layer in enumerate(spec.layers):
        if layer.keys_of is None:
            kinds.setdefault((layer.attention.window, times[layer.attention]), []).append(index)
    counts = [len(layers) for layers in kinds.values()]
    size = max(counts) if max(counts) < MOSTLY_EQUAL * min(counts) else min(counts)
    stage = stage or whole(spec)
    groups = []
    for (window, blocks), layers in kinds.items():
        number = -(-len(layers) // size)
        own = [layer for layer in layers if layer in stage.layers]
        bounds = [len(own) * part // number for part in range(number + 1)]
        groups += [
            KVGroup(window, tuple(own[start:end]), blocks) for start, end in pairwise(bounds)
        ]
    return _layout_of(spec, groups, stage)


def undivided(spec: DecoderSpec, *, stage: Stage | None = None) -> KVLayout:
    """All layers in one group, for batches of one block table: where layers differ in how far
    they see, all keys are kept. Where keys differ in size there is no such layout."""
    if len(set(_blocks_of_kinds(spec, 1).values())) > 1:
        return kv_layout(spec, stage=stage)
    stage = stage or whole(spec)
    windows = {layer.attention.window for layer in spec.layers}
    window = windows.pop() if len(windows) == 1 else None
    own = (index for index in stage.layers if spec.layers[index].keys_of is None)
    return _layout_of(spec, [KVGroup(window, tuple(own))], stage)


def _layout_of(spec: DecoderSpec, groups: list[KVGroup], stage: Stage) -> KVLayout:
    own = {
        layer: (number, index)
        for number, group in enumerate(groups)
        for index, layer in enumerate(group.layers)
    }
    sources = ((index, spec.layers[index].keys_of) for index in stage.layers)
    places = (own[index if source is None else source] for index, source in sources)
    return KVLayout(tuple(groups), tuple(places))


def token_size(attention: Attention, num_ranks: int) -> int:
    """Numbers that a rank keeps of a token's keys, and as many of its values."""
    return max(1, attention.num_kv_heads // num_ranks) * attention.head_dim


def _blocks_of_kinds(spec: DecoderSpec, num_ranks: int) -> dict[Attention, int]:
    """By how many times each kind's keys are larger than the smallest."""
    sizes = {attention: token_size(attention, num_ranks) for attention in spec.attentions}
    least = min(sizes.values())
    if any(size % least for size in sizes.values()):
        raise ValueError(
            f"model: layers whose keys have {sorted(set(sizes.values()))} numbers are not "
            "supported: the larger must be multiples of the smallest"
        )
    return {attention: size // least for attention, size in sizes.items()}


def block_sizes(spec: DecoderSpec, block_size: int, *, num_ranks: int = 1) -> dict[Attention, int]:
    """Tokens in a block of each kind of layer. block_size: of those with the smallest keys.

    Raises `ValueError` naming block_size if it cannot be shared so.
    """
    times = _blocks_of_kinds(spec, num_ranks)
    if block_size % max(times.values()):
        raise ValueError(
            f"block_size: {block_size} tokens must be a multiple of {max(times.values())}, by "
            "which the keys of some layers are larger than others'"
        )
    return {attention: block_size // count for attention, count in times.items()}


def most_blocks(
    windows: Iterable[int | None], num_tokens: int, *, block_size: int, step_tokens: int
) -> int:
    """How many blocks a sequence of `num_tokens` holds at most, of `KVLayout.windows`.

    step_tokens: the most that one step computes; blocks behind a window are freed between steps.
    """
    total = -(-num_tokens // block_size)
    return sum(
        total
        if window is None
        # Blocks that as many tokens touch as the first of a step's sees, and those of the step.
        else min(total, (window + step_tokens - 3) // block_size + 2)
        for window in windows
    )
