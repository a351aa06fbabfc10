"""What a worker chooses, what it reports, and whose fault it is when it cannot."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nanovllm.config import EngineConfig
from nanovllm.plan.memory_plan import MemoryPlan
from nanovllm.protocol.plan import NewRow, StepFailedError, WorkerInfo
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker import preflight, request_rows, startup
from nanovllm.worker.attention.select import BACKENDS
from nanovllm.worker.kernels.native import library
from nanovllm.worker.kernels.select import DeviceKernels, select_kernels
from nanovllm.worker.models.decoder import Decoder
from nanovllm.worker.sampling import edit_tables, sampler
from nanovllm.worker.sampling.logits_processors import RowEdits
from nanovllm.worker.startup import Loaded, Startup
from nanovllm.worker.warmup.dummy_steps import run_heaviest_step
from nanovllm.worker.warmup.precompile import Precompiler
from nanovllm.worker.worker import Worker
from tests.worker.planning import CUDA, make_plan, new_row, run_step
from tests.worker.test_failures import JITFunction

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 200,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "eos_token_id": [0, 7],
    "torch_dtype": "float16",
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A directory that says what the model is; load_format "dummy" needs no more."""
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    return str(tmp_path)


def make_worker(model: str, **settings: Any) -> Worker:
    fixed = {"model": model, "load_format": "dummy", "block_size": 4, "max_num_seqs": 8}
    defaults = {"device": "cpu", "dtype": "float32", "num_gpu_blocks_override": 200}
    config = EngineConfig.from_kwargs(**fixed, **{**defaults, **settings})
    return Worker(config, lambda phase, progress: None)


def start(model: str, **settings: Any) -> WorkerInfo:
    worker = make_worker(model, **settings)
    try:
        return worker.start()
    finally:
        worker.shutdown()


def fail_for_want_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("tried to allocate more than there is")


def test_defaults_of_sampling_are_the_checkpoint_s_unless_refused(model: str) -> None:
    content = {"temperature": 0.6, "top_k": 20, "eos_token_id": [5, 7]}
    (Path(model) / "generation_config.json").write_text(json.dumps(content))
    info = start(model)
    assert info.sampling_defaults == {"temperature": 0.6, "top_k": 20}
    assert info.notes[-1].endswith("by generation_config.json: temperature 0.6, top_k 20")
    without = start(model, generation_config="vllm")
    assert without.sampling_defaults == {} and without.notes == info.notes[:-1]
    assert info.eos_token_ids == without.eos_token_ids == [5, 7]


def test_info_tells_what_was_found(model: str) -> None:
    info = start(model, max_model_len=40)
    assert (info.device, info.dtype) == ("cpu", "float32")
    assert info.architecture == "LlamaForCausalLM"
    assert (info.num_blocks, info.max_model_len, info.vocab_size) == (200, 40, 200)
    assert info.eos_token_ids == [0, 7]
    # keys and values, 2 layers, 200 blocks of 4 tokens, 2 heads of 16, 4 bytes
    assert info.kv_cache_bytes == 2 * 2 * 200 * 4 * 2 * 16 * 4
    attention = 64 * (64 + 2 * 32) + 64 * 64
    assert info.num_parameters == 2 * (attention + 3 * 64 * 96 + 2 * 64) + 2 * 200 * 64 + 64
    assert set(info.phase_seconds) == {"locate", "build", "weights", "kv cache"}
    for reason in ("float32 as dtype asks", "attention by torch"):
        assert any(note.startswith(reason) for note in info.notes), info.notes


def test_progress_of_every_phase_starts_at_zero_and_ends_at_one(model: str) -> None:
    seen: dict[str, list[float]] = {}
    config = EngineConfig.from_kwargs(model=model, load_format="dummy", device="cpu")
    worker = Worker(config, lambda phase, progress: seen.setdefault(phase, []).append(progress))
    worker.allocate(worker.start().num_blocks)
    for phase in ("locate", "build", "weights", "kv cache"):
        assert (seen[phase][0], seen[phase][-1]) == (0.0, 1.0)
        assert seen[phase] == sorted(seen[phase])


def test_what_compiles_ahead_is_ended_where_nothing_compiles(model: str) -> None:
    precompiler = Precompiler([sys.executable, "-c", "import time; time.sleep(60)"])
    precompiler.begin()
    config = EngineConfig.from_kwargs(model=model, load_format="dummy", device="cpu")
    worker = Worker(config, lambda phase, progress: None, precompiler)
    assert "kernels" not in worker.start().phase_seconds
    assert precompiler._program is None
    worker.shutdown()


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_blocks_are_sized_by_memory_and_capped_by_use(model: str, device: str) -> None:
    info = start(model, num_gpu_blocks_override=None, device=device)
    assert info.num_blocks == 1 + 8 * 64 // 4
    block_bytes = info.kv_cache_bytes // info.num_blocks
    few = start(model, num_gpu_blocks_override=None, kv_cache_memory_bytes=20 * block_bytes)
    assert few.num_blocks == 20


@pytest.mark.parametrize("max_num_seqs", [1, 8])
def test_the_heaviest_step_stays_within_the_rows(model: str, max_num_seqs: int) -> None:
    config = EngineConfig.from_kwargs(
        model=model, load_format="dummy", device="cpu", max_num_seqs=max_num_seqs, block_size=4
    )
    worker = Worker(config, lambda phase, progress: None)
    info = worker.start()
    worker.allocate(info.num_blocks)
    assert worker._runner is not None
    # The budget alone would be 2048 tokens, many times what the rows hold.
    run_heaviest_step(
        worker._runner, config.scheduler.limits("cpu"), max_model_len=info.max_model_len
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 65}, "max_model_len: 65 .* 64"),
        ({"num_gpu_blocks_override": 5}, "max_model_len"),
        ({"model": "smollm3"}, "smollm2"),
        ({"load_format": "safetensors"}, r"\.safetensors"),
    ],
)
def test_what_cannot_work_is_the_users_to_mend(
    model: str, settings: dict[str, Any], message: str
) -> None:
    config = {"model": model, "load_format": "dummy", "device": "cpu", "block_size": 4}
    worker = Worker(
        EngineConfig.from_kwargs(**{**config, **settings}), lambda phase, progress: None
    )
    with pytest.raises(ValueError, match=message):
        worker.start()
    worker.shutdown()
    worker.shutdown()


def test_fp8_weights_and_cache(model: str) -> None:
    plain = start(model)
    info = start(model, quantization="fp8", kv_cache_dtype="fp8")
    assert info.num_parameters == plain.num_parameters
    assert info.kv_cache_bytes * 4 == plain.kv_cache_bytes
    assert any(note.startswith("FP8 weights quantized at load in 8") for note in info.notes)


@pytest.mark.parametrize(
    "settings", [{}, {"quantization": "fp8"}, {"kv_cache_dtype": "fp8_e4m3"}], ids=str
)
def test_runs_plans_after_start(model: str, settings: dict[str, Any]) -> None:
    worker = make_worker(model, **settings)
    worker.allocate(worker.start().num_blocks)
    plan = make_plan(0, [(2, 0, 3)], new_rows=[new_row(2, [5, 6, 7])])
    (token_id,) = run_step(worker, plan).result().token_ids
    assert 0 <= token_id < 200
    worker.shutdown()
    with pytest.raises(AssertionError):
        run_step(worker, plan)


def test_a_step_that_fails_leaves_the_worker_fit_for_the_next(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(model)
    worker.allocate(worker.start().num_blocks)
    plan = make_plan(0, [(2, 0, 3)], new_rows=[new_row(2, [5, 6, 7])])
    expected = run_step(worker, plan).result().token_ids
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "compute_logits", fail_for_want_of_memory)
        with pytest.raises(StepFailedError, match="max_num_batched_tokens"):
            run_step(worker, plan)
    assert run_step(worker, plan).result().token_ids == expected
    worker.shutdown()


def biased_ids(argument: object) -> list[int]:
    match argument:
        case NewRow():
            return list(argument.params.logit_bias)
        case RowEdits():
            return argument.biased_ids.tolist()
    return []


@pytest.mark.parametrize(
    ("module", "place"),
    [(request_rows, "prepare_edits"), (sampler, "apply_edits"), (edit_tables, "pack_edits")],
)
def test_a_row_that_cannot_be_sampled_fails_alone(
    model: str, monkeypatch: pytest.MonkeyPatch, module: ModuleType, place: str
) -> None:
    """When it is admitted, or when it is sampled: by plain torch, or by native code."""
    if module is sampler:
        monkeypatch.setattr(library, "unusable", lambda: "not asked for here")
    elif module is edit_tables and library.unusable() is not None:
        pytest.skip("no native kernels were built")
    real = getattr(module, place)

    def picky(*arguments: Any, **keywords: Any) -> Any:
        if any(biased_ids(argument) == [13] for argument in arguments):
            raise IndexError("no such word")
        return real(*arguments, **keywords)

    biased = [SamplingParams(temperature=0.0, logit_bias={t: 1.0}) for t in (12, 13, 14)]
    new_rows = [new_row(row, [5, 6, 7], one) for row, one in enumerate(biased)]
    worker = make_worker(model)
    worker.allocate(worker.start().num_blocks)
    plan = make_plan(0, [(row, 0, 3) for row in range(3)], new_rows=new_rows)
    expected = run_step(worker, plan).result()
    monkeypatch.setattr(module, place, picky)
    result = run_step(worker, plan).result()
    assert expected.failures == {} and result.failures == {1: "IndexError: no such word"}
    for index in (0, 2):
        assert result.token_ids[index] == expected.token_ids[index]
    # Whoever takes the row next has nothing to do with it.
    again = make_plan(1, [(1, 0, 3)], new_rows=[new_row(1, [5, 6, 7], biased[0])])
    assert run_step(worker, again).result().failures == {}
    worker.shutdown()


def test_out_of_memory_at_start_is_told_by_phase(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "load_weights", fail_for_want_of_memory)
    with pytest.raises(ValueError, match="out of memory on cpu in phase 'weights'"):
        start(model)


def test_what_cannot_fit_is_refused_before_it_is_loaded(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "free_memory", lambda: 100_000)
    monkeypatch.setattr(startup, "load_weights", fail_for_want_of_memory)  # not reached
    with pytest.raises(ValueError, match=r"does not fit this CPU: .* What would do: "):
        start(model, num_gpu_blocks_override=None)


def test_a_kernel_that_fails_at_start_is_done_without(
    model: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = JITFunction(RuntimeError("ptxas: no such architecture"))

    def select(device: torch.device, *, refused: str | None = None) -> DeviceKernels:
        chosen = select_kernels(device, refused=refused)
        if refused is None:
            monkeypatch.setattr(chosen.layers, "norm_linear", lambda *_: broken.run(), False)
        return chosen

    def measure(self: Startup, loaded: Loaded, plan: MemoryPlan) -> int:
        """As on CUDA, where the heaviest step is run to be measured."""
        run_heaviest_step(loaded.runner(num_blocks=1), loaded.limits, max_model_len=64)
        return count_blocks(self, loaded, plan)

    count_blocks = Startup._count_blocks
    monkeypatch.setattr(startup, "select_kernels", select)
    monkeypatch.setattr(Startup, "_count_blocks", measure)
    info = start(model)
    assert any("Triton kernel rms_norm_kernel does not" in note for note in info.notes)
    assert "doing without Triton" in caplog.text and "no such architecture" in caplog.text
    monkeypatch.setitem(BACKENDS, "triton", BACKENDS["torch"])
    with pytest.raises(ValueError, match="attention_backend: Triton kernel rms_norm_kernel"):
        start(model, attention_backend="triton")
