"""Counter-based randomness: a uniform number is a pure function of (seed, position).

`sampler` draws with it. Nothing is carried from step to step, so batch composition, row, rank,
preemption and restart cannot change what a request samples.
"""

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    counter: [4, n], key: [2, n], 32-bit words in int64. Returns [4, n], likewise.
    """
    multipliers = torch.tensor(MULTIPLIERS, device=key.device)[:, None]
    weyl = torch.tensor(WEYL, device=key.device)[:, None]
    even, odd = counter[0::2], counter[1::2]  # words 0 and 2, words 1 and 3
    for _ in range(ROUNDS):
        # The 64-bit product may wrap to a negative int64; its bits, all that is used, are right.
        product = even * multipliers
        even = ((product >> 32) & WORD).flip(0) ^ odd ^ key
        odd = (product & WORD).flip(0)
        key = (key + weyl) & WORD
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """One number in the open interval (0, 1) for each pair, [n] float64.

    seeds: [n] int64, the Philox key; positions: [n] int64, its counter.
    """
    zeros = torch.zeros_like(positions)
    counter = torch.stack((positions & WORD, (positions >> 32) & WORD, zeros, zeros))
    key = torch.stack((seeds & WORD, (seeds >> 32) & WORD))
    words = philox4x32(counter, key)
    # 52 bits and a half are exact in float64; 53 bits and a half would round up to 1.0.
    return (((words[0] << 20) | (words[1] >> 12)).double() + 0.5) * 2.0**-52
