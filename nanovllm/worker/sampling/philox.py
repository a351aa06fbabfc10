"""Counter-based randomness: numbers are a pure function of (seed, position) and their index.

`sampler` draws with them. Nothing is carried from step to step, so batch composition, row, rank,
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
    rounds = torch.arange(ROUNDS, device=key.device)[:, None, None]
    weyl = torch.tensor(WEYL, device=key.device)[:, None]
    keys = (key + rounds * weyl).bitwise_and_(WORD)  # [ROUNDS, 2, n]
    even, odd = counter[0::2], counter[1::2]  # words 0 and 2, words 1 and 3
    for round_key in keys:
        # The 64-bit product may wrap to a negative int64; its bits, all that is used, are right.
        product = (even * multipliers).flip(0)
        even = (product >> 32).bitwise_and_(WORD).bitwise_xor_(odd).bitwise_xor_(round_key)
        odd = product.bitwise_and_(WORD)
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def uniforms(seeds: Tensor, positions: Tensor, count: int = 1) -> Tensor:
    """`count` numbers in the open interval (0, 1) for each pair, [n, count] float64.

    seeds: [n] int64, the Philox key; positions: [n] int64, the lower half of its counter. One call
    gives two numbers: number i is made of words 0 and 1, or 2 and 3, of call i // 2.
    """
    n, num_calls = len(seeds), (count + 1) // 2
    calls = torch.arange(num_calls, device=seeds.device).expand(n, -1)
    low, high = (word[:, None].expand(-1, num_calls) for word in _words(positions))
    counter = torch.stack((low, high, calls, torch.zeros_like(calls))).view(4, -1)
    key = torch.stack([word[:, None].expand(-1, num_calls) for word in _words(seeds)]).view(2, -1)
    words = philox4x32(counter, key).view(2, 2, n, num_calls)
    # 52 bits and a half are exact in float64; 53 bits and a half would round up to 1.0.
    bits = (words[:, 0] << 20) | (words[:, 1] >> 12)  # [2, n, num_calls]
    numbers = bits.double().add_(0.5).mul_(2.0**-52)
    return numbers.permute(1, 2, 0).reshape(n, -1)[:, :count]


def _words(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper 32 bits."""
    return numbers & WORD, (numbers >> 32) & WORD
