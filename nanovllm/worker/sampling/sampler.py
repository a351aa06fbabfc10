"""Chooses the next token of every row that samples, in plain torch; `ModelRunner` calls it once per
step. It is what `device_sampler` and a CPU's `RowSampler` mean, too.

Owns the order of operations, which is vLLM's: raw log-probabilities; allowed ids, bad words,
min_tokens, logit_bias; what a grammar allows; penalties; greedy choice, or temperature, min-p,
top-k, top-p and a draw. An operation runs only if some row of the batch asks for it.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanovllm.protocol.plan import StepMasks, TokenLogprobs
from nanovllm.worker.layers.vocabulary import Vocabulary
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling.bitmask import apply_masks
from nanovllm.worker.sampling.columns import (
    NEUTRAL,
    NO_LOGPROBS,
    PENALTIES,
    TRUNCATIONS,
    Int32Array,
)
from nanovllm.worker.sampling.distribution import (
    draw,
    to_probabilities,
    truncate_min_p,
    truncate_top_k,
    truncate_top_p,
)
from nanovllm.worker.sampling.logits_processors import apply_edits
from nanovllm.worker.sampling.logprobs import PackedLogprobs, PackLogprobs, pack_logprobs
from nanovllm.worker.sampling.penalties import penalize
from nanovllm.worker.sampling.slices import candidates, join

# Columns that the draw alone reads, and one that the second half of a step does not. Without
# truncations, no rank needs others' logits.
UNTRUNCATED = {"temperature", "prompt_logprobs"}
PLAIN = {*UNTRUNCATED, *TRUNCATIONS}
IndexArray = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class SamplingTargets:
    """Which rows sample, and the positions their new tokens take: on the device and the host."""

    rows: Tensor  # [n] int64
    positions: Tensor  # [n] int64
    host_rows: Int32Array
    host_positions: Int32Array

    @classmethod
    def of(cls, rows: Int32Array, positions: Int32Array, device: torch.device) -> "SamplingTargets":
        """From what the host knows."""
        on_device = [torch.from_numpy(array).long().to(device) for array in (rows, positions)]
        return cls(on_device[0], on_device[1], rows, positions)

    def select(self, chosen: IndexArray) -> tuple["SamplingTargets", Tensor]:
        """Some of the targets, and their indices on the device."""
        indices = torch.from_numpy(chosen).to(self.rows.device, non_blocking=True)
        on_host = self.host_rows[chosen], self.host_positions[chosen]
        return SamplingTargets(self.rows[indices], self.positions[indices], *on_host), indices


@dataclass(frozen=True, slots=True)
class Sampled:
    """`logprobs` are those of the targets `logprob_indices`, if there are any."""

    token_ids: Tensor  # [n] int64
    logprobs: PackedLogprobs | None
    logprob_indices: list[int]
    num_top_logprobs: list[int]


class OnHost(NamedTuple):
    """A step's `Sampled`, or what it will be when the step is done, in memory of the host."""

    token_ids: Tensor | npt.NDArray[np.int64]  # [n]
    logprobs: PackedLogprobs | None = None
    logprob_indices: list[int] = []  # noqa: RUF012  nobody changes it
    num_top_logprobs: list[int] = []  # noqa: RUF012

    @classmethod
    def of(cls, sampled: Sampled) -> "OnHost":
        """Starts copying it; an event says when that is done."""
        return cls(
            sampled.token_ids.to("cpu", non_blocking=True),
            None if sampled.logprobs is None else sampled.logprobs.to_host(),
            sampled.logprob_indices,
            sampled.num_top_logprobs,
        )

    def unpack_logprobs(self) -> dict[int, TokenLogprobs]:
        """Index of a sample → its log-probabilities."""
        if self.logprobs is None:
            return {}
        unpacked = self.logprobs.unpack(self.num_top_logprobs)
        return dict(zip(self.logprob_indices, unpacked, strict=True))


class RowSampler(Protocol):
    """The same by a device's own code (`native.sampler`), from logits of the whole vocabulary."""

    def sample(
        self, logits: Tensor, targets: SamplingTargets, masks: StepMasks | None = None
    ) -> Sampled: ...

    @property
    def pack_logprobs(self) -> PackLogprobs: ...


class Sampler:
    """Reads `rows`; keeps nothing from step to step.

    pack_logprobs: makes log-probabilities of prompts.
    """

    def __init__(
        self,
        rows: RequestRows,
        own: RowSampler | None = None,
        *,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """own: the device's, of these rows; plain torch samples if there is none. vocabulary: this
        rank's, if others have other ids."""
        self.rows = rows
        self.vocabulary = vocabulary
        self.pack_logprobs: PackLogprobs = pack_logprobs if own is None else own.pack_logprobs
        self._own = own

    def sample(
        self, logits: Tensor, targets: SamplingTargets, masks: StepMasks | None = None
    ) -> Sampled:
        """Choose a token for each target. Overwrites `logits` ([n, vocab_size] float32; where ranks
        have different ids, those of this rank)."""
        is_unedited = masks is None and not self.rows.edits
        if self.vocabulary is not None:
            if is_unedited and self.rows.active_columns(targets.host_rows) <= UNTRUNCATED:
                token_ids = self._choose_among_ranks(logits, targets, self.vocabulary)
                return Sampled(token_ids, None, [], [])
            logits = self.vocabulary.gather(logits)
        if self._own is not None:
            return self._own.sample(logits, targets, masks)
        active = self.rows.active_columns(targets.host_rows)
        if is_unedited and active <= PLAIN:
            return Sampled(self._choose(logits, targets, active), None, [], [])
        return self._sample_edited(logits, targets, active, masks)

    def _sample_edited(
        self, logits: Tensor, targets: SamplingTargets, active: set[str], masks: StepMasks | None
    ) -> Sampled:
        """`sample`, where a row may ask for log-probabilities, or for other logits than its own."""
        raw = None
        if "logprobs" in active:
            num_top = self.rows.host["logprobs"][targets.host_rows]
            wanted = np.flatnonzero(num_top != NO_LOGPROBS)
            indices = targets.select(wanted)[1]
            raw = logits[indices]  # a copy: what follows edits the logits
        unedited = {} if masks is None else self._copy_edited(logits, targets, masks)
        if self.rows.edits:
            self._apply_edits(logits, targets)
        if masks is not None:
            apply_masks(logits, masks, self.rows.masks, unedited)
        if not active.isdisjoint(PENALTIES):
            self._penalize(logits, targets)
        token_ids = self._choose(logits, targets, active)
        if raw is None:
            return Sampled(token_ids, None, [], [])
        most = -1 if -1 in num_top else int(num_top.max())
        logprobs = PackedLogprobs(pack_logprobs(raw, token_ids[indices], num_top=most))
        return Sampled(token_ids, logprobs, wanted.tolist(), num_top[wanted].tolist())

    def _choose_among_ranks(
        self, logits: Tensor, targets: SamplingTargets, vocabulary: Vocabulary
    ) -> Tensor:
        temperature = self.rows.columns["temperature"][targets.rows]
        seeds = self.rows.seeds[targets.rows]
        own = candidates(logits, temperature, seeds, targets.positions, start=vocabulary.cut.start)
        return join(vocabulary.parallel.gather(own), temperature)

    def _copy_edited(
        self, logits: Tensor, targets: SamplingTargets, masks: StepMasks
    ) -> dict[int, Tensor]:
        """The logits of those targets that have both edits and a mask."""
        rows = targets.host_rows
        edited = [target for target in masks.indices if int(rows[target]) in self.rows.edits]
        return {target: logits[target].clone() for target in edited}

    def _apply_edits(self, logits: Tensor, targets: SamplingTargets) -> None:
        rows = self.rows
        for index, row in enumerate(targets.host_rows.tolist()):
            edits = rows.edits.get(row)
            if edits is not None:
                length = int(targets.host_positions[index])
                num_outputs = length - int(rows.host["num_prompt_tokens"][row])
                outputs = rows.token_ids[row, length - num_outputs : length]
                try:
                    apply_edits(logits[index], edits, outputs)
                except Exception as error:
                    rows.note_failure(row, error)

    def _penalize(self, logits: Tensor, targets: SamplingTargets) -> None:
        rows = self.rows
        host = rows.host[targets.host_rows]
        asking = np.logical_or.reduce([host[name] != NEUTRAL[name] for name in PENALTIES])
        some, indices = targets.select(np.flatnonzero(asking))
        width = int(some.host_positions.max())
        tokens = rows.token_ids[:, :width][some.rows].long()  # [n, width]
        places = torch.arange(width, device=tokens.device)
        known = places < some.positions[:, None]
        penalized = penalize(
            logits[indices],
            torch.where(known, tokens, tokens[:, :1]),
            known & (places >= rows.columns["num_prompt_tokens"][some.rows][:, None]),
            **{name: rows.columns[name][some.rows] for name in PENALTIES},
        )
        logits.index_copy_(0, indices, penalized)

    def _choose(self, logits: Tensor, targets: SamplingTargets, active: set[str]) -> Tensor:
        """Greedy rows take the largest logit, the others draw. Returns [n] int64."""
        if "temperature" not in active:
            return _argmax(logits)
        drawing = self.rows.host["temperature"][targets.host_rows] > 0
        if drawing.all():
            return self._draw(logits, targets, active)
        some, indices = targets.select(np.flatnonzero(drawing))
        token_ids = _argmax(logits)
        token_ids[indices] = self._draw(logits[indices], some, active)
        return token_ids

    def _draw(self, logits: Tensor, targets: SamplingTargets, active: set[str]) -> Tensor:
        columns, rows = self.rows.columns, targets.rows
        probs = to_probabilities(logits, columns["temperature"][rows])
        if "min_p" in active:
            probs = truncate_min_p(probs, columns["min_p"][rows])
        if "top_k" in active:
            most = int(self.rows.host["top_k"][targets.host_rows].max())
            probs = truncate_top_k(probs, columns["top_k"][rows], most=most)
        if "top_p" in active:
            probs = truncate_top_p(probs, columns["top_p"][rows])
        return draw(probs, self.rows.seeds[rows], targets.positions)


def _argmax(logits: Tensor) -> Tensor:
    """The largest of each row, [n] int64. On a CPU, NumPy's is many times faster."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)
