"""Which layers each stage of a pipeline owns; no torch. Asked by workers and by `nanovllm plan`.

Stages follow each other, and have as many layers as evenly as can be. Layers that attend to an
earlier layer's keys are in its stage.
"""

from itertools import pairwise

from msgspec import Struct
from msgspec.structs import replace

from nanovllm.checkpoint.spec import DecoderSpec


class Stage(Struct, frozen=True):
    """The layers [first, end) of a model, as the stage `number` of `size`."""

    number: int
    size: int
    first: int
    end: int

    @property
    def layers(self) -> range:
        return range(self.first, self.end)

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.size - 1

    def holds_embedding(self, spec: DecoderSpec) -> bool:
        """Tokens enter in the first stage; a tied head is in the last; and where layers are given
        vectors, these are made of the embedding."""
        return self.is_first or (self.is_last and spec.tied_embeddings) or spec.input_size > 0


def whole(spec: DecoderSpec) -> Stage:
    """The only stage of a model that is not cut."""
    return Stage(0, 1, 0, spec.num_layers)


def stages_of(spec: DecoderSpec, num_stages: int) -> tuple[Stage, ...]:
    """All stages of a model. Raises `ValueError` naming how many there can be."""
    cuts = [0, *_possible_cuts(spec), spec.num_layers]
    if num_stages >= len(cuts):
        reason = "" if len(cuts) > spec.num_layers else ", some of which share keys and values,"
        raise ValueError(
            f"pipeline_parallel_size: {spec.architecture} with {spec.num_layers} layers{reason} "
            f"cannot be cut into {num_stages} stages: use at most {len(cuts) - 1}"
        )
    ends = pairwise(_most_even(cuts, num_stages))
    return tuple(Stage(number, num_stages, *part) for number, part in enumerate(ends))


def part_of(spec: DecoderSpec, stage: Stage) -> DecoderSpec:
    """The same with the stage's layers alone."""
    own = spec.layers[stage.first : stage.end]
    layers = (
        layer if layer.keys_of is None else replace(layer, keys_of=layer.keys_of - stage.first)
        for layer in own
    )
    return replace(spec, layers=tuple(layers))


def _possible_cuts(spec: DecoderSpec) -> list[int]:
    """Before which layers a stage may begin, but for the first."""
    return [
        cut
        for cut in range(1, spec.num_layers)
        if all(layer.keys_of is None or layer.keys_of >= cut for layer in spec.layers[cut:])
    ]


def _most_even(cuts: list[int], num_stages: int) -> list[int]:
    """Where stages begin, and the end: the sum of their lengths' squares is the least there is. Of
    equals the later cuts, since the last stage has the head as well."""
    # What is best up to each cut, with as many stages as have been entered.
    best: dict[int, tuple[int, list[int]]] = {0: (0, [0])}
    for _ in range(num_stages):
        longer: dict[int, tuple[int, list[int]]] = {}
        for end in cuts:
            ways = [
                (cost + (end - start) ** 2, [-at for at in begun], end)
                for start, (cost, begun) in best.items()
                if start < end
            ]
            if ways:
                cost, begun, _ = min(ways)
                longer[end] = cost, [*(-at for at in begun), end]
        best = longer
    return best[cuts[-1]][1]
