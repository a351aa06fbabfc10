"""What a grammar allows, on the device: the core's masks in a table, and what they do to logits.

`ModelRunner` brings the table up to date before it samples. `sampler` applies a step's masks after
the other edits; a grammar wins over them: where they leave nothing that it allows (`min_tokens` at
the end of an output, an `allowed_token_ids` beside it), they are undone.
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from nanovllm.protocol.plan import StepMasks, num_mask_lines


class MaskTable:
    """This device's copy of the core's masks, of which each step brings the lines that are new.

    words: [num_lines, num_words] int32: a bit per id, lowest first. They stay where they are, since
    CUDA graphs read them.
    """

    def __init__(self, *, vocab_size: int, max_num_seqs: int, device: torch.device) -> None:
        num_lines = num_mask_lines(vocab_size=vocab_size, max_num_seqs=max_num_seqs)
        shape = num_lines, -(-vocab_size // 32)
        self.words = torch.empty(shape, dtype=torch.int32, device=device)

    def take(self, masks: StepMasks) -> None:
        """Write the new lines, in stream order; those that follow one another by one copy."""
        lines = masks.new_lines
        if not lines:
            return
        shape, is_cuda = (len(lines), self.words.shape[1]), self.words.is_cuda
        # PyTorch uses no pinned memory for anything else before it has been copied.
        staged = torch.empty(shape, dtype=torch.int32, pin_memory=is_cuda)
        staged.numpy()[:] = np.frombuffer(masks.words, np.int32).reshape(shape)
        ends = [i for i in range(1, len(lines)) if lines[i] != lines[i - 1] + 1]
        for start, end in pairwise((0, *ends, len(lines))):
            to = self.words[lines[start] : lines[end - 1] + 1]
            to.copy_(staged[start:end], non_blocking=True)


def apply_masks(
    logits: Tensor, masks: StepMasks, table: MaskTable, unedited: dict[int, Tensor]
) -> None:
    """Forbid in place what the masks do not allow.

    logits: [num_targets, vocab_size]. table: has taken the masks, whose indices are targets.
    unedited: target → its logits before the other edits.
    """
    targets, lines = (torch.tensor(i, device=logits.device) for i in (masks.indices, masks.lines))
    bits = 1 << torch.arange(8, dtype=torch.uint8, device=logits.device)
    packed = table.words[lines].view(torch.uint8)
    allowed = packed[:, :, None].bitwise_and(bits) != 0  # [n, num_bytes, 8]
    forbidden = ~allowed.flatten(1)[:, : logits.shape[1]]
    logits[targets] = logits[targets].masked_fill(forbidden, -torch.inf)
    for index, target in enumerate(masks.indices):
        if target in unedited:
            nothing_left = logits[target].isneginf().all()
            plain = unedited[target].masked_fill(forbidden[index], -torch.inf)
            logits[target] = torch.where(nothing_left, plain, logits[target])
