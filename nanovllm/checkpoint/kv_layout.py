"""Which layers keep keys and values in one block, and how many blocks a sequence holds at most.

Layers that see as far (a window, or all) are cut into groups of about as many layers as the rarer
kind has. A group has block tables of its own, and all groups take blocks of one pool, so what is
freed behind a window serves any layer (vLLM's hybrid KV cache). The plan, core and worker share it.
"""

from collections.abc import Iterable

from msgspec import Struct

from nanovllm.checkpoint.spec import DecoderSpec

MOSTLY_EQUAL = 1.25  # of numbers of layers of two kinds: one group each, and some of a block unused


class KVGroup(Struct, frozen=True):
    """Layers whose keys and values lie in the same blocks. window: as in `spec.Attention`."""

    window: int | None
    layers: tuple[int, ...]


class KVLayout(Struct, frozen=True):
    """All groups of a model. A block has room for `layers_per_block` layers, whoever's it is."""

    groups: tuple[KVGroup, ...]

    @property
    def layers_per_block(self) -> int:
        return max(len(group.layers) for group in self.groups)

    @property
    def windows(self) -> tuple[int | None, ...]:
        return tuple(group.window for group in self.groups)

    @property
    def places(self) -> list[tuple[int, int]]:
        """Of each layer: its group, and which of the layers in a block it is."""
        found = {
            layer: (number, index)
            for number, group in enumerate(self.groups)
            for index, layer in enumerate(group.layers)
        }
        return [found[layer] for layer in range(len(found))]


def kv_layout(spec: DecoderSpec) -> KVLayout:
    """What a model's layers need. Models whose layers see equally far have one group."""
    kinds: dict[int | None, list[int]] = {}
    for index, layer in enumerate(spec.layers):
        kinds.setdefault(layer.attention.window, []).append(index)
    counts = [len(layers) for layers in kinds.values()]
    size = max(counts) if max(counts) < MOSTLY_EQUAL * min(counts) else min(counts)
    groups = [
        KVGroup(window, tuple(layers[start : start + size]))
        for window, layers in kinds.items()
        for start in range(0, len(layers), size)
    ]
    return KVLayout(tuple(groups))


def undivided(spec: DecoderSpec) -> KVLayout:
    """All layers in one group, for steps that know one block table: where layers differ in how far
    they see, all keys are kept."""
    windows = {layer.attention.window for layer in spec.layers}
    window = windows.pop() if len(windows) == 1 else None
    return KVLayout((KVGroup(window, tuple(range(spec.num_layers))),))


def most_blocks(
    windows: Iterable[int | None], num_tokens: int, *, block_size: int, step_tokens: int
) -> int:
    """How many blocks a sequence of `num_tokens` holds at most, in groups of these windows.

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
