"""In which precision a model computes, and what its numbers take; no torch and no device.

Whoever asks says what the device can do: the worker asks torch, `nanovllm plan` the system.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nanovllm.checkpoint.spec import WeightGroup
from nanovllm.config import DType

OTHER_NAMES = {"float": "float32", "half": "float16"}  # vLLM's
VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZABLE: tuple[WeightGroup, ...] = ("attention", "mlp")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What values are stored in. linear_bytes: of a weight of a quantizable layer, on average;
    end_bytes: of the embedding and the head, where it is not that of values. is_native: whether
    steps are native calls of a CPU, which keep one copy of a tied head, and of a GGUF file what no
    scheme quantizes as it is stored.
    """

    dtype: str
    linear_bytes: float
    kv_bytes: float
    end_bytes: Mapping[WeightGroup, float] = field(default_factory=dict)
    is_native: bool = False

    @classmethod
    def of(
        cls,
        dtype: str,
        *,
        linear_bytes: float | None = None,
        end_bytes: Mapping[WeightGroup, float] | None = None,
        fp8_cache: bool = False,
        is_native: bool = False,
    ) -> "Precision":
        """linear_bytes, end_bytes: None if those weights are not quantized."""
        value_bytes = VALUE_BYTES[dtype]
        return cls(
            dtype=dtype,
            linear_bytes=value_bytes if linear_bytes is None else linear_bytes,
            kv_bytes=1 if fp8_cache else value_bytes,
            end_bytes=end_bytes or {},
            is_native=is_native,
        )

    @property
    def value_bytes(self) -> int:
        return VALUE_BYTES[self.dtype]

    @property
    def is_quantized(self) -> bool:
        """Whether weights of linear layers are."""
        return self.linear_bytes != self.value_bytes

    def bytes_per_weight(self, group: WeightGroup) -> float:
        """On average."""
        if group in QUANTIZABLE:
            return self.linear_bytes
        return self.end_bytes.get(group, self.value_bytes)


def dtype_for(
    wanted: DType, *, is_gpu: bool, has_bfloat16: bool, stored: str | None
) -> tuple[str, str]:
    """The computing precision, and why, in a sentence. stored: the checkpoint's, if it says so.

    "auto" is bfloat16 on a CPU that multiplies it natively (twice to three times as fast there:
    decoding reads half the bytes), else float32. On a GPU it is the checkpoint's precision, or half
    of float32, as in vLLM. has_bfloat16: whether the device computes in it by itself.
    """
    if wanted != "auto":
        return OTHER_NAMES.get(wanted, wanted), f"{wanted} as dtype asks"
    if not is_gpu:
        if has_bfloat16:
            return "bfloat16", "bfloat16, which this CPU multiplies natively"
        return "float32", "float32, as this CPU has no native bfloat16"
    half = "bfloat16" if has_bfloat16 else "float16"
    if stored in ("float16", half):
        return stored, f"{stored} as in the checkpoint"
    return half, f"{half}, half precision of this GPU"
