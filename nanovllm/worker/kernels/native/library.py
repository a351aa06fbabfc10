"""The C++ library as Python calls it: structures of `types.h`, functions, and who may load it.

Loaded once per process, by `select` and those it chooses. Plain C by ctypes: a call costs 2 µs and
lets go of Python's lock. Callers keep the tensors alive whose addresses they pass.
"""

import ctypes
import os
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ISA_VARIABLE = "NANOVLLM_CPU_ISA"  # an instruction set instead of the best that the CPU has
MODULE = "nanovllm.worker.kernels.native._native"
BLOCK = 16  # rows that are laid out together; every width is a multiple
ACTIVATIONS = "silu", "gelu_tanh"  # by their numbers there
BF16 = 30  # the type of weights that are not quantized; the others are GGUF's


class Matrix(Structure):
    """`data` is packed (`pack`)."""

    _fields_ = (
        ("type", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("padding", c_int32),
        ("data", c_void_p),
    )


class Linear(Structure):
    _fields_ = (
        ("parts", Matrix * 3),
        ("num_parts", c_int32),
        ("rows", c_int32),
        ("bias", c_void_p),
    )


class Cache(Structure):
    _fields_ = (
        ("keys", c_void_p),
        ("plane", c_int64),
        ("is_bf16", c_int32),
        ("block_size", c_int32),
    )


class Heads(Structure):
    _fields_ = (
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("sinks", c_void_p),
    )


class Rope(Structure):
    _fields_ = (
        ("cos_sin", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("growth", c_void_p),
        ("eps", c_float),
        ("norms_all", c_int32),
    )


class Batch(Structure):
    _fields_ = (
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("query_start_loc", c_void_p),
        ("block_tables", c_void_p),
        ("num_tokens", c_int32),
        ("num_rows", c_int32),
        ("block_table_stride", c_int64),
    )


class Layer(Structure):
    _fields_ = (
        ("qkv", Linear),
        ("o", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("attention_norm", c_void_p),
        ("attention_post_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("mlp_post_norm", c_void_p),
        ("rope", Rope),
        ("heads", Heads),
        ("activation", c_int32),
        ("group", c_int32),
        ("place", c_int32),
        ("padding", c_int32),
    )


class DecoderParts(Structure):
    _fields_ = (
        ("layers", POINTER(Layer)),
        ("num_layers", c_int32),
        ("hidden_size", c_int32),
        ("eps", c_float),
        ("embedding_multiplier", c_float),
        ("logit_scale", c_float),
        ("logit_softcap", c_float),
        ("final_norm", c_void_p),
        ("embedding", Matrix),
        ("head", Linear),
    )


ROW_COLUMNS = (
    *("temperature", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("top_k", "logprobs", "num_prompt_tokens"),
)


class Rows(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ROW_COLUMNS),
        ("seeds", c_void_p),
        ("tokens", c_void_p),
        ("stride", c_int64),
        ("seed_stride", c_int64),
        ("token_stride", c_int64),
    )


LINE_FIELDS = ("table", "mask", "report")  # of `Asks.lines`, 64 bits each


class Asks(Structure):
    _fields_ = (
        ("lines", c_void_p),
        ("tables", c_void_p),
        ("masks", c_void_p),
        ("mask_bytes", c_int64),
        ("reports", c_void_p),
        ("num_top", c_int64),
    )


INTERFACE = 3  # of types.h
HOW_TO_BUILD = "the set-up built no native kernels: install a C++ compiler and set up again"
HOW_TO_REBUILD = (
    "the native kernels were built for another version of nanovllm: set up again (`make setup`, or "
    "`pip install -e .`); until then plain torch computes"
)

# function → (result, arguments)
SIGNATURES = {
    "nv_isa": (c_char_p, (c_int32,)),
    "nv_isa_in_use": (c_char_p, ()),
    "nv_num_threads": (c_int32, ()),
    "nv_use": (c_int32, (c_char_p, c_int32)),
    "nv_packed_bytes": (c_int64, (c_int32, c_int32, c_int32)),
    "nv_pack": (c_int64, (c_int32, c_int32, c_int32, c_void_p, c_int64, c_void_p)),
    "nv_rows": (None, (POINTER(Matrix), c_void_p, c_int32, c_void_p)),
    "nv_rms_norm": (None, (c_void_p, c_void_p, c_float, c_int32, c_int32, c_void_p, c_int32)),
    "nv_cap": (None, (c_void_p, c_int64, c_float, c_float)),
    "nv_linear": (None, (POINTER(Linear), c_void_p, c_int32, c_void_p)),
    "nv_mlp": (
        None,
        (POINTER(Linear), POINTER(Linear), c_void_p, c_int32, c_int32, c_void_p),
    ),
    "nv_rope_and_cache": (
        None,
        (c_void_p, c_int64, POINTER(Rope), POINTER(Heads), POINTER(Cache), POINTER(Batch)),
    ),
    "nv_attend": (
        None,
        (c_void_p, c_int64, POINTER(Heads), POINTER(Cache), POINTER(Batch), c_void_p),
    ),
    "nv_sample": (
        None,
        (
            c_void_p,
            c_int32,
            c_int64,
            c_void_p,
            c_void_p,
            POINTER(Rows),
            POINTER(Asks),
            c_void_p,
        ),
    ),
    "nv_report": (None, (c_void_p, c_int32, c_int64, c_void_p, c_int64, c_void_p)),
    "nv_decoder": (c_void_p, (POINTER(DecoderParts),)),
    "nv_decoder_free": (None, (c_void_p,)),
    "nv_decoder_forward": (
        c_int64,
        (
            c_void_p,
            c_void_p,
            POINTER(Batch),
            POINTER(Cache),
            c_int64,
            c_void_p,
            c_int64,
            c_void_p,
        ),
    ),
    "nv_decoder_logits": (None, (c_void_p, c_void_p, c_int32, c_void_p)),
}


def path() -> Path | None:
    """Where the library lies, or None if the set-up could not build it."""
    spec = find_spec(MODULE)
    return None if spec is None or spec.origin is None else Path(spec.origin)


def unusable() -> str | None:
    """Why there is no library for this Python, and what to do; None if there is."""
    found = path()
    if found is None:
        return HOW_TO_BUILD
    return None if _interface_of(found) == INTERFACE else HOW_TO_REBUILD


@cache
def _interface_of(found: Path) -> int | None:
    """None: of the time when libraries did not tell."""
    loaded = ctypes.CDLL(str(found))
    return int(loaded.nv_interface()) if hasattr(loaded, "nv_interface") else None


@cache
def library() -> ctypes.CDLL:
    """The loaded library. It must not be `unusable`."""
    found = path()
    assert found is not None
    loaded = ctypes.CDLL(str(found))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def runnable_isas() -> list[str]:
    """The instruction sets that this CPU has and the library is built for, best last."""
    found: list[str] = []
    while (name := library().nv_isa(len(found))) is not None:
        found.append(name.decode())
    return found


def choose_isa() -> str:
    """The best, or what the environment asks for. Raises `ValueError` if the CPU lacks that."""
    found = runnable_isas()
    wanted = os.environ.get(ISA_VARIABLE) or found[-1]
    if wanted not in found:
        raise ValueError(f"{ISA_VARIABLE}: this CPU cannot run {wanted!r}: use one of {found}")
    return wanted


def use(isa: str, *, num_threads: int) -> None:
    """Have all kernels run by this instruction set in so many threads, the caller's included."""
    chosen = library().nv_use(isa.encode(), num_threads)
    assert chosen


def in_use() -> str:
    """What `use` chose, for notes."""
    isa, num_threads = library().nv_isa_in_use().decode(), library().nv_num_threads()
    return f"native kernels for {isa}, {num_threads} threads"
