"""Attention by the flash-attn packages where they are best: rows with several new tokens.

The rest is `TritonAttention`'s: rows with one token, which FlashAttention-4 does not split over
their keys on Hopper. Of a fresh step keys and values are taken where the product left them; else
they are gathered from their blocks first, which costs a few percent of attending to them and makes
any block size do, but needs to know how many there are, and so is not done in graphs.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from nanovllm.worker.attention.base import AttentionSpec
from nanovllm.worker.attention.triton_attention import TritonAttention
from nanovllm.worker.attention.triton_tuning import Tuning
from nanovllm.worker.forward_batch import ForwardBatch, slots_of
from nanovllm.worker.layers.rotary import Rotary

MAX_GATHERED_KEYS = 65536  # rows of more, together, attend over their blocks
MIN_TOKENS = 512  # fewer are launched faster than the package's Python can call


@dataclass(frozen=True, slots=True)
class Gathering:
    """Where the keys of a step's rows with several tokens lie, one row after the other."""

    slots: Tensor | None  # [num_keys] int64; None: they are the step's own, of all its rows
    starts: Tensor  # [num_rows + 1] int32; rows with one token have no keys here


def installed_package() -> str | None:
    """The module of flash-attn-4 or else of flash-attn 2; None if there is neither."""
    if find_spec("flash_attn") is None:
        return None
    for module in ("flash_attn.cute", "flash_attn.flash_attn_interface"):
        if find_spec(module) is not None:
            return module
    return None


class FlashAttention(TritonAttention):
    """Implements `attention.base.AttentionBackend`."""

    tells_fresh = True

    def __init__(self, spec: AttentionSpec, tuning: Tuning | None = None) -> None:
        super().__init__(spec, tuning)
        if installed_package() == "flash_attn.cute":
            from flash_attn.cute import flash_attn_varlen_func

            no_window: int | None = None
        else:
            from flash_attn.flash_attn_interface import flash_attn_varlen_func

            no_window = -1
        self._attend = flash_attn_varlen_func
        self._window = no_window, no_window
        if spec.sliding_window is not None:
            self._window = spec.sliding_window - 1, 0
        self._gathering: Gathering | None = None
        self._gathered: Tensor | None = None  # [2, MAX_GATHERED_KEYS, num_kv_heads, head_dim]

    @staticmethod
    def unsupported(spec: AttentionSpec) -> str | None:
        """Why not, or None."""
        if spec.device.type != "cuda":
            return f"flash-attn needs a CUDA device, not {spec.device.type}"
        if installed_package() is None:
            return "neither flash-attn-4 nor flash-attn is installed"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"flash-attn computes in half precision, not in {spec.dtype}"
        if spec.cache_dtype != spec.dtype:
            return f"keys are gathered as they are stored, in {spec.cache_dtype}"
        if spec.head_dim % 8 or spec.head_dim > 256:
            return f"flash-attn has no kernel for head_dim {spec.head_dim}"
        if installed_package() == "flash_attn.cute" and (
            torch.cuda.get_device_capability(spec.device) < (9, 0)
        ):
            return "flash-attn-4 needs compute capability 9.0 (Hopper)"
        return TritonAttention.unsupported(spec)

    def prepare(self, batch: ForwardBatch) -> None:
        super().prepare(batch)
        num_keys, num_tokens = batch.num_chunk_keys, batch.num_tokens - batch.num_decode_rows
        self._gathering = None
        if batch.is_fresh:
            if batch.num_tokens >= MIN_TOKENS:
                self._gathering = Gathering(None, batch.query_start_loc)
        elif num_tokens >= MIN_TOKENS and num_keys <= MAX_GATHERED_KEYS:
            self._gathering = gathering_of(batch, block_size=self._spec.block_size)

    def _prefill(
        self, qkv: Tensor, rotary: Rotary, layer_cache: Tensor, batch: ForwardBatch
    ) -> Tensor:
        if self._gathering is None:
            return super()._prefill(qkv, rotary, layer_cache, batch)
        query, slots = rotary.apply(qkv, batch, layer_cache), self._gathering.slots
        if slots is None:
            heads = qkv.view(len(qkv), -1, self._spec.head_dim)[:, self._spec.num_heads :]
            keys, values = heads.tensor_split(2, dim=1)
        else:
            keys, values = self._gather(layer_cache, slots)
        attended = self._attend(
            query,
            keys,
            values,
            cu_seqlens_q=batch.query_start_loc,
            cu_seqlens_k=self._gathering.starts,
            max_seqlen_q=batch.max_query_len,
            max_seqlen_k=batch.max_seq_len,
            softmax_scale=self._spec.scale,
            causal=True,
            window_size=self._window,
        )
        out: Tensor = attended[0] if isinstance(attended, tuple) else attended
        return out

    def _gather(self, layer_cache: Tensor, slots: Tensor) -> Tensor:
        """What lies in those slots, [2, num_slots, num_kv_heads, head_dim]."""
        spec, num_slots = self._spec, len(slots)
        if self._gathered is None:
            shape = 2, MAX_GATHERED_KEYS, spec.num_kv_heads * spec.head_dim
            self._gathered = torch.empty(shape, dtype=layer_cache.dtype, device=spec.device)
        for half, gathered in zip(layer_cache, self._gathered, strict=True):
            torch.index_select(half.flatten(0, 1).flatten(1), 0, slots, out=gathered[:num_slots])
        return self._gathered[:, :num_slots].view(2, num_slots, spec.num_kv_heads, spec.head_dim)


def gathering_of(batch: ForwardBatch, *, block_size: int) -> Gathering:
    """On the device; asks the host nothing."""
    counts = batch.query_start_loc.diff()
    lens = torch.where(counts > 1, batch.seq_lens, 0)
    starts = torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
    device = lens.device
    rows = torch.arange(batch.num_rows, device=device)
    rows = rows.repeat_interleave(lens, output_size=batch.num_chunk_keys)
    positions = torch.arange(batch.num_chunk_keys, device=device) - starts[rows]
    return Gathering(slots_of(batch.block_tables, rows, positions, block_size), starts)
