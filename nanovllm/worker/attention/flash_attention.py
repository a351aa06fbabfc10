"""Attention by the flash-attn packages where they are best: rows with several new tokens.

The rest is `TritonAttention`'s: rows with one token, which FlashAttention-4 does not split over
their keys on Hopper, and small steps. Both read keys and values where they lie in the paged cache.
"""

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from nanovllm.worker.attention.base import AttentionSpec, Rotary
from nanovllm.worker.attention.triton.attention_tuning import Tuning
from nanovllm.worker.attention.triton.backend import TritonAttention
from nanovllm.worker.forward_batch import ForwardBatch

MIN_TOKENS = 512  # fewer are launched faster than the package's Python can call
FLASH_ATTN_4, FLASH_ATTN_2 = "flash_attn.cute", "flash_attn.flash_attn_interface"
BLOCKS_OF_FLASH_ATTN_2 = 256  # its blocks have a multiple of so many slots


def installed_package() -> str | None:
    """The module of flash-attn-4 or else of flash-attn 2; None if there is neither."""
    if find_spec("flash_attn") is None:
        return None
    for module in (FLASH_ATTN_4, FLASH_ATTN_2):
        if find_spec(module) is not None:
            return module
    return None


def arguments_for_4(batch: ForwardBatch) -> dict[str, Tensor]:
    """Of a step's rows, as flash-attn-4 is told; for rows with one token it has nothing to do."""
    counts = batch.query_start_loc.diff()
    return {
        "seqused_q": torch.where(counts > 1, counts, 0),
        "seqused_k": batch.seq_lens,
        "page_table": batch.block_tables,
    }


def arguments_for_2(batch: ForwardBatch) -> dict[str, Tensor]:
    """Likewise, but flash-attn 2 attends for all rows; what it leaves for some is overwritten."""
    ends = batch.seq_lens.cumsum(0, dtype=torch.int32)
    return {
        "cu_seqlens_k": torch.nn.functional.pad(ends, (1, 0)),
        "block_table": batch.block_tables,
    }


class FlashAttention(TritonAttention):
    """Implements `attention.base.AttentionBackend`."""

    def __init__(self, spec: AttentionSpec, tuning: Tuning | None = None) -> None:
        super().__init__(spec, tuning)
        package = installed_package()
        assert package is not None
        self._attend = import_module(package).flash_attn_varlen_func
        is_4 = package == FLASH_ATTN_4
        self._arguments_for = arguments_for_4 if is_4 else arguments_for_2
        self._window = (None, None) if is_4 else (-1, -1)
        if spec.sliding_window is not None:
            self._window = (spec.sliding_window - 1, 0)
        self._serves = False  # whether the step is one for the package
        self._arguments: dict[int, dict[str, Tensor]] = {}  # by group of layers

    @staticmethod
    def unsupported(spec: AttentionSpec) -> str | None:
        """Why not, or None."""
        package = installed_package()
        if spec.device.type != "cuda":
            return f"flash-attn needs a CUDA device, not {spec.device.type}"
        if package is None:
            return "neither flash-attn-4 nor flash-attn is installed"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"flash-attn computes in half precision, not in {spec.dtype}"
        if spec.cache_dtype != spec.dtype:
            return f"flash-attn reads no keys in {spec.cache_dtype}"
        if spec.head_dim % 8 or spec.head_dim > 256:
            return f"flash-attn has no kernel for head_dim {spec.head_dim}"
        if package == FLASH_ATTN_2 and spec.block_size % BLOCKS_OF_FLASH_ATTN_2:
            return f"flash-attn 2 needs a block_size of {BLOCKS_OF_FLASH_ATTN_2}"
        if package == FLASH_ATTN_4 and torch.cuda.get_device_capability(spec.device) < (9, 0):
            return "flash-attn-4 needs compute capability 9.0 (Hopper)"
        if spec.softcap is not None or spec.sinks:
            return "flash-attn is not asked for soft caps or sinks"
        return TritonAttention.unsupported(spec)

    def _prepare_chunks(self, batch: ForwardBatch) -> None:
        self._arguments = {}
        self._serves = batch.num_tokens - batch.num_decode_rows >= MIN_TOKENS
        if not self._serves:
            super()._prepare_chunks(batch)

    def _prefill(
        self,
        qkv: Tensor,
        rotary: Rotary,
        layer_cache: Tensor,
        batch: ForwardBatch,
        sinks: Tensor | None,
    ) -> Tensor:
        if not self._serves:
            return super()._prefill(qkv, rotary, layer_cache, batch, sinks)
        if batch.group not in self._arguments:
            self._arguments[batch.group] = self._arguments_for(batch)
        attended = self._attend(
            rotary.apply(qkv, batch, layer_cache),
            *layer_cache,
            cu_seqlens_q=batch.query_start_loc,
            max_seqlen_q=batch.max_query_len,
            max_seqlen_k=batch.max_seq_len,
            softmax_scale=self._spec.scale,
            causal=True,
            window_size=self._window,
            **self._arguments[batch.group],
        )
        out: Tensor = attended[0] if isinstance(attended, tuple) else attended
        return out
