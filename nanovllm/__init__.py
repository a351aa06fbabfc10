"""nanovllm: an LLM inference engine. The public names load lazily; importing it costs nothing."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.config import EngineConfig
    from nanovllm.frontend.async_llm import AsyncLLM
    from nanovllm.frontend.errors import (
        EngineDeadError,
        OverloadedError,
        QuarantinedError,
        RequestFailedError,
    )
    from nanovllm.frontend.llm import LLM
    from nanovllm.frontend.outputs import CompletionOutput, RequestOutput
    from nanovllm.sampling_params import SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "AsyncLLM": "nanovllm.frontend.async_llm",
    "CompletionOutput": "nanovllm.frontend.outputs",
    "EngineConfig": "nanovllm.config",
    "EngineDeadError": "nanovllm.frontend.errors",
    "LLM": "nanovllm.frontend.llm",
    "OverloadedError": "nanovllm.frontend.errors",
    "QuarantinedError": "nanovllm.frontend.errors",
    "RequestFailedError": "nanovllm.frontend.errors",
    "RequestOutput": "nanovllm.frontend.outputs",
    "SamplingParams": "nanovllm.sampling_params",
    "StructuredOutputsParams": "nanovllm.sampling_params",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineConfig",
    "EngineDeadError",
    "OverloadedError",
    "QuarantinedError",
    "RequestFailedError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'nanovllm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
