"""What an error on a device means, and what would help: decides, and changes nothing.

`Worker` asks when a phase of its start or a step fails, `PendingStep` while it waits.
"""

import traceback
from typing import Any

import torch

from nanovllm.protocol.plan import DeviceLostError, StepFailedError

# phase of `Worker.start` → what would leave it more memory
START_REMEDIES = {
    "build": "a smaller model, or a GPU of more memory",
    "weights": "a smaller model, or a GPU of more memory",
    "kv cache": (
        "lower max_num_batched_tokens or max_num_seqs (the heaviest step), or max_model_len, "
        "kv_cache_memory_bytes or gpu_memory_utilization"
    ),
}
STEP_REMEDY = (
    "lower gpu_memory_utilization (KV takes what it leaves), max_num_batched_tokens or max_num_seqs"
)

KERNEL_REMEDY = (
    "set attention_backend=torch (and enforce_eager) to do without, or install the Triton that "
    "this PyTorch was released with"
)


def out_of_memory_at_start(phase: str, device: torch.device) -> ValueError:
    """What a user is told who has configured more than the device holds."""
    remedy = START_REMEDIES.get(phase, "a GPU of more memory")
    return ValueError(
        f"out of memory on {device} in phase {phase!r} of the start ({memory_in_use(device)}). "
        f"What would do: {remedy}; end other programs that use the GPU; "
        "`nanovllm plan` shows what takes how much"
    )


def meaning(error: Exception, device: torch.device) -> Exception:
    """What `error`, raised by a step, means: `DeviceLostError`, `StepFailedError`, or itself."""
    if isinstance(error, DeviceLostError):
        return error
    lost = loss_of(device)
    if lost is not None:
        return lost
    if isinstance(error, torch.OutOfMemoryError):
        return StepFailedError(
            f"out of memory on {device} in a step ({memory_in_use(device)}): {STEP_REMEDY}"
        )
    if (kernel := failed_kernel(error)) is not None:
        return StepFailedError(f"{describe_kernel_failure(kernel, error, device)}: {KERNEL_REMEDY}")
    return error


def loss_of(device: torch.device) -> DeviceLostError | None:
    """Ask the device for a sign of life, which no lost context gives; None if it is alive.

    A fault of a kernel (an illegal address, say) makes every later call on its context fail, so
    the answer does not depend on how the error that raised the question was worded.
    """
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return _lost(error)
    return None


def wait_for(event: torch.Event) -> None:
    """Block until `event` has happened. Raises `DeviceLostError` if it never will."""
    try:
        event.synchronize()
    except RuntimeError as error:
        raise _lost(error) from error


def failed_kernel(error: BaseException) -> str | None:
    """The Triton kernel that was being compiled or launched as `error` was raised, if any was."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner: Any = frame.f_locals.get("self")
        match type(owner).__name__:  # Triton's types by name, as a CPU must not import them
            case "JITFunction":
                return str(owner.fn.__name__)
            case "CompiledKernel":
                return str(owner.name)
    return None


def describe_kernel_failure(kernel: str, error: BaseException, device: torch.device) -> str:
    """Which kernel fails, where, and by which versions, in a sentence."""
    import triton

    while error.__cause__ is not None:  # a compiler's first error is in the innermost function
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    name, capability = "", ""
    if device.type == "cuda":
        name = f" on {torch.cuda.get_device_name(device)}"
        major, minor = torch.cuda.get_device_capability(device)
        capability = f" (compute capability {major}.{minor})"
    return (
        f"Triton kernel {kernel} does not compile or launch{name}{capability}, "
        f"triton {triton.__version__}, torch {torch.__version__}: "
        f"{type(error).__name__}: {lines[-1]}"
    )


def memory_in_use(device: torch.device) -> str:
    """How full the device is."""
    if device.type != "cuda":
        return "see free memory"
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    return (
        f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, "
        f"{ours / 2**30:.1f} taken by this process"
    )


def gist(error: BaseException) -> str:
    """An error's kind and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _lost(error: Exception) -> DeviceLostError:
    return DeviceLostError(
        f"the GPU's context is lost ({gist(error)}): the engine must be started anew; "
        "CUDA_LAUNCH_BLOCKING=1 then shows which kernel is at fault"
    )
