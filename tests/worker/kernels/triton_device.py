"""Where Triton's tests run: on CUDA if there is any, else in Triton's interpreter on the CPU."""

import torch
import triton.language as tl
from triton.runtime import interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_patch_tensor = interpreter._patch_lang_tensor
_convert_float = interpreter._convert_float
WIDE = {tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16}


def _patch_index(tensor, scope):
    """Triton 3.6 turns loop bounds, arrays of one element, to integers as NumPy 2.4 forbids."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _round_to_fp8(values, input_dtype, output_dtype, rounding_mode):
    """Triton 3.6 drops the carry where rounding reaches the next power of two: 31.5 becomes 16."""
    if output_dtype != tl.float8e4nv or input_dtype not in WIDE:
        return _convert_float(values, input_dtype, output_dtype, rounding_mode)
    wide = torch.from_numpy(values.copy()).view(WIDE[input_dtype])
    return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


interpreter._patch_lang_tensor = _patch_index
interpreter._convert_float = _round_to_fp8
