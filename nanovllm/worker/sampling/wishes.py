"""What the entries of a step ask of its second half, as words that kernels read.

`device_sampler` writes them on the host, and one copy brings them to the device, where they always
lie in the same place, so that CUDA graphs find them. Behind `HEAD` words come `NUM_FIELDS` lists of
as many words each; where there is no entry, no table or no mask, the word is `NOTHING`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

HEAD = 8
# In the head: addresses, of two words each, and the most alternatives that an entry wants.
LOGITS, TABLES, MASKS, MOST = 0, 2, 4, 6
# Of entries whose tokens are chosen anew: their line of the step's logits, where their table of
# edits begins, their mask's line, their row, the position of their next token, and how many tokens
# have been counted of the row. Of entries that want log-probabilities: their line, and how many
# alternatives.
LINE, TABLE, MASK, ROW, POSITION, COUNTED, TOLD_LINE, NUM_TOP = range(8)
NUM_FIELDS = 8
NOTHING = -1


def num_words(size: int) -> int:
    """Of lists of so many entries."""
    return HEAD + NUM_FIELDS * size


@dataclass(frozen=True, slots=True)
class Wishes:
    """Those of a step, on the device.

    words: [HEAD + NUM_FIELDS * size] int32. dtype, stride: of the logits whose address is in the
    head, [n, vocab_size], which kernels are compiled for. has_edits: whether any entry has a table.
    """

    words: Tensor
    size: int
    dtype: torch.dtype
    stride: int
    vocab_size: int
    has_edits: bool

    @property
    def num_mask_words(self) -> int:
        """From one mask to the next."""
        return -(-self.vocab_size // 32)

    def field(self, number: int) -> Tensor:
        """[size] int32."""
        start = HEAD + number * self.size
        return self.words[start : start + self.size]
