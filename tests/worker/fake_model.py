"""A model small enough to predict: its next-token logits are an exact function of the context.

It writes each token's "key" to the paged cache and sums keys over the row's context, read back
through the block table, so a wrong slot, position, block or token shows in the logits.
"""

import torch
from torch import Tensor

from nanovllm.worker.forward_batch import ForwardBatch
from nanovllm.worker.kernels.base import Residual
from nanovllm.worker.stage_link import StageLink
from tests.worker.planning import BLOCK_SIZE, VOCAB_SIZE

WIDTH = 64
NUM_BLOCKS = 200
_generator = torch.Generator().manual_seed(0)
KEYS = torch.randint(-8, 9, (VOCAB_SIZE, WIDTH), generator=_generator).float()
READOUT = torch.randint(-3, 4, (WIDTH, VOCAB_SIZE), generator=_generator).float()


def key_of(token_ids: Tensor, positions: Tensor) -> Tensor:
    """[n, WIDTH], small integers, so that sums of them are exact in any order."""
    return KEYS.to(token_ids.device)[token_ids] * (1 + positions % 7)[:, None]


def reference_logits(token_ids: list[int]) -> Tensor:
    """What one sequence alone must get for the token after its last, [VOCAB_SIZE]."""
    keys = key_of(torch.tensor(token_ids), torch.arange(len(token_ids)))
    return keys.sum(0) @ READOUT


def reference(prompt: list[int], num_outputs: int) -> list[int]:
    """Greedy outputs."""
    tokens = list(prompt)
    for _ in range(num_outputs):
        tokens.append(int(reference_logits(tokens).argmax()))
    return tokens[len(prompt) :]


def make_kv_cache(device: str = "cpu") -> Tensor:
    """Full of NaN: whatever is read must have been written."""
    return torch.full((2, 1, NUM_BLOCKS, BLOCK_SIZE, 1, WIDTH), torch.nan, device=device)


class FakeAttention:
    """The fake model attends by itself; this only counts the batches it is shown."""

    shares_prefix = True
    most_at_once = 0

    def __init__(self) -> None:
        self.num_prepared = 0
        self.last: ForwardBatch | None = None

    @staticmethod
    def unsupported(spec: object) -> str | None:
        return None

    @staticmethod
    def kv_shape(spec: object, *, num_layers: int, num_blocks: int) -> tuple[int, ...]:
        return (2, num_layers, num_blocks, BLOCK_SIZE, 1, WIDTH)

    def prepare(self, batch: ForwardBatch) -> None:
        self.num_prepared += 1
        self.last = batch

    def forward(self, query: Tensor, layer_cache: Tensor, batch: ForwardBatch) -> Tensor:
        raise AssertionError("not reached")


class FakeModel:
    """`max_logit_rows` is the most logits rows it was asked for at once."""

    link: StageLink | None = None

    def __init__(self) -> None:
        self.max_logit_rows = 0

    def forward(
        self, batch: ForwardBatch, kv_cache: Tensor, *, wanted: Tensor | None = None
    ) -> Residual:
        slots = kv_cache[0, 0].view(-1, WIDTH)
        slots[batch.slot_mapping] = key_of(batch.input_ids, batch.positions)
        hidden = kv_cache.new_empty(batch.num_tokens, WIDTH)
        starts = batch.query_start_loc.tolist()
        for row in range(batch.num_rows):
            end = int(batch.seq_lens[row])
            places = torch.arange(end, device=kv_cache.device)
            block_ids = batch.block_tables[row, places // BLOCK_SIZE].long()
            context = slots[block_ids * BLOCK_SIZE + places % BLOCK_SIZE].cumsum(0)  # [end, WIDTH]
            num_new = starts[row + 1] - starts[row]
            hidden[starts[row] : starts[row + 1]] = context[end - num_new :]
        return Residual(hidden if wanted is None else hidden[wanted])

    def compute_logits(self, residual: Residual) -> Tensor:
        self.max_logit_rows = max(self.max_logit_rows, len(residual.hidden))
        return residual.hidden @ READOUT.to(residual.hidden.device)

    def raw_logits(self, residual: Residual) -> Tensor:
        return self.compute_logits(residual)

    def own_logits(self, residual: Residual) -> Tensor:
        return self.compute_logits(residual)
