"""Which kernels a device gets; `worker` asks once, at start.

Modules are imported only when chosen, so a CPU never loads Triton.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from threading import Thread
from typing import Protocol

import torch
from torch import Tensor

from nanovllm.worker.forward_batch import ForwardBatch, StagedPlan
from nanovllm.worker.kernels.base import Kernels
from nanovllm.worker.kernels.native import library as native
from nanovllm.worker.layers.vocabulary import Vocabulary
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling.logprobs import PackLogprobs
from nanovllm.worker.sampling.sampler import RowSampler
from nanovllm.worker.sampling.wishes import Wishes


class SampleTokens(Protocol):
    """A sampler for all rows at once (`fused_sampler.sample_tokens`)."""

    def __call__(
        self,
        logits: Tensor,
        *,
        rows: Tensor,
        positions: Tensor,
        columns: Mapping[str, Tensor],
        seeds: Tensor,
        known: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor: ...


class SampleSlices(Protocol):
    """The same of rows that truncate nothing, by ranks that have different ids each: logits are
    [n, ids of this rank] (`slice_sampler.sample_slices`)."""

    def __call__(
        self,
        logits: Tensor,
        *,
        vocabulary: Vocabulary,
        targets: tuple[Tensor, Tensor],
        columns: Mapping[str, Tensor],
        seeds: Tensor,
        known: Tensor,
        out: Tensor | None = None,
    ) -> Tensor: ...


class SampleEdited(Protocol):
    """A sampler for entries that ask something of their logits (`edit_logits.sample_edited`)."""

    def __call__(
        self,
        wishes: Wishes,
        num_entries: int,
        *,
        token_ids: Tensor,
        counts: Tensor | None,
        known: Tensor,
        columns: Mapping[str, Tensor],
        seeds: Tensor,
    ) -> None: ...


class PackWished(Protocol):
    """Log-probabilities of entries that want them (`token_logprobs.pack_wished`)."""

    def __call__(
        self,
        wishes: Wishes,
        num_entries: int,
        *,
        token_ids: Tensor,
        num_top: int,
        packed: Tensor,
    ) -> None: ...


class ExpandView(Protocol):
    """`forward_batch.expand_view`, or the same in one kernel."""

    def __call__(self, staged: StagedPlan, rows: RequestRows) -> ForwardBatch: ...


@dataclass(frozen=True, slots=True)
class FusedStep:
    """What lies before and behind the model in a step: the first three as a CUDA graph wants it,
    the next two for the entries that ask for more, the last for prompts."""

    expand_view: ExpandView
    sample_tokens: SampleTokens
    sample_slices: SampleSlices
    sample_edited: SampleEdited
    pack_wished: PackWished
    pack_logprobs: PackLogprobs


@dataclass(frozen=True, slots=True)
class DeviceKernels:
    """The kernels of one device. Without a fused step plain torch does what it would.

    row_sampler: makes what samples in plain torch's place, where the device has something faster.
    gpu: the facts by which Triton compiles (`launch.Gpu`), where it does. naming: under way
    there, and to be joined before the first launch (`launch.name_kernels_ahead`).
    """

    layers: Kernels
    fused: FusedStep | None
    why: str
    row_sampler: Callable[[RequestRows], RowSampler] | None = None
    gpu: tuple[tuple[int, int], int] | None = None
    naming: Thread | None = None


def select_kernels(device: torch.device, *, refused: str | None = None) -> DeviceKernels:
    """Triton's on a GPU that runs them, else plain torch's. refused: why not Triton's, if known."""
    reason = refused or f"{device.type} device"
    if device.type == "cuda" and refused is None:
        reason = _load("triton.launch:unusable")(device)
        if reason is None:
            return DeviceKernels(
                layers=_load("triton.layer_kernels:TritonKernels")(),
                fused=FusedStep(
                    expand_view=_load("triton.expand_batch:expand_view"),
                    sample_tokens=_load("triton.fused_sampler:sample_tokens"),
                    sample_slices=_load("triton.slice_sampler:sample_slices"),
                    sample_edited=_load("triton.edit_logits:sample_edited"),
                    pack_wished=_load("triton.token_logprobs:pack_wished"),
                    pack_logprobs=_load("triton.token_logprobs:pack_logprobs"),
                ),
                why="fused Triton kernels",
                gpu=_load("triton.launch:gpu_of")(device),
                naming=_load("triton.launch:name_kernels_ahead")(),
            )
    has_native = device.type == "cpu" and native.unusable() is None
    return DeviceKernels(
        layers=_load("torch.layer_kernels:TorchKernels")(),
        fused=None,
        why=f"plain torch kernels ({reason})",
        row_sampler=_load("native.sampler:NativeSampler") if has_native else None,
    )


def _load(place: str):  # type: ignore[no-untyped-def]  # whatever stands there
    module, _, name = place.partition(":")
    return getattr(import_module(f"nanovllm.worker.kernels.{module}"), name)
