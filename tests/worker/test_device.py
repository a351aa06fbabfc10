"""Which device and precision are chosen, on machines that tests only pretend to have."""

import pytest
import torch

from nanovllm.worker.device import choose_device, choose_dtype, choose_kv_dtype


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device: 'cuda'"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("native", "half", "stored", "on_cpu", "on_cuda"),
    [
        (True, True, "float32", "bfloat16", "bfloat16"),
        (False, True, "float16", "float32", "float16"),
        (False, True, None, "float32", "bfloat16"),
        (False, False, "bfloat16", "float32", "float16"),
    ],
)
def test_auto_dtype(
    monkeypatch: pytest.MonkeyPatch,
    native: bool,
    half: bool,
    stored: str | None,
    on_cpu: str,
    on_cuda: str,
) -> None:
    """native, half: whether CPU and GPU have bfloat16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: half)
    for device, expected in (("cpu", on_cpu), ("cuda", on_cuda)):
        dtype, why = choose_dtype("auto", torch.device(device), stored)
        assert dtype == getattr(torch, expected)
        assert why.startswith(expected)
    assert choose_dtype("float16", torch.device("cpu"), stored)[0] == torch.float16


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built_for: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla P100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)


def test_a_gpu_too_old_for_this_pytorch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_gpu(monkeypatch, (6, 0), ["sm_75", "sm_90a", "sm_120", "compute_120"])
    with pytest.raises(ValueError, match=r"device: .* Tesla P100 .* 6\.0, .* for 7\.5 and later"):
        choose_device("cuda")
    assert choose_device("auto") == torch.device("cpu")
    assert "running on the CPU: Tesla P100 has compute capability 6.0" in caplog.text
    pretend_gpu(monkeypatch, (7, 5), ["sm_75", "sm_90"])
    assert choose_device("auto") == torch.device("cuda", 0)


def test_bfloat16_on_a_gpu_that_only_emulates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (7, 5), ["sm_75"])
    supported = {True: True, False: False}
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: supported[including_emulation],
    )
    gpu = torch.device("cuda", 0)
    assert choose_dtype("auto", gpu, "bfloat16")[0] == torch.float16
    with pytest.raises(ValueError, match=r"dtype: Tesla P100 has no bfloat16 .* 'float16' or"):
        choose_dtype("bfloat16", gpu, None)


def test_kv_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_kv_dtype("auto", cuda) is None
    assert choose_kv_dtype("fp8", cpu) == choose_kv_dtype("fp8_e4m3", cpu) == torch.float8_e4m3fn
    for capability in ((8, 9), (9, 0), (8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        if capability == (8, 0):
            with pytest.raises(ValueError, match=r"kv_cache_dtype: 'fp8' needs .* 8.9 .*'auto'"):
                choose_kv_dtype("fp8", cuda)
        else:
            assert choose_kv_dtype("fp8", cuda) == torch.float8_e4m3fn
