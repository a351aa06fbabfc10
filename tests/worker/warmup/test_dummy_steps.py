"""Steps run for what they cost: they leave nothing behind, and cost what was foreseen."""

from functools import partial
from itertools import accumulate, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._C._profiler import _ExtraFields_Allocation
from torch.profiler import ProfilerActivity, profile
from torch.profiler._utils import traverse_dfs

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.model_size import ModelSize
from nanovllm.config import CacheConfig, SchedulerConfig, StepLimits
from nanovllm.plan.memory_plan import GIB, Machine, MemoryPlan
from nanovllm.plan.precision import Precision
from nanovllm.protocol.plan import StepMasks, StepPlan, num_mask_lines
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.attention.base import ModelAttention
from nanovllm.worker.attention.select import attention_specs
from nanovllm.worker.attention.triton.backend import TritonAttention
from nanovllm.worker.cuda_graph import (
    CallGraphs,
    CapturedStep,
    StepGraphs,
    StepOutput,
    StepShape,
    Variant,
)
from nanovllm.worker.forward_batch import expand_view
from nanovllm.worker.kernels.select import FusedStep
from nanovllm.worker.kernels.triton.edit_logits import sample_edited
from nanovllm.worker.kernels.triton.layer_kernels import TritonKernels
from nanovllm.worker.kernels.triton.slice_sampler import sample_slices
from nanovllm.worker.kernels.triton.token_logprobs import pack_logprobs, pack_wished
from nanovllm.worker.model_runner import ModelRunner, PendingStep
from nanovllm.worker.models.decoder import Decoder
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling.sampler import Sampler
from nanovllm.worker.warmup import dummy_steps
from tests.worker.called_graphs import CalledGraphs
from tests.worker.planning import make_plan, new_row

CPU = torch.device("cpu")
MAX_MODEL_LEN = 512
NONE = (np.empty(0, np.int32), np.empty(0, np.int32))  # rows and positions that are sampled
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 768,
    "vocab_size": 1000,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": MAX_MODEL_LEN,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def size_of(**changes: int) -> ModelSize:
    return ModelSize(spec=spec_from_config({**CONFIG, **changes}), parameters={}, source="")


SIZE = size_of()


def sample_first(logits: torch.Tensor, **_: object) -> torch.Tensor:
    return torch.zeros(len(logits), dtype=torch.int64)


def make_runner(size: ModelSize, limits: StepLimits) -> tuple[ModelRunner, RequestRows]:
    """A model as on a GPU, of tensors of the CPU; nobody has written to its weights."""
    spec = size.spec
    specs = attention_specs(spec, block_size=16, dtype=torch.bfloat16, device=CPU)
    attention = ModelAttention(specs, {kind: TritonAttention(one) for kind, one in specs.items()})
    model = Decoder(
        spec, kernels=TritonKernels(), attention=attention, dtype=torch.bfloat16, device=CPU
    )
    rows = RequestRows(
        num_rows=limits.max_num_seqs,
        max_model_len=MAX_MODEL_LEN,
        block_size=16,
        vocab_size=spec.vocab_size,
        eos_token_ids=[0],
        device=CPU,
    )
    shape = attention.kv_shape(num_layers=spec.num_layers, num_blocks=1)
    runner = ModelRunner(
        model,
        attention,
        sampler=Sampler(rows),
        kv_cache=torch.zeros(shape, dtype=torch.bfloat16),
        limits=limits,
        fused=FusedStep(
            expand_view, sample_first, sample_slices, sample_edited, pack_wished, pack_logprobs
        ),
    )
    return runner, rows


def plan_of(size: ModelSize, limits: StepLimits) -> MemoryPlan:
    return MemoryPlan(
        size=size,
        machine=Machine(name="GPU", memory_bytes=GIB, taken_bytes=0, is_gpu=True),
        precision=Precision.of("bfloat16"),
        cache=CacheConfig(),
        limits=limits,
        max_model_len=MAX_MODEL_LEN,
    )


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels that would have been launched; none is, which leaves their allocations."""
    from triton.runtime.interpreter import InterpretedFunction

    if torch.cuda.is_available():
        pytest.skip("with a GPU Triton's interpreter is not used")
    names: list[str] = []

    def skip(self: InterpretedFunction, *_: object, **__: object) -> None:
        names.append(self.fn.__name__)

    monkeypatch.setattr(InterpretedFunction, "run", skip)
    return names


def peak_bytes(runner: ModelRunner, limits: StepLimits) -> int:
    """Most that was allocated at once during the heaviest step, beyond what was before.

    What one operation of PyTorch allocates and frees again does not count: it is the scratch of the
    CPU's matrix products, which differs by processor and by number of threads. Nor does it count
    when a block that the step did not allocate is freed meanwhile.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        dummy_steps.run_heaviest_step(runner, limits, max_model_len=MAX_MODEL_LEN)
    events = profiled.profiler.kineto_results.experimental_event_tree()
    in_order = sorted(traverse_dfs(events), key=lambda event: event.start_time_ns)
    sizes: dict[int, tuple[int, int]] = {}  # of blocks by address, with the operation's number
    changes: list[int] = []
    for event in in_order:
        if not isinstance(event.extra_fields, _ExtraFields_Allocation):
            continue
        block, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        operation = 0 if event.parent is None else event.parent.id
        changes.append(size)
        if size > 0:
            sizes[block] = (len(changes) - 1, operation)
            continue
        allocated, by = sizes.pop(block, (-1, 0))
        if allocated < 0:
            changes[-1] = 0
        elif operation and operation == by:
            changes[allocated] = changes[-1] = 0
    return max(accumulate(changes))


@pytest.mark.parametrize(
    ("changes", "num_seqs", "num_tokens"),
    [
        pytest.param({"intermediate_size": 1536}, 8, 1000, id="layer"),
        pytest.param({"intermediate_size": 64}, 8, 4096, id="attention"),
        pytest.param({"vocab_size": 60000}, 64, 512, id="sampler"),
    ],
)
def test_the_heaviest_step_takes_what_the_plan_foresees(
    launches: list[str], changes: dict[str, int], num_seqs: int, num_tokens: int
) -> None:
    size = size_of(**changes)
    limits = SchedulerConfig(max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens).limits(
        "cuda"
    )
    runner, _ = make_runner(size, limits)
    plan = plan_of(size, limits)
    measured = peak_bytes(runner, limits)
    assert 0.85 < plan.activation_bytes / measured < 1.15
    assert "prefill_kernel" in launches


def test_a_step_whose_gates_are_never_in_memory_takes_that_much_less(launches: list[str]) -> None:
    """The plan foresees them: not every device, dtype and layer can do without."""
    limits = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=4096).limits("cuda")
    runner, _ = make_runner(SIZE, limits)
    foreseen = plan_of(SIZE, limits).activation_bytes
    gates_and_ups = 4096 * 2 * SIZE.spec.layers[0].mlp.intermediate_size * 2
    assert 0.85 < (foreseen - gates_and_ups) / peak_bytes(runner, limits) < 1.15
    assert "_gated_kernel" in launches


@pytest.mark.parametrize(
    ("num_seqs", "num_tokens", "max_model_len", "expected"),
    [(8, 4096, 513, (8, 512)), (8, 4096, 100, (8, 99)), (256, 8, 100, (8, 1))],
)
def test_the_largest_step_stays_within_rows_and_budget(
    num_seqs: int, num_tokens: int, max_model_len: int, expected: tuple[int, int]
) -> None:
    limits = SimpleNamespace(max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens)
    found = dummy_steps.largest_step(limits, max_model_len=max_model_len)  # type: ignore[arg-type]
    assert found == expected


def test_warm_up_goes_through_every_shape_and_touch_only_the_padding_row(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64).limits("cuda")
    runner, rows = make_runner(SIZE, limits)
    monkeypatch.setattr(dummy_steps, "USUAL_ROWS", (1, 4))
    monkeypatch.setattr(dummy_steps, "USUAL_TOKENS", (64, 100 * MAX_MODEL_LEN))
    shapes = [StepShape(1, 1), StepShape(4, 4), StepShape(48, 4), StepShape(64, 4)]
    shapes += [StepShape(64, 8), StepShape(9 * MAX_MODEL_LEN, 4)]
    monkeypatch.setattr(ModelRunner, "graph_shapes", shapes)
    plans: list[StepPlan] = []
    masked: list[bool] = []

    def execute(
        _: ModelRunner, plan: StepPlan, masks: StepMasks | None, *, is_practice: bool
    ) -> PendingStep:
        assert is_practice, "other stages of a pipeline do not take part"
        plans.append(plan)
        masked.append(masks is not None)
        if masks is not None:
            lines = num_mask_lines(vocab_size=runner.vocab_size, max_num_seqs=rows.num_rows)
            assert masks.lines == [lines - 1] * len(plan.rows), "nothing that the core keeps"
            assert masks.new_lines == [lines - 1] and set(masks.words) == {0xFF}
        return PendingStep(plan.step, *NONE)

    monkeypatch.setattr(ModelRunner, "execute", execute)
    num_warm_up_steps = sum(
        1 for _ in dummy_steps.warm_up_steps(runner, limits, max_model_len=MAX_MODEL_LEN)
    )
    kinds = dummy_steps.KINDS
    asked = [(plan.new_rows[0].params, m) for plan, m in zip(plans, masked, strict=True)]
    sizes = [(sum(plan.num_scheduled), len(plan.rows)) for plan in plans]
    plain = (dummy_steps.PLAIN, False)
    # All of it twice. First the usual shapes, prompts of few rows among them; then what rows may
    # ask for; then the shapes that are left.
    expected = [((1, 1), plain), ((4, 4), plain), ((64, 4), plain)]
    expected += [((1, 1), kind) for kind in kinds]
    expected += [((64, 8), plain), ((48, 4), plain)]
    assert [*zip(sizes, asked, strict=True)] == [one for one in expected for _ in range(2)]
    assert num_warm_up_steps == len(plans)
    assert dummy_steps.num_usual(runner) == 2 * (3 + len(kinds))
    assert {StepShape(sum(plan.num_scheduled), len(plan.rows)) for plan in plans} == set(
        shapes[:-1]
    )
    assert {row for plan in plans for row in plan.rows} == {rows.num_rows}


def test_warm_up_captures_all_that_the_second_half_of_a_step_may_run() -> None:
    """Of as many rows as have a graph: none is captured while requests wait for it."""
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64).limits("cuda")
    runner, _ = make_runner(SIZE, limits)
    sampler, graphs = runner._device_sampler, CalledGraphs()
    assert sampler is not None
    sampler._calls = CallGraphs(graphs)
    nothing = SimpleNamespace(sample_edited=ignore, pack_wished=ignore)
    sampler._fused = nothing  # type: ignore[assignment]
    logits, rows = torch.zeros(4, SIZE.spec.vocab_size), np.full(2, limits.max_num_seqs, np.int32)
    for asked, is_masked in [*dummy_steps.KINDS] * 2:
        ask(runner, asked)
        masks = StepMasks([0, 1], [0, 0], [], memoryview(b"")) if is_masked else None
        slot = sampler.staging.take()
        sampler.sample(logits, slot, rows=rows, positions=rows, masks=masks)
    kinds = {key[0] for key in sampler._calls._captured}  # type: ignore[index]
    flags = list(product((False, True), repeat=4))
    possible = [one for one in flags if (one[0] or one[3]) and (one[0] or not (one[1] or one[2]))]
    found = {
        (bool(kind.num_edited), kind.has_edits, kind.has_penalties, bool(kind.num_told))
        for kind in kinds
    }
    assert found == set(possible) and len(graphs.captured) == len(possible)


def ask(runner: ModelRunner, params: SamplingParams) -> None:
    """For the padding row."""
    new = new_row(runner._rows.num_rows, [0], params)
    runner._rows.record(make_plan(0, [], new_rows=[new]))


def ignore(*_: object, **__: object) -> None: ...


def test_warm_up_soon_has_captured_what_can_stand_in_for_any_other_shape() -> None:
    nothing = StepOutput(torch.empty(0), None)
    make_graphs = partial(StepGraphs, lambda *_: nothing, max_num_rows=256, max_num_tokens=4096)
    shapes, plain = make_graphs().shapes, Variant(shares_prefix=False)
    in_order = sorted(shapes, key=dummy_steps._how_late)
    assert sorted(in_order) == sorted(shapes)
    graphs, soon = make_graphs(), in_order[:18]
    graph = CapturedStep(SimpleNamespace(replay=lambda: None), nothing)  # type: ignore[arg-type]
    graphs._captured = {(shape, plain): graph for shape in soon}
    for shape in shapes:
        assert graphs.captured_shape_for(shape, plain) in soon
