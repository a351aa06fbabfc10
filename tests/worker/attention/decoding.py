"""Drives a `Decoder` without runner, rows or core: batches made by hand, blocks by a counter."""

from dataclasses import dataclass, field

import torch
from msgspec.structs import replace
from torch import Tensor

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.kv_layout import kv_layout
from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.checkpoint.quantization import Scheme
from nanovllm.worker.attention.select import attention_specs, select_attention
from nanovllm.worker.forward_batch import ForwardBatch
from nanovllm.worker.kernels.base import Kernels, Residual
from nanovllm.worker.kernels.torch.layer_kernels import TorchKernels
from nanovllm.worker.kv_cache import allocate
from nanovllm.worker.model_runner import Model
from nanovllm.worker.models.decoder import Decoder
from nanovllm.worker.parallel import SINGLE, TensorParallel
from nanovllm.worker.weights import load_weights

CPU = torch.device("cpu")


def make_batch(
    rows: list[tuple[list[int], int]], tables: list[list[int]], *, block_size: int
) -> ForwardBatch:
    """rows: each its new ids and how many tokens came before; tables: each its block ids."""
    positions = [torch.arange(start, start + len(ids)) for ids, start in rows]
    padded = torch.zeros(len(tables), max(map(len, tables)), dtype=torch.int32)
    for row, table in enumerate(tables):
        padded[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
    slots = [
        padded[row, p // block_size].long() * block_size + p % block_size
        for row, p in enumerate(positions)
    ]
    counts = [len(ids) for ids, _ in rows]
    seq_lens = [start + len(ids) for ids, start in rows]
    return ForwardBatch(
        input_ids=torch.tensor([token for ids, _ in rows for token in ids]),
        positions=torch.cat(positions),
        slot_mapping=torch.cat(slots),
        query_start_loc=torch.tensor([0, *counts]).cumsum(0).int(),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_tables=padded,
        num_tokens=sum(counts),
        num_rows=len(rows),
        num_decode_rows=counts.count(1),
        max_query_len=max(counts),
        max_seq_len=max(seq_lens),
    )


@dataclass
class Driver:
    """A loaded model with a cache; `run` advances named sequences by some tokens each."""

    model: Decoder
    step: Model  # of its weights: itself, or native steps
    kv_cache: Tensor
    block_size: int
    lengths: dict[str, int] = field(default_factory=dict)
    # Of each group of layers, which take blocks of one pool.
    tables: dict[str, list[list[int]]] = field(default_factory=dict)
    num_taken: int = 0

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype = torch.float32,
        block_size: int = 4,
        scheme: Scheme | None = None,
        kv_dtype: torch.dtype | None = None,
        kernels: Kernels | None = None,
        parallel: TensorParallel = SINGLE,
    ) -> "Driver":
        spec = replace(spec_from_config(checkpoint.config()), max_position_embeddings=512)
        specs = attention_specs(
            spec,
            block_size=block_size,
            dtype=dtype,
            device=CPU,
            kv_dtype=kv_dtype,
            parallel=parallel,
        )
        attention, _ = select_attention("auto", specs)
        kernels = kernels or TorchKernels()
        model = Decoder(
            spec,
            kernels=kernels,
            attention=attention,
            dtype=dtype,
            device=CPU,
            scheme=scheme,
            parallel=parallel,
        )
        layout = kv_layout(spec, num_ranks=parallel.size, stage=model.stage)
        model.lay_out(layout)
        load_weights(
            model,
            checkpoint,
            load_format="auto",
            seed=0,
            on_progress=lambda *_: None,
        )
        shape = attention.kv_shape(num_layers=layout.layers_per_block, num_blocks=1024)
        kv_cache = allocate(shape, dtype=attention.spec.cache_dtype, device=CPU)
        return cls(model, model, kv_cache, block_size)

    @torch.inference_mode()
    def run(self, new: dict[str, list[int]]) -> dict[str, Tensor]:
        """One step over all of `new`. Returns each sequence's logits, [new tokens, vocab_size]."""
        logits = self.run_batch(new)
        return dict(zip(new, logits.split([len(ids) for ids in new.values()]), strict=True))

    @torch.inference_mode()
    def run_batch(self, new: dict[str, list[int]], *, wanted: Tensor | None = None) -> Tensor:
        """`run`, with the logits of all tokens, or of those wanted, as they lie in the batch."""
        return self.step.compute_logits(self.run_stage(new, wanted=wanted))

    @torch.inference_mode()
    def run_stage(
        self,
        new: dict[str, list[int]],
        *,
        wanted: Tensor | None = None,
        received: Tensor | None = None,
    ) -> Residual:
        """What the last layer leaves. received: what the stage before has left."""
        sizes = [self.block_size // count for count in self.model.layout.blocks]
        rows = [(ids, self.lengths.get(name, 0)) for name, ids in new.items()]
        for name, (ids, start) in zip(new, rows, strict=True):
            self.lengths[name] = start + len(ids)
            tables = self.tables.setdefault(name, [[] for _ in sizes])
            for table, size in zip(tables, sizes, strict=True):
                while len(table) * size < self.lengths[name]:
                    self.num_taken += 1  # blocks of the sequences interleave; block 0 is not taken
                    table.append(self.num_taken)
        batch, *others = (
            make_batch(rows, [self.tables[name][group] for name in new], block_size=size)
            for group, size in enumerate(sizes)
        )
        batch.others = tuple(others)
        for group, other in enumerate(others, 1):
            other.group = group
        batch.received = received
        self.model.attention.prepare(batch)
        return self.step.forward(batch, self.kv_cache, wanted=wanted)
