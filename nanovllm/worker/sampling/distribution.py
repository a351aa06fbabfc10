"""From logits to one id per row: temperature, min-p, top-k, top-p, and a race.

`sampler` calls it for the rows that are not greedy. Every truncation is a floor: probabilities that
equal it all stay, so what survives does not hang on how a sort breaks ties. Truncated rows are not
renormalized; mass is compared with their own total. No result depends on the other rows.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from nanovllm.worker.parallel import SEGMENT
from nanovllm.worker.sampling.philox import uniforms

BLOCK = 64  # tokens of which only the largest is looked at, first, when the likeliest are sought
NUM_CANDIDATES = 128  # most likely tokens looked at before a nucleus is searched in all of them


def to_probabilities(logits: Tensor, temperature: Tensor) -> Tensor:
    """softmax(logits / temperature), padded with zeros to whole segments; overwrites `logits`.

    logits: [n, vocab_size] float32; temperature: [n]. Returns [n, num_segments * SEGMENT].
    """
    probs = logits.div_(temperature[:, None]).softmax(-1)
    padding = -probs.shape[1] % SEGMENT
    return pad(probs, (0, padding)) if padding else probs


def truncate_min_p(probs: Tensor, min_p: Tensor) -> Tensor:
    """Keep tokens at least `min_p` times as likely as the likeliest (min_p: [n])."""
    return _keep_from(probs, probs.amax(-1, keepdim=True) * min_p[:, None])


def truncate_top_k(probs: Tensor, top_k: Tensor, *, most: int) -> Tensor:
    """Keep the `top_k` likeliest tokens of each row (top_k: [n]; 0 is off; `most`: the largest)."""
    values = _largest(probs, min(most, probs.shape[1]))
    rank = top_k.long().clamp(1, values.shape[1])[:, None] - 1
    return _keep_from(probs, values.gather(1, rank) * (top_k > 0)[:, None])


def truncate_top_p(probs: Tensor, top_p: Tensor) -> Tensor:
    """Keep the fewest likeliest tokens that hold `top_p` ([n]) of a row's mass: the nucleus.

    Holtzman et al., "The curious case of neural text degeneration", 2020.
    """
    needed = top_p.double() * _blocks(probs).sum(-1).sum(-1, dtype=torch.float64)  # [n]
    # A look at the top settles most rows. CUDA sorts all: asking whether it did would wait.
    on_cpu = probs.device.type == "cpu"
    values = _largest(probs, NUM_CANDIDATES if on_cpu else probs.shape[1])
    mass = values.cumsum(-1, dtype=torch.float64)
    last = torch.searchsorted(mass, needed[:, None]).clamp_(max=values.shape[1] - 1)
    floors = values.gather(1, last) * (top_p < 1)[:, None]
    if on_cpu:
        unsettled = (mass[:, -1] < needed) & (values[:, -1] > 0) & (top_p < 1)
        for row in unsettled.nonzero()[:, 0].tolist():
            floors[row] = _nucleus_floor(probs[row], needed[row].item(), top_p[row].item())
    return _keep_from(probs, floors)


def draw(probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """A token of each row, with its probability; a function of (row, seed, position), [n] int64.

    probs: [n, num_segments * SEGMENT]; seeds and positions: [n] int64. Whoever comes first in a
    race wins: one of mass m takes a time that is exponential with rate m (Gumbel-max, in logs).
    Rounding of the probabilities changes who wins as rarely as a draw can be changed by it: noise
    belongs to a token, where an inverse CDF would shift all that lie behind. First segments race,
    then the tokens of the winner, which is the same distribution for a hundredth of the noise:
    numbers 0 … SEGMENT - 1 are the places' in a segment, the others the segments'.
    """
    return draw_with_speed(probs, seeds, positions, first_segment=0)[0]


def draw_with_speed(
    masses: Tensor, seeds: Tensor, positions: Tensor, *, first_segment: int
) -> tuple[Tensor, Tensor]:
    """`draw` from a slice of the vocabulary that begins with a segment.

    masses: [n, num_segments * SEGMENT], of any total. Also returns what the winner's segment has
    won by, to be compared with those of other slices: its mass over its time, [n].
    """
    segments = masses.view(masses.shape[0], -1, SEGMENT)
    of_segments = segments.sum(-1)  # [n, num_segments]
    first = SEGMENT + first_segment
    count = first + of_segments.shape[1]
    times = uniforms(seeds, positions, count).log_().neg_().float()
    speed, segment = (of_segments / times[:, first:]).max(-1)
    tokens = segments.gather(1, segment[:, None, None].expand(-1, -1, SEGMENT))[:, 0]
    return segment * SEGMENT + (tokens / times[:, :SEGMENT]).argmax(-1), speed


def _blocks(probs: Tensor) -> Tensor:
    return probs.view(probs.shape[0], -1, BLOCK)


def _keep_from(probs: Tensor, floors: Tensor) -> Tensor:
    """Zero what lies below its row's floor, in place. floors: [n, 1]."""
    # Compared into floats: on a CPU several times faster than through a mask of booleans.
    return probs.mul_(torch.ge(probs, floors, out=torch.empty_like(probs)))


def _largest(probs: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, descending, [n, min(count, width)].

    They lie in the `count` blocks of largest maximum: looking only there saves most of the work.
    """
    num_rows, width = probs.shape
    if 4 * count * BLOCK > width:
        return probs.topk(min(count, width), dim=-1).values
    blocks = _blocks(probs)
    chosen = blocks.amax(-1).topk(count, dim=-1, sorted=False).indices
    inside = blocks.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK)).view(num_rows, -1)
    return inside.topk(count, dim=-1).values


def _nucleus_floor(probs: Tensor, needed: float, top_p: float) -> float:
    """The smallest probability in one row's nucleus, however wide it is. probs: [width]."""
    values = probs.numpy()
    # All below this hold less than 1 - top_p of the mass together: none is in the nucleus.
    negligible = needed / top_p * (1 - top_p) / len(values)
    values = np.sort(values[values >= negligible])[::-1]
    mass = np.cumsum(values, dtype=np.float64)
    return float(values[min(int(np.searchsorted(mass, needed)), len(values) - 1)])
