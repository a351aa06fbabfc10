"""What a grammar allows, on the device: a step's masks become the only finite logits of their rows.

`sampler` calls it after the other edits. A grammar wins over them: where they leave nothing that it
allows (`min_tokens` at the end of an output, an `allowed_token_ids` beside it), they are undone.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm.protocol.plan import StepMasks
from nanovllm.worker.sampling.columns import Int32Array


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """For n of the targets of a step, the ids they may sample."""

    targets: list[int]
    allowed: Tensor  # [n, vocab_size] bool


def mask_words(masks: StepMasks) -> Int32Array:
    """[n, num_words], without a copy."""
    return np.frombuffer(masks.words, np.int32).reshape(len(masks.indices), -1)


def unpack_masks(masks: StepMasks, *, vocab_size: int, device: torch.device) -> TokenMasks:
    """What `apply_masks` takes."""
    packed = torch.from_numpy(mask_words(masks).view(np.uint8).copy()).to(device)
    bits = 1 << torch.arange(8, dtype=torch.uint8, device=device)
    allowed = packed[:, :, None].bitwise_and(bits) != 0  # [n, num_bytes, 8]
    return TokenMasks(masks.indices, allowed.flatten(1)[:, :vocab_size])


def apply_masks(logits: Tensor, masks: TokenMasks, unedited: dict[int, Tensor]) -> None:
    """Forbid in place what the masks do not allow.

    logits: [num_targets, vocab_size]. unedited: target → its logits before the other edits.
    """
    if len(masks.targets) == len(logits):  # they are in order, so this is every target
        logits.masked_fill_(~masks.allowed, -torch.inf)
    else:
        indices = torch.tensor(masks.targets, device=logits.device)
        logits[indices] = logits[indices].masked_fill(~masks.allowed, -torch.inf)
    for index, target in enumerate(masks.targets):
        if target in unedited:
            nothing_left = logits[target].isneginf().all()
            plain = unedited[target].masked_fill(~masks.allowed[index], -torch.inf)
            logits[target] = torch.where(nothing_left, plain, logits[target])
