"""One step, from plan to pending result; orchestration only.

`Worker.execute` calls it with plans in order. On CUDA nothing here waits for the device: work and
copies are queued on one stream, and `PendingStep.result` waits for that step's event.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nanovllm.config import StepLimits
from nanovllm.protocol.plan import StepPlan, StepResult
from nanovllm.worker.attention.base import ModelAttention
from nanovllm.worker.attention.shared_prefix import PrefixFinder
from nanovllm.worker.cuda_graph import StepGraphs, StepShape, Variant
from nanovllm.worker.failures import wait_for
from nanovllm.worker.forward_batch import (
    ForwardBatch,
    PlanStaging,
    StagedPlan,
    build_batch,
)
from nanovllm.worker.kernels.base import Stream
from nanovllm.worker.kernels.select import FusedStep
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling.bitmask import unpack_masks
from nanovllm.worker.sampling.columns import NO_LOGPROBS
from nanovllm.worker.sampling.logprobs import LogprobTensors, gather_logprobs
from nanovllm.worker.sampling.sampler import Sampled, Sampler, SamplingTargets

MAX_LOGIT_ROWS = 256  # prompt positions whose logits are in memory at once
TRUNCATING_COLUMNS = {"top_k", "top_p", "min_p"}
GRAPH_COLUMNS = {"temperature", *TRUNCATING_COLUMNS}  # what a fused sampler does by itself


class Model(Protocol):
    """What the runner asks of a model (`models.decoder.Decoder`)."""

    def forward(
        self, batch: ForwardBatch, kv_cache: Tensor, *, wanted: Tensor | None = None
    ) -> Stream:
        """What the last layer leaves of the `wanted` tokens ([n] int64; None: of all)."""

    def compute_logits(self, stream: Stream) -> Tensor:
        """stream: of n tokens. Returns new memory, [n, vocab_size] float32."""

    def raw_logits(self, stream: Stream) -> Tensor:
        """`compute_logits` in the model's own precision, as a fused sampler takes them."""


@dataclass(slots=True)
class PendingStep:
    """A step under way (an `executor.base.StepHandle`). Tensors arrive in host memory.

    `prompt_logprobs`: entry of the plan → (alternatives wanted, its prompt positions).
    """

    step: int
    token_ids: Tensor | None = None  # [num_samples] int64
    logprobs: LogprobTensors | None = None
    logprob_indices: list[int] = field(default_factory=list)
    num_top_logprobs: list[int] = field(default_factory=list)
    prompt_logprobs: dict[int, tuple[int, LogprobTensors]] = field(default_factory=dict)
    done: torch.Event | None = None

    def result(self) -> StepResult:
        """Wait for this step, and for nothing queued after it."""
        if self.done is not None:
            wait_for(self.done)
        logprobs = {}
        if self.logprobs is not None:
            unpacked = self.logprobs.unpack(self.num_top_logprobs)
            logprobs = dict(zip(self.logprob_indices, unpacked, strict=True))
        return StepResult(
            step=self.step,
            token_ids=[] if self.token_ids is None else self.token_ids.tolist(),
            logprobs=logprobs,
            prompt_logprobs={
                entry: tensors.unpack([num_top] * len(tensors.ranks))
                for entry, (num_top, tensors) in self.prompt_logprobs.items()
            },
        )


class ModelRunner:
    """Runs plans on `model`; `kv_cache` is [2, layers, blocks, block_size, kv_heads, head_dim]."""

    def __init__(
        self,
        model: Model,
        attention: ModelAttention,
        *,
        rows: RequestRows,
        kv_cache: Tensor,
        limits: StepLimits,
        fused: FusedStep | None = None,
        captures: bool = False,
    ) -> None:
        """fused: what the device has for the ends of a step. captures: run by graphs, which needs
        that."""
        self._model = model
        self._attention = attention
        self._rows = rows
        self._kv_cache = kv_cache
        self._block_size = kv_cache.shape[3]
        self._device = kv_cache.device
        self._prefixes = PrefixFinder(rows.host_block_tables, block_size=self._block_size)
        self._sampler = Sampler(rows, None if fused is None else fused.sample_tokens)
        self._fused = fused
        self._graphs: StepGraphs | None = None
        if captures:
            self._graphs = StepGraphs(
                self.graph_step,
                max_num_rows=rows.num_rows,
                max_num_tokens=limits.max_num_batched_tokens,
            )
        self._staging = PlanStaging(
            max_num_rows=rows.num_rows,
            num_buffers=limits.max_inflight_steps + 1,
            device=self._device,
        )

    @property
    def graph_shapes(self) -> list[StepShape]:
        """Of steps that run by graph."""
        return [] if self._graphs is None else self._graphs.shapes

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> PendingStep:
        """Queue one step. The plan before it must have been queued, but need not be done."""
        writes = self._rows.record(plan)
        sharing = self._prefixes.find(plan) if self._attention.shares_prefix else None
        planned = self._graph_for(plan, shares_prefix=sharing is not None)
        staged = self._staging.stage(plan, writes, sharing=sharing)
        self._rows.write(staged.writes)
        return self._run(plan, staged) if planned is None else self._replay(plan, *planned)

    def _graph_for(
        self, plan: StepPlan, *, shares_prefix: bool
    ) -> tuple[StepGraphs, StepShape, Variant] | None:
        """How to run a recorded plan by graph, if its size and its rows' sampling allow it."""
        graphs = self._graphs
        if graphs is None or plan.masks or not self._rows.edits.keys().isdisjoint(plan.rows):
            return None
        active = self._rows.active_columns(np.array(plan.rows, np.int32))
        shape = graphs.shape_for(sum(plan.num_scheduled), len(plan.rows))
        if shape is None or not active <= GRAPH_COLUMNS:
            return None
        if shape.num_tokens == shape.num_rows and len(plan.sampling) < len(plan.rows):
            return None  # a decode graph samples for all of its rows
        variant = Variant(
            truncates=not active.isdisjoint(TRUNCATING_COLUMNS),
            shares_prefix=shares_prefix,
        )
        return graphs, shape, variant

    def _replay(
        self, plan: StepPlan, graphs: StepGraphs, shape: StepShape, variant: Variant
    ) -> PendingStep:
        """The staged plan, by graph."""
        token_ids = graphs.run(shape, variant)
        pending = PendingStep(plan.step)
        if plan.sampling:
            pending.token_ids = token_ids[: len(plan.sampling)].to("cpu", non_blocking=True)
        return self._mark(pending)

    def graph_step(self, shape: StepShape, variant: Variant) -> Tensor:
        """The staged step, padded to `shape`; ids of the entries that sample. Capturable."""
        assert self._fused is not None
        rows = self._rows
        staged = self._staging.view(
            *shape,
            max_seq_len=rows.token_ids.shape[1],
            shares_prefix=variant.shares_prefix,
        )
        batch = self._fused.expand_view(staged, rows, block_size=self._block_size)
        self._attention.prepare(batch)
        row_ids, positions, wanted = staged.rows[: shape.num_rows], batch.seq_lens, None
        if shape.num_tokens > shape.num_rows:
            entries = staged.sampling.long()
            ends = staged.query_start_loc[entries + 1]
            wanted = (ends - 1).long()
            positions = staged.num_computed[entries] + ends - staged.query_start_loc[entries]
            row_ids = staged.rows[entries]
        stream = self._model.forward(batch, self._kv_cache, wanted=wanted)
        return self._fused.sample_tokens(
            self._model.raw_logits(stream),
            rows=row_ids,
            positions=positions,
            columns=rows.columns,
            seeds=rows.seeds,
            truncates=variant.truncates,
            known=rows.token_ids,
        )

    def _run(self, plan: StepPlan, staged: StagedPlan) -> PendingStep:
        """Any step, eagerly."""
        batch = build_batch(staged, self._rows, block_size=self._block_size)
        self._attention.prepare(batch)
        entries = staged.sampling.long()
        ends = (
            batch.query_start_loc[entries + 1].long() - 1
        )  # where the sampling entries' tokens end
        pending = PendingStep(plan.step)
        if self._wants_prompt_logprobs(staged):
            hidden = self._model.forward(batch, self._kv_cache).hidden
            self._collect_prompt_logprobs(pending, staged, hidden)
            stream = Stream(hidden[ends])
        else:
            only_ends = 0 < len(entries) < batch.num_tokens
            stream = self._model.forward(batch, self._kv_cache, wanted=ends if only_ends else None)
        if plan.sampling:
            self._collect_samples(pending, self._sample(staged, batch, stream, plan.masks))
        return self._mark(pending)

    def _wants_prompt_logprobs(self, staged: StagedPlan) -> bool:
        return bool((self._rows.host["prompt_logprobs"][staged.host_rows] != NO_LOGPROBS).any())

    def _mark(self, pending: PendingStep) -> PendingStep:
        """Let `pending` know when all that has been queued is done."""
        if self._device.type == "cuda":
            pending.done = torch.Event(self._device)
            pending.done.record()
        return pending

    def _sample(
        self, staged: StagedPlan, batch: ForwardBatch, stream: Stream, masks: dict[int, bytes]
    ) -> Sampled:
        """Sample for the plan's entries, whose stream it is, and let the device remember the
        tokens."""
        entries = staged.sampling.long()
        targets = SamplingTargets(
            rows=staged.rows[entries].long(),
            positions=batch.seq_lens[entries].long(),
            host_rows=staged.host_rows[staged.host_sampling],
            host_positions=staged.host_seq_lens[staged.host_sampling],
        )
        logits = self._model.compute_logits(stream)
        allowed = unpack_masks(masks, vocab_size=logits.shape[1], device=logits.device)
        sampled = self._sampler.sample(logits, targets, allowed)
        self._rows.token_ids[targets.rows, targets.positions] = sampled.token_ids.int()
        return sampled

    def _collect_samples(self, pending: PendingStep, sampled: Sampled) -> None:
        pending.token_ids = sampled.token_ids.to("cpu", non_blocking=True)
        if sampled.logprobs is not None:
            pending.logprobs = sampled.logprobs.to_host()
            pending.logprob_indices = sampled.logprob_indices
            pending.num_top_logprobs = sampled.num_top_logprobs

    def _collect_prompt_logprobs(
        self, pending: PendingStep, staged: StagedPlan, hidden: Tensor
    ) -> None:
        """For each entry that wants them, the log-probabilities of the prompt's next tokens.

        The token at position p predicts the one at p + 1, which the row knows. Logits are made for
        `MAX_LOGIT_ROWS` positions at a time, so memory does not grow with the prompt.
        """
        host = self._rows.host[staged.host_rows]
        starts = staged.host_query_start_loc
        for entry in np.flatnonzero(host["prompt_logprobs"] != NO_LOGPROBS).tolist():
            seq_len, num_prompt = int(staged.host_seq_lens[entry]), host["num_prompt_tokens"][entry]
            num_new = int(starts[entry + 1] - starts[entry])
            first = seq_len - num_new + 1
            end = min(seq_len + 1, int(num_prompt))
            if first >= end:
                continue
            num_top = int(host["prompt_logprobs"][entry])
            wanted = self._rows.token_ids[int(staged.host_rows[entry]), first:end].long()
            states = hidden[starts[entry] : starts[entry] + end - first]
            parts = [
                gather_logprobs(self._model.compute_logits(Stream(some)), ids, num_top=num_top)
                for some, ids in zip(
                    torch.split(states, MAX_LOGIT_ROWS),
                    torch.split(wanted, MAX_LOGIT_ROWS),
                    strict=True,
                )
            ]
            pending.prompt_logprobs[entry] = num_top, LogprobTensors.concatenate(parts).to_host()
