"""The sampling parameters a device row carries, as one table.

A sampling parameter is a field of `SamplingParams`, a column here, and an op in `sampler`.
`RequestRows` derives its record, its host mirror and its staging from the table. Where a column is
neutral for every row of a batch, its op does not run.
"""

from dataclasses import dataclass
from struct import Struct
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

Int32Array = npt.NDArray[np.int32]
NO_LOGPROBS = -2  # -1 means the whole vocabulary
INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Column:
    """One 32-bit word of a row's record.

    name: the field of `SamplingParams`; a field that is None counts as neutral. neutral: the value
    that changes nothing. draws: it only shapes a random draw, so greedy rows hold it neutral.
    """

    name: str
    kind: Literal["f4", "i4"]
    neutral: float
    draws: bool = False


TRUNCATIONS = ("top_k", "top_p", "min_p")
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
# What a row asks of the second half of its steps, as bits.
PENALIZED, EDITED, TOLD = 1, 2, 4  # penalties; edits; log-probabilities
COLUMNS = (
    Column("temperature", "f4", 0.0, draws=True),  # neutral: greedy
    Column("top_k", "i4", 0, draws=True),
    Column("top_p", "f4", 1.0, draws=True),
    Column("min_p", "f4", 0.0, draws=True),
    Column("repetition_penalty", "f4", 1.0),
    Column("presence_penalty", "f4", 0.0),
    Column("frequency_penalty", "f4", 0.0),
    Column("logprobs", "i4", NO_LOGPROBS),
    Column("prompt_logprobs", "i4", NO_LOGPROBS),
)
# What a row carries besides: the key of its randomness, where its prompt ends, and how many of its
# tokens have been counted for penalties: none when it is admitted, later as the host's mirror says.
COUNTS = ("num_prompt_tokens", "num_counted")
RECORD = np.dtype(
    [("seed", "i8"), *((name, "i4") for name in COUNTS), *((c.name, c.kind) for c in COLUMNS)]
)
NEUTRAL: npt.NDArray[Any] = np.array([(0, 0, 0, *(c.neutral for c in COLUMNS))], RECORD)  # [1]
NUM_WORDS = RECORD.itemsize // 4
# A record as `struct` packs it, several times as fast as numpy fills one in.
PACKING = Struct(f"=q{len(COUNTS)}i" + "".join(column.kind[0] for column in COLUMNS))
AS_WORDS = Struct(f"={NUM_WORDS}i")
FIELDS = tuple((one.name, one.kind == "i4", one.neutral, one.draws) for one in COLUMNS)
TORCH_DTYPES = {"f4": torch.float32, "i4": torch.int32}


def word_offset(name: str) -> int:
    """Where a field starts in the record, in 32-bit words."""
    assert RECORD.fields is not None
    return int(RECORD.fields[name][1]) // 4
