"""Sampling by ranks that each hold a slice of the vocabulary: they exchange three numbers a row.

For rows that nothing is asked of but a temperature. Each rank finds the token that comes first in
its slice (`candidates`); all of them then find the same winner (`join`): the token that
`distribution.draw` would draw from all logits. `sampler` calls it, and is the oracle of kernels.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from nanovllm.worker.parallel import SEGMENT
from nanovllm.worker.sampling.distribution import draw_with_speed

LOWEST = -1e30
NUM_WORDS = 3  # of a candidate: the slice's largest logit, the token's speed, its id


def candidates(
    logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, *, start: int
) -> Tensor:
    """What each row's slice of logits has to offer, [n, NUM_WORDS] float32.

    logits: [n, ids of this rank] float32, overwritten; start: the first of those ids. temperature:
    [n], 0 of greedy rows; seeds and positions: [n] int64. The speed is that of the token's segment
    in the race, as if the slice's largest logit were that of all.
    """
    found = logits.new_zeros(len(logits), NUM_WORDS)
    found[:, 0] = -torch.inf
    if not logits.shape[1]:
        return found
    found[:, 0], token_ids = logits.max(-1)
    drawing = (temperature > 0).nonzero()[:, 0]
    if len(drawing):
        peaks = found[drawing, :1].clamp(min=LOWEST)  # a slice may hold nothing but -inf
        weights = logits[drawing].sub_(peaks).div_(temperature[drawing, None]).exp_()
        weights = pad(weights, (0, -weights.shape[1] % SEGMENT))
        drawn, speeds = draw_with_speed(
            weights, seeds[drawing], positions[drawing], first_segment=start // SEGMENT
        )
        token_ids[drawing], found[drawing, 1] = drawn, speeds
    found[:, 2] = (token_ids + start).float()  # exact below 2^24
    return found


def join(parts: Tensor, temperature: Tensor) -> Tensor:
    """The winner of each row, [n] int64. parts: the candidates of all ranks, [ranks, n, NUM_WORDS].

    Of equal ones the first rank's, which has the lowest id.
    """
    peaks, speeds, token_ids = parts.unbind(-1)
    warm = temperature.clamp(min=torch.finfo(torch.float32).tiny)
    drawn = speeds * ((peaks - peaks.amax(0)) / warm).exp()
    winner = torch.where(temperature > 0, drawn, peaks).argmax(0, keepdim=True)
    return token_ids.gather(0, winner)[0].long()
