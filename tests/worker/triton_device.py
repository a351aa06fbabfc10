"""Where Triton's tests run: on CUDA if there is any, else in Triton's interpreter on the CPU."""

import torch
from triton.runtime import interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_patch_tensor = interpreter._patch_lang_tensor


def _patch_index(tensor, scope):
    """Triton 3.6 turns loop bounds, arrays of one element, to integers as NumPy 2.4 forbids."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_index
