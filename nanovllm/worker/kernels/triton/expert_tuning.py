"""How products of experts are cut; `experts` launches by it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertTile:
    """What one program computes: block_m pairs of one expert, block_n outputs, block_k inputs at a
    time. An output of the first product is a gate and an up, so its tiles are twice as wide."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def tiles_for(
    pairs_per_expert: float, *, bits: int = 16, has_room: bool = True
) -> tuple[ExpertTile, ExpertTile]:
    """Of gate and up, and of down; both of the same blocks of pairs. bits: of a weight.

    Up to some 64 pairs an expert its weights are what takes time, and several programs share a
    multiprocessor; then products are. Few and many pairs, and weights of 4 bits: as measured on an
    H200 with Qwen3-30B-A3B and gpt-oss-20b (benchmarks/experts.py). Of weights of 8 bits few tokens
    take twice as many inputs at a time, to read as long pieces of rows; not yet measured. has_room:
    a program may have 200 KiB of shared memory, as on Hopper and later; an Ada has 99.
    """
    if bits == 4:
        return _tiles_of_4_bits(pairs_per_expert, has_room=has_room)
    block_k = 128 if bits == 8 else 64
    if pairs_per_expert <= 12:
        if bits == 16 and has_room:
            return ExpertTile(16, 64, 128, 4, 5), ExpertTile(16, 128, 128, 4, 5)
        return ExpertTile(16, 64, block_k, 4, 4), ExpertTile(16, 128, block_k, 4, 4)
    if pairs_per_expert <= 24:
        return ExpertTile(32, 64, block_k, 4, 4), ExpertTile(32, 128, block_k, 4, 4)
    if pairs_per_expert <= 64:
        return ExpertTile(64, 64, 64, 4, 3), ExpertTile(64, 128, 64, 4, 3)
    if not has_room:
        return ExpertTile(128, 64, 64, 8, 3), ExpertTile(128, 128, 64, 8, 3)
    if bits == 8:
        return ExpertTile(128, 64, 64, 8, 4), ExpertTile(128, 128, 64, 8, 4)
    return ExpertTile(128, 128, 64, 8, 4), ExpertTile(128, 256, 64, 8, 4)


def _tiles_of_4_bits(pairs_per_expert: float, *, has_room: bool) -> tuple[ExpertTile, ExpertTile]:
    if pairs_per_expert <= 3:
        return ExpertTile(8, 32, 128, 4, 4), ExpertTile(8, 64, 128, 4, 4)
    if pairs_per_expert <= 16:
        return ExpertTile(16, 64, 64, 4, 5), ExpertTile(16, 128, 64, 4, 5)
    if pairs_per_expert <= 100:
        warps = 4 if pairs_per_expert <= 40 else 8
        return ExpertTile(64, 64, 64, warps, 4), ExpertTile(64, 128, 64, warps, 4)
    stages = 4 if has_room else 3
    return ExpertTile(128, 64, 64, 8, stages), ExpertTile(128, 128, 64, 8, stages)
