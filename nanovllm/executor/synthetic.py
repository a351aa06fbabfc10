"""A model that costs a fixed time per step and computes nothing: it loads the protocol alone.

`launch` chooses it for load_format="synthetic". Each sampled id is a pure function of the seed and
of every token before it, so a stream that was resumed with one wrong, lost or repeated token ends
differently. Log-probabilities are made up the same way.
"""

import time

import numpy as np
import numpy.typing as npt

from nanovllm.config import EngineConfig
from nanovllm.protocol.plan import (
    NewRow,
    PositionLogprobs,
    ProgressCallback,
    StepMasks,
    StepPlan,
    StepResult,
    TokenLogprobs,
    WorkerInfo,
)

DEFAULT_MAX_MODEL_LEN = 8192
DEFAULT_NUM_BLOCKS = 65_536
EOS = 0
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: a row's state is a polynomial in it, modulo 2^64

UInt64Array = npt.NDArray[np.uint64]


class SyntheticExecutor:
    """An `executor.base.Executor` that needs no device. A row's state hashes all its tokens."""

    def __init__(self, config: EngineConfig, on_progress: ProgressCallback) -> None:
        self._config = config
        self._on_progress = on_progress
        self._vocab_size = config.synthetic.vocab_size
        self._step_s = config.synthetic.step_ms / 1e3
        num_rows = config.scheduler.max_num_seqs
        self._states = np.zeros(num_rows, np.uint64)
        self._seeds = np.zeros(num_rows, np.uint64)
        self._before = np.zeros(num_rows, np.uint64)  # the states, but for what was sampled last
        self._rows: dict[int, NewRow] = {}  # those that want log-probabilities
        self._free_at = 0.0  # when the step before will have run
        self._last: SyntheticStep | None = None  # the last one, between its halves

    def start(self) -> WorkerInfo:
        """Nothing to load."""
        self._on_progress("synthetic", 1.0)
        return WorkerInfo(
            device="synthetic",
            dtype="none",
            attention_backend="none",
            architecture="synthetic",
            num_blocks=self._config.cache.num_gpu_blocks_override or DEFAULT_NUM_BLOCKS,
            max_model_len=self._config.model.max_model_len or DEFAULT_MAX_MODEL_LEN,
            vocab_size=self._vocab_size,
            eos_token_ids=[EOS],
            notes=[f"synthetic: steps of {self._config.synthetic.step_ms:g} ms compute nothing"],
        )

    def allocate(self, num_blocks: int) -> None:
        """No KV is kept."""

    def submit(self, plan: StepPlan) -> "SyntheticStep":
        """Take the plan's new rows in; the step's time begins."""
        for new in plan.new_rows:
            self._rows.pop(new.row, None)
            if new.params.logprobs is not None or new.params.prompt_logprobs is not None:
                self._rows[new.row] = new
            self._states[new.row] = hash_tokens(np.array(new.token_ids, np.uint64))
            # As with a real model, the seed of a greedy request changes nothing.
            self._seeds[new.row] = 0 if new.params.greedy else new.seed
        for known in plan.known_tokens:  # in place of what was sampled last
            state = self._before[known.row : known.row + 1]
            for token_id in known.token_ids:
                state = state * BASE + np.uint64(token_id + 1)
            self._states[known.row] = state[0]
        self._free_at = max(self._free_at, time.monotonic()) + self._step_s
        self._last = SyntheticStep(plan, self._free_at)
        return self._last

    def sample(self, step: int, masks: StepMasks | None) -> None:
        """Sample at once, whatever is allowed; the handle gives it out when its time has passed."""
        last = self._last
        assert last is not None and last.plan.step == step
        plan, self._last = last.plan, None
        sampled = [plan.rows[index] for index in plan.sampling]
        rows = np.array(sampled, np.intp)
        states = self._states[rows]
        noise = scramble(states ^ scramble(self._seeds[rows]))
        token_ids = noise % np.uint64(self._vocab_size)
        self._before[rows] = states
        self._states[rows] = states * BASE + token_ids + np.uint64(1)
        ids: list[int] = token_ids.tolist()
        last.sampled = StepResult(
            plan.step,
            ids,
            self._logprobs(sampled, ids, noise),
            self._prompt_logprobs(plan),
        )

    def ids_begun(self, plan: StepPlan) -> list[int]:
        """The states of its rows, which stand for the ids before."""
        states: list[int] = self._states[plan.rows].view(np.int64).tolist()
        return states

    def warm_up(self) -> bool:
        """Nothing gets faster by practice."""
        return False

    def check(self) -> None:
        """There is no device."""

    def shutdown(self) -> None:
        """Nothing to free."""

    def _logprobs(
        self, rows: list[int], token_ids: list[int], noise: UInt64Array
    ) -> dict[int, TokenLogprobs]:
        found: dict[int, TokenLogprobs] = {}
        for index, row in enumerate(rows) if self._rows else ():
            new = self._rows.get(row)
            if new is not None and (wanted := new.params.logprobs) is not None:
                found[index] = self._made_up(token_ids[index], int(noise[index]), wanted)
        return found

    def _prompt_logprobs(self, plan: StepPlan) -> dict[int, PositionLogprobs]:
        found: dict[int, PositionLogprobs] = {}
        for entry, row in enumerate(plan.rows) if self._rows else ():
            new = self._rows.get(row)
            if new is None or (wanted := new.params.prompt_logprobs) is None:
                continue
            start = plan.num_computed[entry] + 1
            end = min(start + plan.num_scheduled[entry], new.num_prompt_tokens)
            if start < end:
                found[entry] = PositionLogprobs.of(
                    [
                        self._made_up(new.token_ids[position], position, wanted)
                        for position in range(start, end)
                    ]
                )
        return found

    def _made_up(self, token_id: int, noise: int, num_top: int) -> TokenLogprobs:
        """The token is always the likeliest; -1 asks for the whole vocabulary."""
        if num_top < 0:
            num_top = self._vocab_size
        first = -(1 + noise % 1000) / 1000
        top_ids = [(token_id + index) % self._vocab_size for index in range(num_top)]
        return TokenLogprobs(token_id, first, 1, top_ids, [first - i for i in range(num_top)])


class SyntheticStep:
    """A step that is over at `due`, on the monotonic clock."""

    __slots__ = ("_due", "plan", "sampled")

    def __init__(self, plan: StepPlan, due: float) -> None:
        self.plan = plan
        self.sampled: StepResult | None = None  # after its second half
        self._due = due

    @property
    def is_over(self) -> bool:
        """Whether its time has passed."""
        return time.monotonic() >= self._due

    def result(self) -> StepResult:
        assert self.sampled is not None
        remaining = self._due - time.monotonic()
        if remaining > 0:
            time.sleep(remaining)
        return self.sampled


def hash_tokens(token_ids: UInt64Array) -> np.uint64:
    """What a row's state becomes after these tokens: sum of (id + 1) * BASE^(distance to end)."""
    if len(token_ids) == 0:
        return np.uint64(0)
    powers = np.full(len(token_ids), BASE, np.uint64)
    powers[0] = 1
    powers = np.multiply.accumulate(powers)[::-1]
    return np.uint64(((token_ids + np.uint64(1)) * powers).sum(dtype=np.uint64))


def scramble(words: UInt64Array) -> UInt64Array:
    """The output function of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
