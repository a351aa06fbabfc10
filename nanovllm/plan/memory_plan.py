"""What goes into a device's memory, as arithmetic on plain data; no torch and no device.

`nanovllm plan` prints a `MemoryPlan`, the worker checks one before it loads and sizes the KV cache
by `fit_blocks`. KV gets what the rest leaves. Everything is in bytes.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from nanovllm.checkpoint.kv_layout import KVLayout, kv_layout, most_blocks, token_size
from nanovllm.checkpoint.model_size import ModelSize
from nanovllm.checkpoint.quantization import AT_LOAD, Scheme, bytes_per_linear_weight
from nanovllm.checkpoint.spec import (
    DecoderSpec,
    Dense,
    MoE,
    WeightGroup,
    count_parameters,
    expert_weights,
    num_idle_weights,
)
from nanovllm.checkpoint.stages import Stage, part_of
from nanovllm.config import CacheConfig, StepLimits
from nanovllm.plan.precision import Precision
from nanovllm.protocol.plan import num_mask_lines

GIB = 2**30
NUM_RESERVED = 1  # block 0, which padding reads and writes
CPU_MAX_BYTES = 4 * GIB
CPU_SHARE_OF_FREE = 0.25
CPU_FIRST_BYTES = 128 * 2**20  # of KV, or as much as the weights take: what prefixes may fill
# A sampled row at its heaviest. On a GPU: logits as the model has them, edited ones in fp32, and
# counts. In plain torch: logits, a raw copy, a penalized copy and counts, in fp32.
GPU_BYTES_PER_LOGIT = 10
SAMPLER_BYTES_PER_LOGIT = 17
SPLITS_PER_ROW = 48  # partial results of decode attention, fp32, in scratch
GRAPH_BYTES_PER_KERNEL = 16 * 1024
KERNELS_PER_LAYER = 8
RECORD_WORDS = 13  # sampling parameters of a row
SHORTEST_WORTH_NAMING = 256  # tokens: nobody lowers max_model_len further than this
_S = TypeVar("_S", bound=msgspec.Struct)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device. taken_bytes: in use before the engine brings weights (its context, others)."""

    name: str
    memory_bytes: int
    taken_bytes: int
    is_gpu: bool


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """One configuration of one model on one device; every figure follows from the fields.

    num_ranks: devices that share weights and KV heads between them; figures are those of one.
    spreads_experts: as in `worker.parallel`; figures are those of a rank that holds the most.
    stage: of a pipeline, if figures are those of one. layout: of the KV cache, if it is not the
    model's own, or the stage's.
    """

    size: ModelSize
    machine: Machine
    precision: Precision
    cache: CacheConfig
    limits: StepLimits
    max_model_len: int
    num_ranks: int = 1
    spreads_experts: bool = False
    stage: Stage | None = None
    layout: KVLayout | None = None

    @property
    def spec(self) -> DecoderSpec:
        return self.size.spec

    @cached_property
    def _own(self) -> DecoderSpec:
        """With the stage's layers alone."""
        return self.spec if self.stage is None else part_of(self.spec, self.stage)

    @property
    def _parameters(self) -> dict[WeightGroup, int]:
        """Of the stage's weights, all ranks'."""
        if self.stage is None:
            return self.size.parameters
        counts = count_parameters(self._own)
        if not self.stage.holds_embedding(self.spec):
            counts["embedding"] = 0
        if not self.stage.is_last:
            counts["head"] = 0
        return counts

    @property
    def _samples(self) -> bool:
        return self.stage is None or self.stage.is_last

    # ---- what is there before KV

    @property
    def weight_bytes(self) -> dict[WeightGroup, int]:
        """Of each group of weights."""
        sizes: dict[WeightGroup, int] = {}
        for group, count in self._parameters.items():
            shared = 1 if group == "norms" else self.num_ranks
            sizes[group] = int(count * self.precision.bytes_per_weight(group)) // shared
        if self.spreads_experts:
            over = sum(
                count * self.most_experts(mixture) // mixture.num_experts - count // self.num_ranks
                for mixture, count in expert_weights(self._own)
            )
            sizes["mlp"] += int(over * self.precision.linear_bytes)
        if self.precision.is_native:
            stored, is_plain = self.size.stored_bytes, not self.precision.is_quantized
            return dict(stored) if stored is not None and is_plain else sizes
        if not self.machine.is_gpu and self.spec.tied_embeddings and self._samples:
            sizes["head"] = sizes["embedding"]  # torch multiplies by a copy in oneDNN's layout
        return sizes

    def most_experts(self, mixture: MoE) -> int:
        """That one rank holds of a layer's."""
        return -(-mixture.num_experts // (self.num_ranks if self.spreads_experts else 1))

    @property
    def num_active_parameters(self) -> int:
        """That a token passes through: all but those of experts it is not sent to."""
        return self.size.num_parameters - num_idle_weights(self.spec)

    @property
    def active_bytes(self) -> int:
        """Of weights that one token alone reads on a device, on the average of devices: of the
        embedding a row."""
        sizes = self.weight_bytes
        idle = int(num_idle_weights(self._own) * self.precision.linear_bytes) // self.num_ranks
        head = (sizes["head"] or sizes["embedding"]) if self._samples else 0
        return sum(sizes[group] for group in ("attention", "mlp", "norms")) - idle + head

    @property
    def row_bytes(self) -> int:
        """Tokens, block tables and parameters of every sequence, the table of masks (a CPU's takes
        no memory before it is used), and the rotary table."""
        columns = math.ceil(self.max_model_len / self.cache.block_size)
        words = self.max_model_len + columns * len(self._layout.windows) + RECORD_WORDS
        tables = {(attention.rope, attention.head_dim) for attention in self.spec.attentions}
        rotary = self.max_model_len * sum(head_dim for _, head_dim in tables) * 4
        num_seqs, vocab_size = self.limits.max_num_seqs, self.spec.vocab_size
        num_masks = num_mask_lines(vocab_size=vocab_size, max_num_seqs=num_seqs)
        masks = num_masks * 4 * -(-vocab_size // 32) * self.machine.is_gpu
        return (num_seqs + 1) * words * 4 + masks + rotary

    @property
    def activation_bytes(self) -> int:
        """Most that the heaviest step holds at once, and the scratch of attention."""
        num_samples = min(self.limits.max_num_seqs, self.limits.max_num_batched_tokens)
        num_tokens = min(self.limits.max_num_batched_tokens, num_samples * self.max_model_len)
        each = GPU_BYTES_PER_LOGIT if self.machine.is_gpu else SAMPLER_BYTES_PER_LOGIT
        sampler = num_samples * self.spec.vocab_size * each * self._samples
        layer = num_tokens * self._layer_values * (4 if not self.machine.is_gpu else self._bytes)
        states = 2 * num_tokens * self.spec.hidden_size * self._bytes
        return max(layer, sampler + states) + self._attention_scratch

    @property
    def graph_bytes(self) -> int:
        """About what graphs of all sizes take, in what gpu_memory_utilization leaves free."""
        if not self.machine.is_gpu:
            return 0
        num_rows = self.limits.max_num_seqs
        num_graphs = 15 + num_rows // 32
        nodes = num_graphs * self._own.num_layers * KERNELS_PER_LAYER * GRAPH_BYTES_PER_KERNEL
        return nodes + num_rows * (self.spec.vocab_size + self._layer_values) * self._bytes

    @property
    def fixed_bytes(self) -> int:
        """All but KV that the engine brings."""
        return sum(self.weight_bytes.values()) + self.row_bytes + self.activation_bytes

    # ---- KV

    @property
    def bytes_per_token(self) -> int:
        """Of KV, in all layers, while a token is within all windows."""
        own = (layer.attention for layer in self._own.layers if layer.keys_of is None)
        values = 2 * sum(token_size(attention, self.num_ranks) for attention in own)
        return math.ceil(values * self.precision.kv_bytes)

    @property
    def bytes_per_block(self) -> int:
        """Of KV of `block_size` tokens in the layers of one group."""
        least = min(token_size(attention, self.num_ranks) for attention in self.spec.attentions)
        values = 2 * self._layout.layers_per_block * least
        return math.ceil(values * self.precision.kv_bytes) * self.cache.block_size

    @property
    def _layout(self) -> KVLayout:
        return self.layout or kv_layout(self.spec, num_ranks=self.num_ranks, stage=self.stage)

    @property
    def budget_bytes(self) -> int:
        """What the engine may take for everything it brings."""
        machine = self.machine
        share = self.cache.gpu_memory_utilization if machine.is_gpu else 1.0
        return int(machine.memory_bytes * share) - machine.taken_bytes

    @property
    def num_blocks(self) -> int:
        """How many KV blocks there would be, the reserved one included; perhaps too few."""
        left = self.budget_bytes - self.fixed_bytes
        if not self.machine.is_gpu:
            left = cpu_memory_budget(left)
        return count_blocks(
            self.cache,
            bytes_per_block=self.bytes_per_block,
            memory_bytes=left,
            blocks_per_sequence=self.blocks_for(self.max_model_len),
            max_num_seqs=self.limits.max_num_seqs,
        )

    @property
    def kv_cache_bytes(self) -> int:
        return self.num_blocks * self.bytes_per_block

    @property
    def num_kv_tokens(self) -> int:
        """That fit, were none behind a window."""
        return self.num_tokens_in(self.num_blocks)

    def num_tokens_in(self, num_blocks: int) -> int:
        """That fit into so many blocks, the reserved one included, were none behind a window."""
        usable = max(0, num_blocks - NUM_RESERVED)
        return usable // len(self._layout.windows) * self.cache.block_size

    def num_sequences(self, length: int) -> int:
        """How many sequences of `length` tokens have room at once, whatever max_num_seqs says."""
        return self.num_sequences_in(self.num_blocks, length)

    def num_sequences_in(self, num_blocks: int, length: int) -> int:
        """The same for so many blocks, the reserved one included. A step's tokens lie within all
        windows, but whosever they are there are no more than `max_num_batched_tokens`."""
        settled = self._most_blocks(length, step_tokens=1)
        usable = max(0, num_blocks - NUM_RESERVED) - (self.blocks_for(length) - settled)
        return max(0, usable) // settled

    # ---- whether it fits, and what would

    @property
    def fits(self) -> bool:
        """Whether everything has room, with KV for at least one sequence of full length."""
        room = self.machine.memory_bytes - self.machine.taken_bytes
        explicit = self.fixed_bytes + self.kv_cache_bytes <= room
        return explicit and self.num_sequences(self.max_model_len) >= 1

    @property
    def is_hopeless(self) -> bool:
        """Whether it cannot fit even if steps took nothing: no estimate is in this."""
        brought = sum(self.weight_bytes.values()) + self.row_bytes
        one = (self.blocks_for(self.max_model_len) + NUM_RESERVED) * self.bytes_per_block
        room = self.machine.memory_bytes - self.machine.taken_bytes
        if self.kv_bytes_asked:
            return brought + self.kv_bytes_asked > room
        return brought + one > self.budget_bytes

    @property
    def needed_bytes(self) -> int:
        """The least memory of a device that this would fit, at the same share."""
        blocks = self.blocks_for(self.max_model_len) + NUM_RESERVED
        kv = max(blocks * self.bytes_per_block, self.kv_bytes_asked)
        share = self.cache.gpu_memory_utilization if self.machine.is_gpu else 1.0
        if not self.machine.is_gpu:
            kv = math.ceil(kv / CPU_SHARE_OF_FREE)
        return math.ceil((self.fixed_bytes + kv + self.machine.taken_bytes) / share)

    @property
    def longest_that_fits(self) -> int:
        """The largest max_model_len with room for one sequence; 0 if there is none."""
        low, high = 0, self.max_model_len // self.cache.block_size
        while low < high:
            middle = (low + high + 1) // 2
            shorter = replace(self, max_model_len=middle * self.cache.block_size)
            low, high = (middle, high) if shorter.fits else (low, middle - 1)
        return self.max_model_len if self.fits else low * self.cache.block_size

    @property
    def _bytes(self) -> int:
        return self.precision.value_bytes

    @property
    def kv_bytes_asked(self) -> int:
        """What the configuration fixes for KV; 0 if it leaves that to be measured."""
        if self.cache.num_gpu_blocks_override is not None:
            return self.cache.num_gpu_blocks_override * self.bytes_per_block
        return self.cache.kv_cache_memory_bytes or 0

    @property
    def _layer_values(self) -> int:
        """Most values a layer holds per token: those of attention or of its MLP, and the residual,
        which is there twice beside an MLP."""
        hidden, halves = self.spec.hidden_size, list[int]()
        for layer in self._own.layers:
            attention, mlp = layer.attention, layer.mlp
            num_heads = 2 * attention.num_heads + 2 * attention.num_kv_heads  # queries come twice
            halves.append(hidden + num_heads * attention.head_dim // self.num_ranks)
            is_cut = isinstance(mlp, Dense) or not self.spreads_experts
            inner = mlp.intermediate_size // (self.num_ranks if is_cut else 1)
            if layer.experts is not None:
                inner += layer.experts.top_k * (hidden + layer.experts.intermediate_size)
            if isinstance(mlp, MoE):  # what each of a token's experts makes of it, and between
                halves.append(2 * hidden + mlp.top_k * (hidden + inner))
            else:
                halves.append(2 * hidden + 3 * inner)  # gate, up and their product
        return max(halves)

    @property
    def _attention_scratch(self) -> int:
        if not self.machine.is_gpu:
            return 0
        num_rows = 1 << (self.limits.max_num_seqs - 1).bit_length()
        return sum(
            num_rows * attention.num_heads // self.num_ranks * SPLITS_PER_ROW * width * 4
            for attention in self.spec.attentions
            for width in (attention.head_dim + 2,)
        )

    def blocks_for(self, length: int) -> int:
        """How many blocks a sequence of `length` tokens holds at most."""
        return self._most_blocks(length, step_tokens=self.limits.max_num_batched_tokens)

    def _most_blocks(self, length: int, *, step_tokens: int) -> int:
        size = self.cache.block_size
        return most_blocks(self._layout.windows, length, block_size=size, step_tokens=step_tokens)


def remedies(plan: MemoryPlan) -> list[str]:
    """What would make `plan` fit, each by itself and each tried; ends with more memory."""
    found = []
    for text, changed in ("", plan), *_quantized(plan):
        longest = changed.longest_that_fits
        if longest < SHORTEST_WORTH_NAMING:
            continue
        shorter = f"max_model_len={longest}" if longest < plan.max_model_len else ""
        found.append(" with ".join(filter(None, (text, shorter))))
    found += [text for text, changed in _variants(plan) if changed.fits]
    needed = f"{plan.needed_bytes / GIB:.1f} GiB"
    found.append(f"a GPU of at least {needed}" if plan.machine.is_gpu else f"{needed} free")
    return found


def _variants(plan: MemoryPlan) -> Iterator[tuple[str, MemoryPlan]]:
    """Changes of configuration that take less, and what they are called."""
    limits, machine = plan.limits, plan.machine
    tokens, seqs = min(limits.max_num_batched_tokens, 2048), min(limits.max_num_seqs, 32)
    smaller = {"max_num_batched_tokens": tokens, "max_num_seqs": seqs}
    text = ", ".join(f"{name}={value}" for name, value in smaller.items())
    yield text, replace(plan, limits=_with(limits, **smaller))
    share = 0.97
    if machine.is_gpu and plan.cache.gpu_memory_utilization < share:
        cache = _with(plan.cache, gpu_memory_utilization=share)
        yield f"gpu_memory_utilization={share}", replace(plan, cache=cache)
    if plan.kv_bytes_asked:
        cache = _with(plan.cache, num_gpu_blocks_override=None, kv_cache_memory_bytes=None)
        yield "the KV size left to be measured", replace(plan, cache=cache)


def _quantized(plan: MemoryPlan) -> Iterator[tuple[str, MemoryPlan]]:
    """The same with weights, KV, or both in fewer bits."""
    if not plan.machine.is_gpu:
        return
    kv = replace(plan.precision, kv_bytes=1)
    if plan.precision.is_quantized:  # by its checkpoint, or asked for
        yield "kv_cache_dtype=fp8", replace(plan, precision=kv)
        return
    linear_bytes = bytes_per_linear_weight(
        plan.spec,
        Scheme.at_load("fp8"),
        value_bytes=plan.precision.value_bytes,
        num_ranks=plan.num_ranks,
        copies=plan.precision.dtype == "bfloat16",
    )
    weights = replace(plan.precision, linear_bytes=linear_bytes)
    is_less = linear_bytes < plan.precision.value_bytes  # copies of small layers may outweigh it
    if is_less:
        yield "quantization=fp8", replace(plan, precision=weights)
    yield "kv_cache_dtype=fp8", replace(plan, precision=kv)
    if is_less:
        both = replace(weights, kv_bytes=1)
        yield "quantization=fp8 and kv_cache_dtype=fp8", replace(plan, precision=both)
    weights = replace(plan.precision, linear_bytes=AT_LOAD["int4"].bytes_per_weight)
    yield "quantization=int4", replace(plan, precision=weights)


def _with(struct: _S, **changes: Any) -> _S:
    """A frozen config with other values."""
    return msgspec.structs.replace(struct, **changes)


def explain(plan: MemoryPlan) -> str:
    """Why `plan` does not fit and what would make it, in a sentence each."""
    assert not plan.fits
    machine, kv = plan.machine, plan.blocks_for(plan.max_model_len) * plan.bytes_per_block
    return (
        f"{plan.spec.architecture} with {plan.size.num_parameters / 1e9:.2f} billion parameters "
        f"does not fit {machine.name}: of {machine.memory_bytes / GIB:.1f} GiB the engine may take "
        f"{max(0, plan.budget_bytes) / GIB:.1f}, and it needs "
        f"{sum(plan.weight_bytes.values()) / GIB:.1f} for weights in {plan.precision.dtype}, "
        f"{(plan.row_bytes + plan.activation_bytes) / GIB:.1f} for the heaviest step, and "
        f"{max(kv, plan.kv_bytes_asked) / GIB:.1f} for KV (one sequence of "
        f"{plan.max_model_len} tokens takes {kv / GIB:.1f}). "
        f"What would do: {'; or '.join(remedies(plan))}"
    )


def count_blocks(
    cache: CacheConfig,
    *,
    bytes_per_block: int,
    memory_bytes: int,
    blocks_per_sequence: int,
    max_num_seqs: int,
) -> int:
    """How many blocks `cache` asks for or memory holds, block 0 included.

    memory_bytes: what may be used if `cache` does not say it; never more is taken than
    `max_num_seqs` sequences of full length could fill, each `blocks_per_sequence`.
    """
    if cache.num_gpu_blocks_override is not None:
        return cache.num_gpu_blocks_override
    if cache.kv_cache_memory_bytes is not None:
        return cache.kv_cache_memory_bytes // bytes_per_block
    most = NUM_RESERVED + max_num_seqs * blocks_per_sequence
    return min(max(0, memory_bytes) // bytes_per_block, most)


def fit_blocks(
    cache: CacheConfig,
    *,
    bytes_per_block: int,
    memory_bytes: int,
    max_model_len: int,
    blocks_for: Callable[[int], int],
    max_num_seqs: int,
) -> int:
    """`count_blocks`; `ValueError` if not one sequence of `max_model_len` fits. blocks_for: as
    `MemoryPlan.blocks_for`."""
    blocks_per_sequence = blocks_for(max_model_len)
    num_blocks = count_blocks(
        cache,
        bytes_per_block=bytes_per_block,
        memory_bytes=memory_bytes,
        blocks_per_sequence=blocks_per_sequence,
        max_num_seqs=max_num_seqs,
    )
    usable = max(0, num_blocks - NUM_RESERVED)
    if usable < blocks_per_sequence:
        num_bytes = bytes_per_block * (blocks_per_sequence + NUM_RESERVED)
        lengths = range(0, max_model_len, cache.block_size)
        fits = lengths[bisect_right(lengths, usable, key=blocks_for) - 1]
        shorter = f"set max_model_len to at most {fits}, or " if fits >= 2 else ""
        raise ValueError(
            f"max_model_len: a sequence of {max_model_len} tokens needs {blocks_per_sequence} KV "
            f"blocks (with the reserved one {num_bytes:,} bytes), and {usable} fit: "
            f"{shorter}raise kv_cache_memory_bytes, gpu_memory_utilization or "
            "num_gpu_blocks_override"
        )
    return num_blocks


def cpu_memory_budget(free_bytes: int) -> int:
    """Bytes a CPU engine gives to KV by default: a quarter of free memory, at most 4 GiB.

    The system takes memory only as blocks are first written, so this is a limit, not a cost.
    """
    return min(CPU_MAX_BYTES, int(max(0, free_bytes) * CPU_SHARE_OF_FREE))


def cpu_first_blocks(bytes_per_block: int, *, weight_bytes: int) -> int:
    """How many blocks fill up with cached prefixes before any other is touched: a cache that one
    may have at once needs memory for good, and on a CPU other programs want it, too."""
    return max(1, max(CPU_FIRST_BYTES, weight_bytes) // bytes_per_block)


def free_memory() -> int:
    """Bytes that programs could still take; all the machine's where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            name, _, amount = line.partition(":")
            if name == "MemAvailable":
                return int(amount.removesuffix("kB")) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
