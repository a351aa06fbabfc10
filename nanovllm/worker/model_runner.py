"""One step, from plan to pending result; orchestration only.

`Worker` calls it with plans in order. On CUDA nothing here waits for the device: work and
copies are queued on one stream, and `PendingStep.result` waits for that step's event.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nanovllm.config import StepLimits
from nanovllm.protocol.plan import StepMasks, StepPlan, StepResult
from nanovllm.worker.attention.base import ModelAttention
from nanovllm.worker.attention.shared_prefix import PrefixFinder, reads_new_blocks
from nanovllm.worker.cuda_graph import (
    CallGraphs,
    CudaGraphs,
    StepGraphs,
    StepOutput,
    StepShape,
    Variant,
)
from nanovllm.worker.failures import wait_for
from nanovllm.worker.forward_batch import (
    ROOMS,
    ForwardBatch,
    PlanEntries,
    PlanStaging,
    SampleSlot,
    StagedPlan,
    build_batch,
)
from nanovllm.worker.kernels.base import Residual
from nanovllm.worker.kernels.select import FusedStep
from nanovllm.worker.sampling.columns import NEUTRAL, NO_LOGPROBS, TRUNCATIONS, Int32Array
from nanovllm.worker.sampling.device_sampler import DeviceSampler
from nanovllm.worker.sampling.logprobs import PackedLogprobs, joined
from nanovllm.worker.sampling.sampler import OnHost, Sampler, SamplingTargets
from nanovllm.worker.stage_link import StageLink

MAX_LOGIT_ROWS = 256  # prompt positions whose logits are in memory at once
NOT_SAMPLED = OnHost(np.empty(0, np.int64))


class Model(Protocol):
    """What the runner asks of a model (`models.decoder.Decoder`). link: to the other stages, of a
    stage of a pipeline."""

    @property
    def link(self) -> StageLink | None: ...

    def forward(
        self, batch: ForwardBatch, kv_cache: Tensor, *, wanted: Tensor | None = None
    ) -> Residual:
        """What the last layer leaves of the `wanted` tokens ([n] int64; None: of all)."""

    def compute_logits(self, residual: Residual) -> Tensor:
        """residual: of n tokens. Returns new memory, [n, vocab_size] float32."""

    def raw_logits(self, residual: Residual) -> Tensor:
        """`compute_logits` in the model's own precision, as a fused sampler takes them."""

    def own_logits(self, residual: Residual) -> Tensor:
        """`raw_logits` of this rank's ids alone: all of them, if it is the only one."""


class PromptEntry(NamedTuple):
    """An entry of a plan that wants log-probabilities of prompt tokens which this step reaches."""

    entry: int
    first: int  # the first such token's position in its row, and the end
    end: int
    num_top: int


@dataclass(slots=True)
class PendingStep:
    """A step under way (a `protocol.plan.StepHandle`), between its halves or behind both.

    rows, positions: where the tokens go that are sampled. logits: for the second half. sampled:
    what that leaves, in memory of the slot if there is one. prompt_logprobs: entry of the plan →
    its prompt positions.
    """

    step: int
    rows: Int32Array  # [num_samples]
    positions: Int32Array  # [num_samples]
    logits: Tensor | None = None  # [num_samples or more, vocab_size or this rank's]
    sampled: OnHost | None = None
    slot: SampleSlot | None = None
    prompt_logprobs: dict[int, list[PackedLogprobs]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)  # as `StepResult.failures`
    done: torch.Event | None = None

    @property
    def is_over(self) -> bool:
        """Whether `result` would not wait."""
        return self.done is None or bool(self.done.query())

    def result(self) -> StepResult:
        """Wait for this step, and for nothing queued after it. To be asked once."""
        if self.done is not None:
            wait_for(self.done)
        sampled = self.sampled or NOT_SAMPLED
        result = StepResult(
            step=self.step,
            token_ids=sampled.token_ids.tolist(),
            logprobs=sampled.unpack_logprobs(),
            prompt_logprobs={entry: joined(parts) for entry, parts in self.prompt_logprobs.items()},
            failures=self.failures,
        )
        if self.slot is not None:  # which other steps may have now
            self.slot.give_back()
            self.sampled = self.slot = self.done = None
        return result


class ModelRunner:
    """Runs plans on `model`; `kv_cache` is [2, layers of a block, blocks, block_size, kv_heads,
    head_dim], in the shape of any kind of layer."""

    def __init__(
        self,
        model: Model,
        attention: ModelAttention,
        *,
        sampler: Sampler,
        kv_cache: Tensor,
        limits: StepLimits,
        fused: FusedStep | None = None,
        captures: bool = False,
    ) -> None:
        """sampler: of the rows that plans speak of. fused: what the device has for the ends of a
        step; then `sampler` has nothing to do. captures: run by graphs, which needs `fused`."""
        self._model = model
        self._link = model.link
        self._samples = model.link is None or model.link.is_last
        self._vocabulary = sampler.vocabulary
        # Ranks must run a step in the same shape, and may not have captured the same ones.
        self._is_alone = model.link is None and sampler.vocabulary is None
        # Whether plain rows are sampled from the logits that this rank has.
        self._slices = sampler.vocabulary is not None and fused is not None
        self._attention = attention
        self._rows = rows = sampler.rows
        self._kv_cache = kv_cache
        self._device = kv_cache.device
        widths = np.cumsum([table.shape[1] for table in rows.block_tables])[:-1]
        tables = np.split(rows.host_block_tables, widths, axis=1)
        self._tables = list(zip(tables, rows.block_sizes, strict=True))  # views, of each group
        self._prefixes = PrefixFinder(rows.host_block_tables, block_size=rows.block_size)
        num_buffers = limits.max_inflight_steps + 1
        self._fused = fused
        self._sampler = sampler
        self._calls: CallGraphs | None = None
        if captures and self._device.type == "cuda":
            self._calls = CallGraphs(CudaGraphs())
        self._device_sampler: DeviceSampler | None = None
        if fused is not None:
            self._device_sampler = DeviceSampler(
                rows,
                fused,
                vocabulary=self._vocabulary,
                calls=self._calls,
            )
        self._graphs: StepGraphs | None = None
        if captures:
            self._graphs = StepGraphs(
                self.graph_step,
                max_num_rows=rows.num_rows,
                max_num_tokens=limits.max_num_batched_tokens,
            )
        self._staging = PlanStaging(
            max_num_rows=rows.num_rows, num_buffers=num_buffers, device=self._device
        )

    @property
    def graph_shapes(self) -> list[StepShape]:
        """Of steps that run by graph."""
        return [] if self._graphs is None else self._graphs.shapes

    @property
    def token_ids(self) -> Tensor:
        """Of all rows: see `RequestRows`."""
        return self._rows.token_ids

    @property
    def vocab_size(self) -> int:
        return self._rows.vocab_size

    @torch.inference_mode()
    def forward(self, plan: StepPlan, *, is_practice: bool = False) -> PendingStep:
        """Queue the first half of a step. Both halves of the plan before it must have been queued,
        but need not be done. is_practice: of a pipeline, only this stage runs it."""
        writes = self._rows.record(plan)
        sharing = self._prefixes.find(plan) if self._attention.shares_prefix else None
        prompts = self._find_prompts(plan) if self._samples and self._rows.prompting else []
        variant = Variant(
            shares_prefix=sharing is not None,
            keeps_hidden=bool(prompts) or not self._samples,
            gathers=self._slices and self._truncates(plan),
        )
        staged = self._staging.stage(plan, writes, sharing=sharing)
        self._write(staged.writes)
        entries, num_samples = staged.entries, staged.num_samples
        link = None if is_practice else self._link
        if link is not None and link.received is not None:
            link.receive(entries.num_tokens)
        # Rows may read what others of this step write unless that is told, or there are more.
        most_at_once = self._attention.most_at_once
        reads_new = entries.num_tokens <= most_at_once and reads_new_blocks(plan, self._tables)
        shape = None
        if self._graphs is not None:
            least = most_at_once + 1 if reads_new else 0
            shape = self._shape_for(self._graphs, entries, least=least)
        if shape is None or self._graphs is None:
            output = self._run(staged, variant, reads_new=reads_new)
        else:
            if self._is_alone and not is_practice:
                shape = self._graphs.captured_shape_for(shape, variant)
            output = self._graphs.run(shape, variant)
        pending = PendingStep(
            plan.step, rows=entries.sampled_rows, positions=staged.sampled_positions
        )
        if not self._samples:
            assert output.hidden is not None
            if link is not None:
                link.send(output.hidden[: entries.num_tokens])
            return pending
        if prompts:
            assert output.hidden is not None
            self._collect_prompt_logprobs(pending, staged, prompts, output.hidden)
        if num_samples:
            pending.logits = output.logits
        return pending

    def _write(self, writes: Tensor) -> None:
        """Bring the rows up to what a plan says of them."""
        num_writes = writes.shape[1]
        if self._calls is not None and 0 < num_writes <= ROOMS[-1]:
            self._calls.run(num_writes, partial(self._rows.write, writes))
        else:
            self._rows.write(writes)

    @torch.inference_mode()
    def sample(self, pending: PendingStep, masks: StepMasks | None = None) -> None:
        """Queue the second half: what picks ids, and brings them to the host.

        `pending` is of the last plan, and masks must be there for all of its constrained rows.
        """
        if self._device_sampler is not None:
            pending.slot = self._device_sampler.staging.take()
        if pending.logits is not None:
            if masks is not None:
                self._rows.masks.take(masks)
            pending.sampled = self._choose(pending.logits, pending, masks)
        if self._rows.failures:
            pending.failures = self._rows.failures_among(pending.rows)
        pending.logits = None
        if self._device.type == "cuda":
            pending.done = torch.Event(self._device) if pending.slot is None else pending.slot.done
            assert pending.done is not None
            pending.done.record()

    def _choose(self, logits: Tensor, pending: PendingStep, masks: StepMasks | None) -> OnHost:
        rows, positions = pending.rows, pending.positions
        if self._device_sampler is not None and pending.slot is not None:
            return self._device_sampler.sample(
                logits, pending.slot, rows=rows, positions=positions, masks=masks
            )
        targets = SamplingTargets.of(rows, positions, self._device)
        sampled = self._sampler.sample(logits[: len(rows)], targets, masks)
        self._rows.token_ids[targets.rows, targets.positions] = sampled.token_ids.int()
        return OnHost.of(sampled)

    def execute(
        self, plan: StepPlan, masks: StepMasks | None = None, *, is_practice: bool = False
    ) -> PendingStep:
        """Queue both halves of a step whose masks are there already."""
        pending = self.forward(plan, is_practice=is_practice)
        self.sample(pending, masks)
        return pending

    @staticmethod
    def _shape_for(graphs: StepGraphs, entries: PlanEntries, *, least: int) -> StepShape | None:
        """In which a plan runs by graph, of `least` tokens or more, if it is not too large."""
        num_tokens, num_rows = max(least, entries.num_tokens), len(entries.rows)
        if num_tokens == num_rows and not entries.sample_all:
            num_tokens += 1  # a decode graph samples for all of its rows
        return graphs.shape_for(num_tokens, num_rows)

    def graph_step(self, shape: StepShape, variant: Variant) -> StepOutput:
        """The staged plan's forward pass, padded to `shape`. Capturable."""
        assert self._fused is not None
        rows = self._rows
        staged = self._staging.view(
            *shape,
            max_seq_len=rows.token_ids.shape[1],
            shares_prefix=variant.shares_prefix,
        )
        batch = self._fused.expand_view(staged, rows)
        self._attention.prepare(batch)
        row_ids, positions, wanted = staged.rows[: shape.num_rows], batch.seq_lens, None
        if batch.ends is not None:
            row_ids, positions, wanted = batch.ends
        return self._finish(batch, row_ids, positions, wanted, variant)

    def _truncates(self, plan: StepPlan) -> bool:
        """Whether some rows draw from their likeliest ids alone, which takes all ranks' logits."""
        host = self._rows.host[np.asarray(plan.rows, np.int32)[plan.sampling]]
        return any(bool((host[name] != NEUTRAL[name]).any()) for name in TRUNCATIONS)

    def _run(self, staged: StagedPlan, variant: Variant, *, reads_new: bool) -> StepOutput:
        """The forward pass of any step, eagerly."""
        batch = build_batch(staged, self._rows)
        for one in (batch, *batch.others):
            one.reads_new = reads_new
        self._attention.prepare(batch)
        entries, wanted = staged.sampling.long(), None
        if 0 < len(entries) < batch.num_tokens:  # where the sampling entries' tokens end
            wanted = batch.query_start_loc[entries + 1].long() - 1
        return self._finish(batch, staged.rows[entries], batch.seq_lens[entries], wanted, variant)

    def _finish(
        self,
        batch: ForwardBatch,
        row_ids: Tensor,
        positions: Tensor,
        wanted: Tensor | None,
        variant: Variant,
    ) -> StepOutput:
        """Model, head, and, where it is fused with them, the choice of plain rows.

        row_ids, positions: [n], of the tokens that are sampled; wanted: [n], the tokens they come
        after, or None: all.
        """
        if self._link is not None and self._link.received is not None:
            # A copy, since layers add to it: what padding has there would grow from step to step.
            batch.received = self._link.received[: batch.num_tokens].clone()
        hidden = None
        if variant.keeps_hidden:
            every = None
            if self._vocabulary is not None and self._link is None:
                # By number, as ranks may else share them out.
                every = torch.arange(batch.num_tokens, device=self._device)
            residual = self._model.forward(batch, self._kv_cache, wanted=every)
            hidden = residual.hidden
            if not self._samples:
                row_ids = row_ids[:0]
            residual = residual if wanted is None else Residual(hidden[wanted])
        else:
            residual = self._model.forward(batch, self._kv_cache, wanted=wanted)
        if not len(row_ids):
            return StepOutput(torch.empty(0, device=self._device), hidden)
        if self._device_sampler is not None:
            return StepOutput(self._choose_fused(residual, row_ids, positions, variant), hidden)
        if self._vocabulary is None:
            return StepOutput(self._model.compute_logits(residual), hidden)
        return StepOutput(self._model.own_logits(residual).float(), hidden)

    def _choose_fused(
        self, residual: Residual, row_ids: Tensor, positions: Tensor, variant: Variant
    ) -> Tensor:
        """Puts the choice of plain rows where the second half looks for it; returns the logits it
        was made from."""
        assert self._fused is not None and self._device_sampler is not None
        rows, out = self._rows, self._device_sampler.staging.token_ids
        state: dict[str, Any] = {"columns": rows.columns, "seeds": rows.seeds}
        state |= {"known": rows.token_ids, "out": out}
        if self._vocabulary is None or variant.gathers:
            logits = self._model.raw_logits(residual)
            self._fused.sample_tokens(logits, rows=row_ids, positions=positions, **state)
        else:
            logits, targets = self._model.own_logits(residual), (row_ids, positions)
            vocabulary = self._vocabulary
            self._fused.sample_slices(logits, vocabulary=vocabulary, targets=targets, **state)
        return logits

    def _find_prompts(self, plan: StepPlan) -> list[PromptEntry]:
        host = self._rows.host[plan.rows]
        found = []
        for entry in np.flatnonzero(host["prompt_logprobs"] != NO_LOGPROBS).tolist():
            first = plan.num_computed[entry] + 1
            end = first + plan.num_scheduled[entry]
            end = min(end, int(host["num_prompt_tokens"][entry]))
            if first < end:
                found.append(PromptEntry(entry, first, end, int(host["prompt_logprobs"][entry])))
        return found

    def _collect_prompt_logprobs(
        self,
        pending: PendingStep,
        staged: StagedPlan,
        prompts: list[PromptEntry],
        hidden: Tensor,
    ) -> None:
        """The token at position p predicts the one at p + 1, which the row knows.

        Logits are made for `MAX_LOGIT_ROWS` positions at a time, so memory does not grow with the
        prompt. hidden: [num_tokens, hidden_size], what the last layer leaves of all tokens.
        """
        for entry, first, end, num_top in prompts:
            start = int(staged.entries.query_start_loc[entry])
            states = hidden[start : start + end - first]
            wanted = self._rows.token_ids[int(staged.entries.rows[entry]), first:end]
            pack = self._sampler.pack_logprobs
            if self._fused is not None and num_top >= 0:
                pack = self._fused.pack_logprobs
            parts = [
                PackedLogprobs(pack(self._model.raw_logits(Residual(some)), ids, num_top=num_top))
                for some, ids in zip(
                    torch.split(states, MAX_LOGIT_ROWS),
                    torch.split(wanted, MAX_LOGIT_ROWS),
                    strict=True,
                )
            ]
            pending.prompt_logprobs[entry] = [part.to_host() for part in parts]
