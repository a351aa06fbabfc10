"""Ranks that share a model between them: each reads its slices, and sums meet where they must."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.checkpoint.num_ranks import check_num_ranks, possible_num_ranks
from nanovllm.checkpoint.quantization import Scheme, choose_scheme
from nanovllm.worker.kernels.torch.layer_kernels import TorchKernels
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.parallel import SEGMENT, SINGLE, Cut, TensorParallel
from tests.conftest import TINY, save_tiny
from tests.moe_models import TINY_MOE
from tests.worker.attention.decoding import Driver
from tests.worker.quant.layouts import FORMATS, write

# Whose experts are spread over how many ranks; of mixtral_one there are 3.
SPREAD = [(name, 2) for name in (*TINY_MOE, "gemma4_moe")]
SPREAD += [("mixtral", 4), ("gpt_oss", 4), ("glm4_moe", 4)]
# Halves are whole groups and blocks, and heads turn whole.
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128}
WIDE |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
# To their residual than to add to it.
DO_MORE = ("olmo2", "olmo3", "gemma", "cohere", "glm4")
PROMPT = torch.randint(3, 160, (23,), generator=torch.Generator().manual_seed(1)).tolist()


@dataclass
class Meeting:
    """Where threads add up what each has."""

    size: int
    parts: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._barrier = threading.Barrier(self.size, timeout=60)

    def stack(self, rank: int, part: Tensor) -> Tensor:
        self.parts[rank] = part
        self._barrier.wait()
        parts = torch.stack([self.parts[rank] for rank in range(self.size)])
        self._barrier.wait()
        return parts


@dataclass(frozen=True)
class Thread(TensorParallel):
    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def reduce(self, partial: Tensor) -> Tensor:
        return self.meeting.stack(self.rank, partial).sum(0)


@dataclass
class Rows:
    """Sums of 4 tokens or more by rows, as threads make them."""

    rank: int
    meeting: Meeting
    num_columns: int
    partial: Tensor = field(default_factory=lambda: torch.empty(0))
    num_sums: int = 0

    def takes(self, num_tokens: int) -> bool:
        return num_tokens >= 4

    def share(self, rank: int, num_tokens: int) -> slice:
        each = -(-num_tokens // self.meeting.size)
        return slice(min(rank * each, num_tokens), min((rank + 1) * each, num_tokens))

    def places(self, num_tokens: int) -> Iterator[tuple[slice, Tensor]]:
        """In two pieces."""
        self.partial = torch.full((num_tokens, self.num_columns), torch.nan)
        for tokens in (slice(0, 3), slice(3, num_tokens)):
            yield tokens, self.partial[tokens]

    def add_normed(self, residual: Tensor, norm: RMSNorm, num_tokens: int) -> Tensor:
        self.num_sums += 1
        total = self.meeting.stack(self.rank, self.partial).sum(0)
        own = self.share(self.rank, num_tokens)
        assert len(residual) == own.stop - own.start
        residual += total[own]
        whole = torch.zeros_like(total)
        whole[own] = TorchKernels().rms_norm(residual, norm)
        return self.meeting.stack(self.rank, whole).sum(0)


def logits_of_ranks(
    checkpoint: Checkpoint,
    size: int,
    scheme: Scheme | None = None,
    *,
    spreads_experts: bool = False,
    rows: Sequence[Rows | None] = (None,) * 4,
) -> list[Tensor]:
    """Each rank's logits of the prompt, in chunks of 9 and one token at last."""
    meeting = Meeting(size)

    def run(rank: int) -> Tensor:
        parallel = Thread(rank, size, spreads_experts, rows=rows[rank], meeting=meeting)
        driver = Driver.load(checkpoint, parallel=parallel, scheme=scheme)
        chunks = PROMPT[:9], PROMPT[9:18], PROMPT[18:22], PROMPT[22:]
        return torch.cat([driver.run({"a": chunk})["a"] for chunk in chunks])

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", TINY)
def test_ranks_compute_what_one_does(
    name: str, size: int, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """With 4 ranks two have the same KV head, and two have no ids: there are two segments."""
    checkpoint = Checkpoint(tiny_checkpoint(name), "safetensors")
    (expected,) = logits_of_ranks(checkpoint, 1)
    found = logits_of_ranks(checkpoint, size)
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=3e-5)
    assert all(torch.equal(logits, found[0]) for logits in found)


@pytest.mark.parametrize("name", TINY)
def test_ranks_with_rows_of_their_own(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    """Models that do more to their residual than to add to it go on as before."""
    checkpoint = Checkpoint(tiny_checkpoint(name), "safetensors")
    spec = spec_from_config(checkpoint.config())
    (expected,) = logits_of_ranks(checkpoint, 1)
    meeting = Meeting(2)
    rows = [Rows(rank, meeting, spec.hidden_size) for rank in range(2)]
    found = logits_of_ranks(checkpoint, 2, rows=rows)
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=3e-5)
    # One of the embedding, two of each layer, in three of the four steps.
    adds_only = name in TINY_MOE or not name.startswith(DO_MORE)
    num_sums = adds_only * 3 * (1 + 2 * len(spec.layers))
    assert [one.num_sums for one in rows] == [num_sums] * 2


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "gpt_oss"])
def test_tokens_that_are_asked_for_come_from_the_rank_that_has_them(
    name: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint(name), "safetensors")
    hidden_size = spec_from_config(checkpoint.config()).hidden_size
    meeting, wanted = Meeting(4), torch.tensor([8, 0, 3, 3])

    def run(rank: int) -> Tensor:
        rows = Rows(rank, meeting, hidden_size)
        parallel = SINGLE if rank == 4 else Thread(rank, 4, rows=rows, meeting=meeting)
        driver = Driver.load(checkpoint, parallel=parallel)
        some = driver.run_batch({"a": PROMPT[:9]}, wanted=wanted)
        return torch.cat([some, driver.run_batch({"b": PROMPT[:9]}, wanted=torch.arange(9))])

    with ThreadPoolExecutor(5) as threads:
        *found, expected = threads.map(run, range(5))
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=3e-5)


def test_quantized_weights_are_cut(tiny_checkpoint: Callable[[str], Path]) -> None:
    """Scales are those of a rank's own inputs, and so a little finer."""
    checkpoint = Checkpoint(tiny_checkpoint("qwen3"), "safetensors")
    (exact,) = logits_of_ranks(checkpoint, 1)
    scheme = Scheme.at_load("fp8")
    (whole,) = logits_of_ranks(checkpoint, 1, scheme)
    for logits in logits_of_ranks(checkpoint, 2, scheme):
        assert (logits - exact).norm() < 1.2 * (whole - exact).norm()


@pytest.mark.parametrize("name", ["llama", "phi3"])  # Phi-3's files are fused, too
@pytest.mark.parametrize(
    "file",
    [
        *("awq 16", "gptq 4 16", "gptq 8 16", "compressed 4 16 zeros", "fp8 blocks 16"),
        "compressed fp8 channel, plain tokens",
    ],
)
def test_quantized_files_are_cut_along_their_groups(name: str, file: str, tmp_path: Path) -> None:
    """What each rank has of them means what it means for one."""
    (packed := tmp_path / "packed").mkdir()
    write(save_tiny(name, tmp_path / "plain", **WIDE), packed, *FORMATS[file])
    checkpoint = Checkpoint(packed, "safetensors")
    scheme = choose_scheme(None, checkpoint.config())
    assert scheme is not None
    (expected,) = logits_of_ranks(checkpoint, 1, scheme)
    for logits in logits_of_ranks(checkpoint, 2, scheme):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=3e-5)


def test_ordered_inputs_are_not_cut(tmp_path: Path) -> None:
    """Of a group a rank would have some, and which, no share says."""
    write(save_tiny("llama", tmp_path / "plain", **WIDE), tmp_path, *FORMATS["gptq 4 ordered"])
    checkpoint = Checkpoint(tmp_path, "safetensors")
    scheme = choose_scheme(None, checkpoint.config())
    with pytest.raises(ValueError, match=r"tensor_parallel_size: .*\(desc_act\) .*: use 1"):
        Driver.load(checkpoint, parallel=TensorParallel(0, 2), scheme=scheme)


@pytest.mark.parametrize(("name", "size"), SPREAD)
def test_ranks_that_hold_whole_experts(
    name: str, size: int, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """Some have one more than others, where their number asks for it."""
    checkpoint = Checkpoint(tiny_checkpoint(name), "safetensors")
    (expected,) = logits_of_ranks(checkpoint, 1)
    found = logits_of_ranks(checkpoint, size, spreads_experts=True)
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=3e-5)
    assert all(torch.equal(logits, found[0]) for logits in found)


@pytest.mark.parametrize(
    ("name", "cut", "spread"),
    [
        ("mixtral", [1, 2, 4], [1, 2, 4]),
        ("mixtral_one", [1, 2, 4], [1, 2]),
        ("glm4_moe_odd", [1, 2, 4], [1, 2, 4]),
    ],
)
def test_numbers_of_ranks(
    name: str, cut: list[int], spread: list[int], tiny_checkpoint: Callable[[str], Path]
) -> None:
    spec = spec_from_config(Checkpoint(tiny_checkpoint(name), "safetensors").config())
    assert possible_num_ranks(spec) == cut
    assert possible_num_ranks(spec, spreads_experts=True) == spread


def test_experts_that_are_fewer_than_ranks_or_none(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    few, none = (
        spec_from_config(Checkpoint(tiny_checkpoint(name), "safetensors").config())
        for name in ("mixtral_one", "llama")
    )
    with pytest.raises(ValueError, match=r"tensor_parallel_size: .* 3 experts .* use one of 1, 2$"):
        check_num_ranks(few, 4, spreads_experts=True)
    with pytest.raises(ValueError, match=r"enable_expert_parallel: Llama.* has no experts"):
        check_num_ranks(none, 2, spreads_experts=True)


@pytest.mark.parametrize(
    ("whole", "unit", "size", "shares"),
    [
        (12, 1, 3, [(0, 4), (4, 4), (8, 4)]),
        (64, 16, 2, [(0, 32), (32, 32)]),
        (32, 16, 4, [(0, 16), (0, 16), (16, 16), (16, 16)]),
    ],
)
def test_shares(whole: int, unit: int, size: int, shares: list[tuple[int, int]]) -> None:
    found = [
        TensorParallel(rank, size).share(whole, unit=unit, repeats=True) for rank in range(size)
    ]
    assert found == [Cut(start, length, whole) for start, length in shares]


@pytest.mark.parametrize(("whole", "unit", "size"), [(9, 1, 2), (64, 16, 3), (10, 4, 2)])
def test_what_cannot_be_shared_is_refused_with_what_can(whole: int, unit: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size: .* possible are 1"):
        TensorParallel(0, size).share(whole, unit=unit)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("vocab_size", [160, 49152, 151936])
def test_ids_are_shared_by_segments(vocab_size: int, size: int) -> None:
    ranks = [TensorParallel(rank, size) for rank in range(size)]
    cuts = [parallel.share_vocabulary(vocab_size) for parallel in ranks]
    assert sum(cut.size for cut in cuts) == vocab_size
    for before, after in pairwise(cuts):
        assert after.start == before.start + before.size
        assert after.start % SEGMENT == 0 or not after.size
