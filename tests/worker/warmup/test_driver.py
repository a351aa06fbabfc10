"""The driver is asked for what it can do before torch is there, and may be missing."""

import ctypes
from pathlib import Path

import pytest

from nanovllm.worker.warmup import driver
from tests.waiting import WAIT_S

TIMEOUT_S = WAIT_S


class Library:
    """A libcuda of so many devices; `calls` are those of it."""

    def __init__(self, num_devices: int) -> None:
        self._num_devices = num_devices
        self.calls: list[str] = []
        self.number: object = None  # of the device that was asked for

    def __getattr__(self, name: str) -> object:
        def call(*arguments: object) -> int:
            self.calls.append(name)
            if name == "cuDeviceGet":
                self.number = arguments[-1]
            return 0 if self._num_devices else 100

        return call


def test_a_gpu_is_likely_where_a_driver_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(driver, "SIGNS", (str(tmp_path / "none"),))
    assert not driver.is_likely("auto")
    monkeypatch.setattr(driver, "SIGNS", (str(tmp_path / "none"), str(tmp_path)))
    assert driver.is_likely("auto") and driver.is_likely("cuda")
    assert not driver.is_likely("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not driver.is_likely("cuda")


def test_waking_makes_a_context_if_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MODULE_LOADING", "LAZY")
    for num_devices, calls in (
        (1, ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]),
        (0, ["cuInit"]),
    ):
        library = Library(num_devices)
        monkeypatch.setattr(ctypes, "CDLL", lambda name, library=library: library)
        driver.wake(3).join(TIMEOUT_S)
        assert library.calls == calls
        assert library.number == (3 if num_devices else None)


def test_waking_without_a_driver_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setenv("CUDA_MODULE_LOADING", "LAZY")
    monkeypatch.setattr(ctypes, "CDLL", missing)
    driver.wake().join(TIMEOUT_S)
