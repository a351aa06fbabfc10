"""What errors of a device mean, in words that name the remedy; the device is pretended."""

from collections.abc import Callable

import pytest
import torch

from nanovllm.protocol.plan import DeviceLostError, StepFailedError
from nanovllm.worker import failures

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
FAULT = RuntimeError("CUDA error: an illegal memory access was encountered\nlong advice")


def rms_norm_kernel() -> None:
    """Stands for a kernel's Python function."""


class JITFunction:
    """Fails as Triton's does: its frames are in the traceback."""

    def __init__(self, error: Exception) -> None:
        self.fn = rms_norm_kernel
        self._error = error

    def run(self) -> None:
        raise self._error


def raised(call: Callable[[], None]) -> Exception:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that answers."""
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (gib // 2, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 70 * gib)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose every call raises, as after a fault."""

    def raise_fault(*_: object) -> None:
        raise FAULT

    monkeypatch.setattr(torch.cuda, "synchronize", raise_fault)


@pytest.mark.usefixtures("alive")
def test_out_of_memory_in_a_step_is_that_steps_own() -> None:
    found = failures.meaning(torch.OutOfMemoryError("tried to allocate"), GPU)
    assert isinstance(found, StepFailedError)
    for words in ("0.5 of 80.0 GiB free", "70.0 taken", "gpu_memory_utilization", "max_num_seqs"):
        assert words in str(found)


@pytest.mark.usefixtures("alive")
def test_out_of_memory_at_start_names_the_phase_and_its_fields() -> None:
    words = str(failures.out_of_memory_at_start("kv cache", GPU))
    assert "in phase 'kv cache'" in words and "0.5 of 80.0 GiB free" in words
    for field in ("gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens"):
        assert field in words
    assert "max_model_len" in words and "nanovllm plan" in words


@pytest.mark.usefixtures("dead")
@pytest.mark.parametrize("error", [FAULT, torch.OutOfMemoryError("x"), ValueError("anything")])
def test_a_device_that_answers_no_more_is_lost_whatever_raised(error: Exception) -> None:
    found = failures.meaning(error, GPU)
    assert isinstance(found, DeviceLostError)
    assert "an illegal memory access was encountered)" in str(found)
    assert "long advice" not in str(found)


def test_waiting_for_a_step_that_never_ends_well(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def synchronize(self) -> None:
            raise FAULT

    with pytest.raises(DeviceLostError, match="illegal memory access"):
        failures.wait_for(Event())  # type: ignore[arg-type]


@pytest.mark.usefixtures("alive")
def test_a_kernel_that_fails_is_named_with_device_and_versions() -> None:
    error = raised(JITFunction(RuntimeError("PassManager::run failed")).run)
    found = failures.meaning(error, GPU)
    assert isinstance(found, StepFailedError)
    for words in (
        "rms_norm_kernel",
        "NVIDIA L4 (compute capability 8.9)",
        f"torch {torch.__version__}",
        "RuntimeError: PassManager::run failed",
        "attention_backend=torch",
        "enforce_eager",
    ):
        assert words in str(found)


def test_other_errors_stay_what_they_are() -> None:
    error = raised(lambda: {}["missing"])
    assert failures.meaning(error, CPU) is error
    lost = DeviceLostError("said before")
    assert failures.meaning(lost, GPU) is lost
