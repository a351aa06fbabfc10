"""What one forward pass reads: flat tokens, their rows, and where their KV lives.

Built by `model_runner` from a `StepPlan`; passed explicitly to the model, every layer and the
attention backend. All tensors are on the device; host integers bound what kernels loop over.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class ForwardBatch:
    """One step. Tokens of a row are consecutive; `max_query_len == 1` is a pure decode step.

    Slot `s` of the KV cache is offset `s % block_size` of block `s // block_size`. Padding tokens
    and rows point at block 0, which no sequence owns.
    """

    input_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    slot_mapping: Tensor  # [num_tokens] int64
    query_start_loc: Tensor  # [num_rows + 1] int32: row i owns tokens [i] … [i + 1]
    seq_lens: Tensor  # [num_rows] int32: context of each row, this step's tokens included
    block_tables: Tensor  # [num_rows, max_num_blocks] int32
    num_tokens: int
    num_rows: int
    max_query_len: int
    max_seq_len: int
