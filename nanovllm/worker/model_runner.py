"""One step, from plan to pending result; orchestration only.

`Worker.execute` calls it with plans in order. On CUDA nothing here waits for the device: work and
copies are queued on one stream, and `PendingStep.result` waits for that step's event.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nanovllm.protocol import StepPlan, StepResult
from nanovllm.worker.attention.base import AttentionBackend
from nanovllm.worker.cuda_graph import DecodeGraphs
from nanovllm.worker.forward_batch import ForwardBatch, PlanStaging, StagedPlan, build_batch
from nanovllm.worker.kernels.select import SampleTokens
from nanovllm.worker.request_rows import Int32Array, RequestRows
from nanovllm.worker.sampling.columns import NO_LOGPROBS
from nanovllm.worker.sampling.logprobs import LogprobTensors, gather_logprobs
from nanovllm.worker.sampling.masks import unpack_masks
from nanovllm.worker.sampling.sampler import Sampled, Sampler, SamplingTargets

MAX_LOGIT_ROWS = 256  # prompt positions whose logits are in memory at once
TRUNCATING_COLUMNS = {"top_k", "top_p", "min_p"}
GRAPH_COLUMNS = {"temperature", *TRUNCATING_COLUMNS}  # what a fused sampler does by itself


class Model(Protocol):
    """What the runner asks of a model (`models.decoder.Decoder`)."""

    def forward(self, batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        """Hidden states after the final norm, [num_tokens, hidden_size]."""

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden: [n, hidden_size]. Returns new memory, [n, vocab_size] float32."""

    def raw_logits(self, hidden: Tensor) -> Tensor:
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
            self.done.synchronize()
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
        attention: AttentionBackend,
        *,
        rows: RequestRows,
        kv_cache: Tensor,
        max_inflight_steps: int,
        sample_tokens: SampleTokens | None = None,
        captures: bool = False,
    ) -> None:
        """sample_tokens: the device's fused sampler, if it has one. captures: decode by graphs,
        which needs a fused sampler."""
        self._model = model
        self._attention = attention
        self._rows = rows
        self._kv_cache = kv_cache
        self._block_size = kv_cache.shape[3]
        self._device = kv_cache.device
        self._sampler = Sampler(rows, sample_tokens)
        self._sample_tokens = sample_tokens
        self._graphs: DecodeGraphs | None = None
        if captures:
            self._graphs = DecodeGraphs(self._decode_step, max_num_rows=rows.num_rows)
        self._staging = PlanStaging(
            max_num_rows=rows.num_rows,
            num_buffers=max_inflight_steps + 1,
            device=self._device,
        )

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> PendingStep:
        """Queue one step. The plan before it must have been queued, but need not be done."""
        if self._graphs is not None and max(plan.num_scheduled) == 1:
            return self._decode(plan, self._graphs)
        return self._run(plan)

    def _decode(self, plan: StepPlan, graphs: DecodeGraphs) -> PendingStep:
        """A step of one token per row, by graph if the sampler needs nothing special."""
        writes = self._rows.record(plan)
        active = self._rows.active_columns(np.array(plan.rows, np.int32))
        plain = len(plan.sampling) == len(plan.rows) and active <= GRAPH_COLUMNS
        if not plain or plan.masks or not self._rows.edits.keys().isdisjoint(plan.rows):
            return self._run(plan, writes)
        bucket = graphs.bucket_for(len(plan.rows))
        staged = self._staging.stage(plan, writes, padded_to=bucket)
        self._rows.write(staged.writes)
        token_ids = graphs.run(bucket, truncates=not active.isdisjoint(TRUNCATING_COLUMNS))
        pending = PendingStep(plan.step)
        pending.token_ids = token_ids[: len(plan.rows)].to("cpu", non_blocking=True)
        return self._mark(pending)

    def _decode_step(self, num_rows: int, truncates: bool) -> Tensor:
        """One token for each of the first staged entries; ids [num_rows]. Capturable."""
        assert self._sample_tokens is not None
        rows = self._rows
        max_seq_len = rows.token_ids.shape[1]
        staged = self._staging.decode_view(num_rows, max_seq_len=max_seq_len)
        batch = build_batch(staged, rows, block_size=self._block_size)
        self._attention.prepare(batch)
        hidden = self._model.forward(batch, self._kv_cache)
        row_ids, positions = staged.rows.long(), batch.positions + 1
        token_ids = self._sample_tokens(
            self._model.raw_logits(hidden),
            rows=row_ids,
            positions=positions,
            columns=rows.columns,
            seeds=rows.seeds,
            truncates=truncates,
        )
        rows.token_ids[row_ids, positions] = token_ids.int()
        return token_ids

    def _run(self, plan: StepPlan, writes: Int32Array | None = None) -> PendingStep:
        """Any step, eagerly. writes: what `record` returned, if that is done already."""
        if writes is None:
            writes = self._rows.record(plan)
        staged = self._staging.stage(plan, writes)
        self._rows.write(staged.writes)
        batch = build_batch(staged, self._rows, block_size=self._block_size)
        self._attention.prepare(batch)
        hidden = self._model.forward(batch, self._kv_cache)  # [num_tokens, hidden_size]
        pending = PendingStep(plan.step)
        self._collect_prompt_logprobs(pending, staged, hidden)
        if plan.sampling:
            self._collect_samples(pending, self._sample(staged, batch, hidden, plan.masks))
        return self._mark(pending)

    def _mark(self, pending: PendingStep) -> PendingStep:
        """Let `pending` know when all that has been queued is done."""
        if self._device.type == "cuda":
            pending.done = torch.Event(self._device)
            pending.done.record()
        return pending

    def _sample(
        self, staged: StagedPlan, batch: ForwardBatch, hidden: Tensor, masks: dict[int, bytes]
    ) -> Sampled:
        """Sample for the plan's entries and let the device remember the tokens."""
        entries = staged.sampling.long()
        targets = SamplingTargets(
            rows=staged.rows[entries].long(),
            positions=batch.seq_lens[entries].long(),
            host_rows=staged.host_rows[staged.host_sampling],
            host_positions=staged.host_seq_lens[staged.host_sampling],
        )
        if len(entries) < batch.num_tokens:
            hidden = hidden[batch.query_start_loc[entries + 1].long() - 1]
        logits = self._model.compute_logits(hidden)
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
                gather_logprobs(self._model.compute_logits(some), token_ids, num_top=num_top)
                for some, token_ids in zip(
                    torch.split(states, MAX_LOGIT_ROWS),
                    torch.split(wanted, MAX_LOGIT_ROWS),
                    strict=True,
                )
            ]
            pending.prompt_logprobs[entry] = num_top, LogprobTensors.concatenate(parts).to_host()
