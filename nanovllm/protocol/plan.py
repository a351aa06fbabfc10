"""What core and worker say to each other: one forward pass as a plan, its result, its failures.

Messages are msgspec structs, encoded positionally (`array_like`) as MessagePack. The scheduler
makes plans, executors run them; frontends see `WorkerInfo` in `Welcome` and `TokenLogprobs` in
`Outputs`.
"""

import signal
import struct
from array import array
from collections.abc import Iterator
from typing import Protocol

import msgspec

from nanovllm.sampling_params import SamplingParams


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probabilities at one position: the token's own, its rank from 1, and the top ones.

    Out of the garbage collector's sight, which would else look at hundreds of them every few steps.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class PositionLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`TokenLogprobs` of positions in a row, as the device has packed them.

    A prompt has thousands of positions: what stands between the device and the frontend that
    unpacks them passes them on as bytes.

    words: [num_positions, 3 + 2 * num_top] numbers of 32 bits in this machine's byte order: a
    token's id, log-probability (float32) and rank, the top ids, and their log-probabilities.
    """

    num_positions: int
    words: bytes

    @classmethod
    def of(cls, positions: list[TokenLogprobs]) -> "PositionLogprobs":
        """All have as many alternatives."""
        words = bytearray()
        for one in positions:
            num_top = len(one.top_ids)
            words += struct.pack(
                f"ifi{num_top}i{num_top}f",
                one.token_id,
                one.logprob,
                one.rank,
                *one.top_ids,
                *one.top_logprobs,
            )
        return cls(len(positions), bytes(words))

    def after(self, count: int) -> "PositionLogprobs":
        """But for the first `count` positions."""
        if count <= 0:
            return self
        left = max(0, self.num_positions - count)
        return PositionLogprobs(left, self.words[len(self.words) - left * self._num_bytes :])

    @property
    def num_logprobs(self) -> int:
        """Of all positions, alternatives counted."""
        return (len(self.words) // 4 - self.num_positions) // 2

    @property
    def _num_bytes(self) -> int:
        """Of a position."""
        return len(self.words) // max(1, self.num_positions)

    def __len__(self) -> int:
        return self.num_positions

    def __iter__(self) -> Iterator[TokenLogprobs]:
        size = self._num_bytes // 4
        middle = (3 + size) // 2  # where the ids end and their log-probabilities begin
        integers, reals = array("i", self.words).tolist(), array("f", self.words).tolist()
        for start in range(0, len(integers), size or 1):
            yield TokenLogprobs(
                integers[start],
                reals[start + 1],
                integers[start + 2],
                integers[start + 3 : start + middle],
                reals[start + middle : start + size],
            )


class NewRow(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that takes (or, preempted before, takes again) a device row.

    `token_ids` are all known tokens: the prompt, then outputs so far. `block_ids` is its block
    table: `len(WorkerInfo.kv_windows)` entries for each block of tokens, 0 where there is none.
    """

    row: int
    token_ids: list[int]
    num_prompt_tokens: int
    block_ids: list[int]
    params: SamplingParams
    seed: int
    bad_words_token_ids: list[list[int]]


class BlockAppend(msgspec.Struct, frozen=True, array_like=True):
    """`block_id` becomes entry `index` of the row's block table."""

    row: int
    index: int
    block_id: int


class KnownTokens(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of a row from `position` on, which this worker has not sampled: the row's grammar left
    no choice, or another stage of a pipeline has sampled it."""

    row: int
    position: int
    token_ids: list[int]


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """One forward pass, in counts. Parallel lists, one entry per row that runs.

    Entry i runs `num_scheduled[i]` tokens of row `rows[i]` from position `num_computed[i]` on.
    `sampling` lists the entries (indices into `rows`) whose last token is sampled from: the worker
    stores the sampled id at position `num_computed[i] + num_scheduled[i]` of that row.
    Order of effects: new_rows, block_appends, known_tokens, then the forward pass.
    """

    step: int
    new_rows: list[NewRow]
    block_appends: list[BlockAppend]
    rows: list[int]
    num_computed: list[int]
    num_scheduled: list[int]
    sampling: list[int]
    known_tokens: list[KnownTokens] = []


MAX_MASK_BYTES = 64 << 20  # of a worker's table, unless so many rows need more
MAX_MASK_LINES = 16_384  # of it


class StepMasks(msgspec.Struct, frozen=True, array_like=True):
    """What the constrained rows of a step may sample: its second half waits for them.

    `indices` are those of the masked entries in `plan.sampling`; others are free. `lines[i]` says
    where the mask of the i-th of them lies in a table of `num_mask_lines`, of which every worker
    has a copy. `new_lines` have been written since they were sent last; `words` holds them one
    behind the other: a bit per id in little-endian 32-bit words.
    """

    indices: list[int]
    lines: list[int]
    new_lines: list[int]
    words: memoryview


def num_mask_lines(*, vocab_size: int, max_num_seqs: int) -> int:
    """How many lines the table of masks has. The core keeps masks in all but the last
    `max_num_seqs`, which are for those of one step alone."""
    num_bytes = 4 * -(-vocab_size // 32)
    return max(2 * max_num_seqs, min(MAX_MASK_LINES, MAX_MASK_BYTES // num_bytes))


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """`token_ids[j]` was sampled for `plan.sampling[j]`.

    `logprobs` maps such a j to that token's log-probabilities; `prompt_logprobs` maps an entry i
    of the plan to those of the prompt tokens at positions `num_computed[i] + 1 …` of this chunk.
    `failures` maps a j to why no token could be chosen there alone; `token_ids[j]` means nothing.
    """

    step: int
    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = {}
    prompt_logprobs: dict[int, PositionLogprobs] = {}
    failures: dict[int, str] = {}


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts found at start, by whoever owns the device.

    `num_blocks` includes block 0, which is reserved for padding and never handed out. `kv_windows`
    tell, of each group of layers that has block tables of its own, how many tokens it sees.
    `num_first_blocks`: how many are to be used before others are touched, if memory that was never
    written costs nothing; None: all are alike.
    `sampling_defaults`: fields of `SamplingParams` as the checkpoint wants them by default.
    `notes` say in plain words what was chosen and why; `phase_seconds` how long each phase took;
    `memory_bytes` what weights, heaviest step and KV cache take, as far as it was measured.
    """

    device: str
    dtype: str
    attention_backend: str
    architecture: str
    num_blocks: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    num_parameters: int = 0
    kv_cache_bytes: int = 0
    kv_windows: tuple[int | None, ...] = (None,)
    num_first_blocks: int | None = None
    sampling_defaults: dict[str, int | float] = {}
    notes: list[str] = []
    phase_seconds: dict[str, float] = {}
    memory_bytes: dict[str, int] = {}


# Signals that a process causes itself; others are sent from outside.
FAULTS = {
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGSEGV,
    signal.SIGSYS,
    signal.SIGTRAP,
}


class StepFailedError(RuntimeError):
    """A step failed, and its requests with it; the worker is fit for the next one."""


class DeviceLostError(RuntimeError):
    """No step can run any more: the device, or the process that owns it, is gone. Ends the core;
    any other exception of a step fails the sequences of that step. from_outside: no step can have
    been the cause."""

    def __init__(self, message: str = "", *, from_outside: bool = False) -> None:
        super().__init__(message)
        self.from_outside = from_outside


class ProgressCallback(Protocol):
    """Called often while loading: the phase's name and how far it is, in [0, 1]."""

    def __call__(self, phase: str, progress: float) -> None: ...


class StepHandle(Protocol):
    """A submitted step."""

    def result(self) -> StepResult:
        """Block until the step has run, both halves. Raises what it raised, or `DeviceLostError`.

        The plan's rows and block tables must have been taken in then, so that the steps submitted
        after it stay within their own blocks; the KV and ids of this step's rows are lost.
        """
