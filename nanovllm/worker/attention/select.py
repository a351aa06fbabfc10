"""The table of attention backends, and the one choice among them, made at start by `worker`.

A backend is a file and a line here. Modules are imported when their line is considered, so a
backend's dependencies are needed only where it runs.
"""

from importlib import import_module
from typing import Protocol

from nanovllm.config import AttentionBackendName, unknown_name
from nanovllm.worker.attention.base import AttentionBackend, AttentionSpec

BACKENDS = {
    "torch": "nanovllm.worker.attention.torch_ref:TorchAttention",
    "triton": "nanovllm.worker.attention.triton.backend:TritonAttention",
    "flash_attn": "nanovllm.worker.attention.flash_attention:FlashAttention",
}
# "auto" takes the first that supports the model.
PREFERENCES = {"cpu": ("torch",), "cuda": ("triton", "torch")}


class BackendClass(Protocol):
    """A class whose instances are backends."""

    def __call__(self, spec: AttentionSpec) -> AttentionBackend: ...

    def unsupported(self, spec: AttentionSpec) -> str | None: ...


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
