"""An executor without a device that still has KV: it models what every cache slot holds.

A token's "KV" is a digest of all tokens up to it, so the id sampled at a position proves that every
slot the sequence may attend to was written by the right tokens, in the right order, and by nobody
since. Steps run when their result is asked for, or all before it, in submission order: as late as
a device could be.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import xxhash

from nanovllm.config import EngineConfig
from nanovllm.core.grammar import GrammarCompiler, Matcher
from nanovllm.executor.group import SampledElsewhere
from nanovllm.protocol.plan import NewRow, StepMasks, StepPlan, StepResult, WorkerInfo

VOCAB_SIZE = 1000


def digest(parent: bytes, token_id: int) -> bytes:
    return xxhash.xxh3_64_digest(parent + token_id.to_bytes(4, "little"))


def sample(digest_: bytes, seed: int, mask: bytes | None = None) -> int:
    number = int.from_bytes(xxhash.xxh3_64_digest(digest_, seed=seed), "little")
    if mask is None:
        return number % VOCAB_SIZE
    allowed = allowed_ids(mask)
    return allowed[number % len(allowed)]


def allowed_ids(mask: bytes) -> list[int]:
    """The bits that are set."""
    return np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")).tolist()


class SentLines(dict[int, bytes]):
    """What a worker keeps of the table of masks: lines as they were sent last."""

    def take(self, masks: StepMasks | None) -> dict[int, bytes]:
        """Each mask of a step, by its index."""
        if masks is None:
            return {}
        width = len(masks.words) // max(1, len(masks.new_lines))
        for place, line in enumerate(masks.new_lines):
            self[line] = bytes(masks.words[place * width : (place + 1) * width])
        return {j: self[line] for j, line in zip(masks.indices, masks.lines, strict=True)}


def reference(
    prompt: list[int],
    seed: int,
    num_outputs: int,
    stop: frozenset[int],
    constraint: tuple[GrammarCompiler, Matcher] | None = None,
) -> list[int]:
    """What one sequence alone must produce. constraint: a matcher of its own, and who made it."""
    state, mask = b"", None
    for token_id in prompt:
        state = digest(state, token_id)
    outputs: list[int] = []
    while len(outputs) < num_outputs and not (outputs and outputs[-1] in stop):
        if constraint is not None:
            compiler, matcher = constraint
            mask = compiler.compute_masks([matcher])[0].tobytes()
        outputs.append(sample(state, seed, mask))
        state = digest(state, outputs[-1])
        if constraint is not None and not matcher.accept(outputs[-1]):
            break
    return outputs


class FakeHandle:
    def __init__(self, executor: "FakeExecutor", plan: StepPlan) -> None:
        self._executor = executor
        self._plan = plan

    def result(self) -> StepResult:
        result = self._executor.run_until(self._plan.step)
        if isinstance(result, StepFailedError):
            raise result
        return result


class StepFailedError(RuntimeError):
    """What a step is made to fail of."""


LOST = b"lost"  # the KV of a step that failed, and of all that was computed on top of it


class FakeExecutor:
    """`submit` and `sample` only queue; the device's rows and slots change when a step is run.

    fails(plan) may say "submit", "sample" or "result": there it raises, and the step's KV and ids
    are lost.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_blocks: int,
        max_model_len: int,
        fails: Callable[[StepPlan], str] = lambda plan: "",
        windows: tuple[int | None, ...] = (None,),
    ) -> None:
        self._windows = windows
        self._fails = fails
        self._lost_rows: set[int] = set()
        self._failing: set[int] = set()
        self._block_size = config.cache.block_size
        self._max_seqs = config.scheduler.max_num_seqs
        self._budget = config.scheduler.limits("fake").max_num_batched_tokens
        self._num_blocks = num_blocks
        self._max_model_len = max_model_len
        self._queue: deque[tuple[StepPlan, dict[int, bytes]]] = deque()
        self._unsampled: StepPlan | None = None
        self._masks: dict[int, bytes] = {}  # of the step that runs
        self._lines = SentLines()
        self._results: dict[int, StepResult | StepFailedError] = {}
        self._slots: list[bytes | None] = [None] * (num_blocks * self._block_size)
        self._rows: dict[int, NewRow] = {}
        self._tokens: dict[int, list[int]] = {}
        self._tables: dict[int, list[int]] = {}

    def start(self) -> WorkerInfo:
        return WorkerInfo(
            device="fake",
            dtype="none",
            attention_backend="none",
            architecture="Fake",
            num_blocks=self._num_blocks,
            max_model_len=self._max_model_len,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=[0],
            kv_windows=self._windows,
        )

    def allocate(self, num_blocks: int) -> None:
        assert num_blocks == self._num_blocks

    def warm_up(self) -> bool:
        return False

    def check(self) -> None:
        """There is no device."""

    def submit(self, plan: StepPlan) -> FakeHandle:
        assert len(plan.rows) == len(set(plan.rows)) <= self._max_seqs
        assert 0 < sum(plan.num_scheduled) <= self._budget
        where = self._fails(plan)
        if where == "submit":
            raise StepFailedError(f"step {plan.step} cannot be submitted")
        if where == "result":
            self._failing.add(plan.step)
        assert self._unsampled is None, "the step before has not been sampled"
        self._unsampled = plan
        return FakeHandle(self, plan)

    def sample(self, step: int, masks: StepMasks | None) -> None:
        plan, self._unsampled = self._unsampled, None
        assert plan is not None and plan.step == step, "the last step submitted is sampled, once"
        if self._fails(plan) == "sample":
            # Its forward pass has run.
            self._failing.add(plan.step)
            self._queue.append((plan, {}))
            raise StepFailedError(f"step {plan.step} cannot be sampled")
        self._queue.append((plan, self._lines.take(masks)))

    def shutdown(self) -> None:
        self._queue.clear()

    def run_until(self, step: int) -> StepResult | StepFailedError:
        while step not in self._results:
            assert self._queue, "the result of a step that has not been sampled"
            plan, self._masks = self._queue.popleft()
            self._results[plan.step] = self._run(plan)
        return self._results.pop(step)

    def _take_in(self, plan: StepPlan) -> None:
        """What a plan tells of rows."""
        for new in plan.new_rows:
            assert 0 <= new.row < self._max_seqs
            self._rows[new.row] = new
            self._lost_rows.discard(new.row)
            self._tokens[new.row] = list(new.token_ids)
            self._tables[new.row] = list(new.block_ids)
        for append in plan.block_appends:
            table = self._tables[append.row]
            table += [0] * (append.index + 1 - len(table))
            assert not table[append.index] and append.block_id
            table[append.index] = append.block_id
        for known in plan.known_tokens:
            del self._tokens[known.row][known.position :]  # what it has sampled, at most
            assert known.position == len(self._tokens[known.row])
            self._tokens[known.row] += known.token_ids

    def _run(self, plan: StepPlan) -> StepResult | StepFailedError:
        self._take_in(plan)
        if plan.step in self._failing:
            self._lost_rows.update(plan.rows)
        entries = list(zip(plan.rows, plan.num_computed, plan.num_scheduled, strict=True))
        written: set[int] = set()
        # Two passes, as a layer does it: every row writes its KV before any row attends.
        for row, start, count in entries:
            for position in range(start, start + count):
                for slot in self._slots_of(row, position):
                    assert slot not in written, "two rows write one slot in one step"
                    written.add(slot)
        for row, start, count in entries:
            self._write(row, start, count)
        for row, start, _ in entries:
            if row not in self._lost_rows:
                self._attend(row, start + 1, windows_only=True)
        sampled = []
        assert self._masks.keys() <= set(range(len(plan.sampling)))
        for index, entry in enumerate(plan.sampling):
            row, start, count = entries[entry]
            token_id = self._sample(row, start + count, self._masks.get(index))
            self._tokens[row].append(token_id)
            sampled.append(token_id)
        if plan.step in self._failing:
            return StepFailedError(f"step {plan.step} has failed")
        return StepResult(plan.step, sampled)

    def _write(self, row: int, start: int, count: int) -> None:
        state = self._state_before(row, start)
        if state == LOST:
            self._lost_rows.add(row)
        for position in range(start, start + count):
            assert state is not None, "the KV before this token was never written"
            lost = row in self._lost_rows
            state = LOST if lost else digest(state, self._tokens[row][position])
            for slot in self._slots_of(row, position):
                self._slots[slot] = state

    def _state_before(self, row: int, position: int) -> bytes | None:
        """Of all tokens before `position`, by what their slots hold; lost if any group's is."""
        if not position:
            return b""
        groups = range(len(self._windows))
        found = {self._slots[self._slot(row, position - 1, group)] for group in groups}
        return LOST if LOST in found else found.pop()

    def _sample(self, row: int, end: int, mask: bytes | None) -> int:
        assert end == len(self._tokens[row]), "sampled before the last known token"
        if row in self._lost_rows:
            return 1
        return sample(self._attend(row, end), self._rows[row].seed, mask)

    def _attend(self, row: int, end: int, *, windows_only: bool = False) -> bytes:
        """Check every slot that the last token sees, and return what its own should hold."""
        state = b""
        groups = [g for g, window in enumerate(self._windows) if window or not windows_only]
        for position in range(end) if groups else ():
            state = digest(state, self._tokens[row][position])
            for group in groups:
                if position > end - 1 - (self._windows[group] or end):
                    slot = self._slots[self._slot(row, position, group)]
                    assert slot == state, f"wrong KV at {position} of group {group}"
        return state

    def _slots_of(self, row: int, position: int) -> list[int]:
        return [self._slot(row, position, group) for group in range(len(self._windows))]

    def _slot(self, row: int, position: int, group: int) -> int:
        column = position // self._block_size
        block_id = self._tables[row][column * len(self._windows) + group]
        assert 0 < block_id < self._num_blocks, "block 0 is for padding only"
        return block_id * self._block_size + position % self._block_size


class FakeFirstStage(FakeExecutor):
    """The first stage of a pipeline, which samples nothing: of ids it knows what plans tell, and a
    group tells them with the plan that follows the result."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._sampled = SampledElsewhere()

    def submit(self, plan: StepPlan) -> FakeHandle:
        return super().submit(self._sampled.told_in(plan))

    def run_until(self, step: int) -> StepResult | StepFailedError:
        result = super().run_until(step)
        assert isinstance(result, StepResult)
        self._sampled.take(result)
        return result

    def _run(self, plan: StepPlan) -> StepResult | StepFailedError:
        result = super()._run(plan)
        for entry in plan.sampling:
            self._tokens[plan.rows[entry]].pop()
        return result
