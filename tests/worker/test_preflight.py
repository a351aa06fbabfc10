"""What a worker refuses before it loads anything, and what it reports afterwards."""

from types import SimpleNamespace

import pytest
import torch

from nanovllm.config import EngineConfig
from nanovllm.plan.memory_plan import GIB
from nanovllm.plan.precision import Precision
from nanovllm.worker.preflight import machine_of, plan_memory, report
from tests.plan.test_memory_plan import SIZE

GPU = torch.device("cuda", 0)


def plan(**settings: object):  # type: ignore[no-untyped-def]
    config = EngineConfig.from_kwargs(**settings)
    return plan_memory(
        config,
        SIZE,
        device=GPU,
        precision=Precision.of("bfloat16"),
        max_model_len=config.model.max_model_len or 40960,
    )


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU of 24 GiB, 1 of it in use; the test may change that."""
    gpu = SimpleNamespace(free=23 * GIB, total=24 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (gpu.free, gpu.total))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA L4")
    return gpu


def test_refuses_what_cannot_fit_and_says_what_would(memory: SimpleNamespace) -> None:
    memory.free = 20 * GIB
    with pytest.raises(ValueError, match=r"does not fit NVIDIA L4: .* max_model_len=\d+; ") as told:
        plan()
    assert "a GPU of at least" in str(told.value)
    longest = int(str(told.value).partition("max_model_len=")[2].partition(";")[0])
    assert plan(max_model_len=longest).fits


def test_what_only_might_not_fit_is_tried(memory: SimpleNamespace) -> None:
    tight = plan(max_model_len=36500)
    assert not tight.is_hopeless and not tight.fits


def test_kv_that_is_asked_for_must_fit_beside_the_weights(memory: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="the KV size left to be measured"):
        plan(kv_cache_memory_bytes=20 * GIB, max_model_len=1024)
    assert plan(kv_cache_memory_bytes=5 * GIB, max_model_len=1024).num_blocks == 2275


def test_reports_what_was_measured_beside_what_was_foreseen(memory: SimpleNamespace) -> None:
    found = report(plan(max_model_len=4096), {"weights": 15 * GIB, "KV cache": GIB}, num_blocks=257)
    assert found[0] == "weights: 15.00 GiB (15.26 foreseen)"
    assert [line.partition(":")[0] for line in found[:2]] == ["weights", "KV cache"]
    assert found[-1] == "room for 4,096 tokens: 1 sequences of 4,096"


def test_a_cpu_has_what_is_free() -> None:
    machine = machine_of(torch.device("cpu"))
    assert not machine.is_gpu and machine.memory_bytes > 0
