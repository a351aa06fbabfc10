"""The table of attention backends, and the one choice among them, made at start by `worker`.

A backend is a file and a line here. Modules are imported when their line is considered, so a
backend's dependencies are needed only where it runs.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Protocol

import torch

from nanovllm.checkpoint.kv_layout import block_sizes
from nanovllm.checkpoint.spec import Attention, DecoderSpec
from nanovllm.config import AttentionBackendName, unknown_name
from nanovllm.worker.attention.base import AttentionBackend, AttentionSpec, ModelAttention
from nanovllm.worker.parallel import SINGLE, TensorParallel

BACKENDS = {
    "torch": "nanovllm.worker.attention.torch_ref:TorchAttention",
    "native": "nanovllm.worker.attention.native:NativeAttention",
    "triton": "nanovllm.worker.attention.triton.backend:TritonAttention",
    "flash_attn": "nanovllm.worker.attention.flash_attention:FlashAttention",
}
# "auto" takes the first that supports the model.
PREFERENCES = {"cpu": ("native", "torch"), "cuda": ("triton", "torch")}


class BackendClass(Protocol):
    """A class whose instances are backends."""

    def __call__(self, spec: AttentionSpec) -> AttentionBackend: ...

    def unsupported(self, spec: AttentionSpec) -> str | None: ...


def attention_specs(
    spec: DecoderSpec,
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: torch.dtype | None = None,
    parallel: TensorParallel = SINGLE,
) -> dict[Attention, AttentionSpec]:
    """What each kind of layer asks of a backend on this rank. block_size: as `block_sizes` has
    it, which raises."""
    sizes = block_sizes(spec, block_size, num_ranks=parallel.size)
    return {
        kind: AttentionSpec(
            num_heads=parallel.share(kind.num_heads).size,
            num_kv_heads=parallel.share(kind.num_kv_heads, repeats=True).size,
            head_dim=kind.head_dim,
            scale=kind.scale,
            block_size=sizes[kind],
            sliding_window=kind.window,
            dtype=dtype,
            device=device,
            kv_dtype=kv_dtype,
            softcap=kind.softcap,
            sinks=kind.sinks,
        )
        for kind in spec.attentions
    }


def select_attention(
    name: AttentionBackendName, specs: Mapping[Attention, AttentionSpec]
) -> tuple[ModelAttention, str]:
    """A backend for each kind of layer, and why. Raises `ValueError` as `select_backend`."""
    found = {kind: select_backend(name, spec) for kind, spec in specs.items()}
    backends = {kind: backend for kind, (backend, _) in found.items()}
    reasons = dict.fromkeys(why for _, why in found.values())
    return ModelAttention(specs, backends), "; ".join(reasons)


def select_backend(name: AttentionBackendName, spec: AttentionSpec) -> tuple[AttentionBackend, str]:
    """The backend for `spec` and, in one sentence, why it is that one.

    Raises `ValueError` with every reason if none of those allowed supports `spec`.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(unknown_name("attention_backend", name, ["auto", *BACKENDS]))
    refusals: list[str] = []
    for candidate in PREFERENCES[spec.device.type] if name == "auto" else (name,):
        backend_class = _backend_class(candidate)
        reason = backend_class.unsupported(spec)
        if reason is None:
            because = "as attention_backend asks" if name != "auto" else "first that fits"
            passed = "".join(f"; {refusal}" for refusal in refusals)
            return backend_class(spec), f"attention by {candidate} ({because}{passed})"
        refusals.append(f"not {candidate}: {reason}")
    raise ValueError(f"attention_backend {name!r} cannot serve the model: {'; '.join(refusals)}")


def _backend_class(name: str) -> BackendClass:
    module, _, attribute = BACKENDS[name].partition(":")
    found: BackendClass = getattr(import_module(module), attribute)
    return found
