"""Where Triton's tests run: on CUDA if there is any, else in Triton's interpreter on the CPU.

Importing this mends two faults of the interpreter of Triton 3.6, and leaves out work that has no
effect, which is more than half of what it does. What kernels compute stays the same.
"""

from functools import cache

import numpy as np
import torch
import triton.language as tl
from triton._utils import validate_block_shape
from triton.language import core
from triton.language.semantic import TritonSemantic
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


def _type_of_tuple(values):
    """The interpreter makes a tuple of each shape, and nothing asks what type that is."""
    if values.__dict__.get("_type") is None:
        values._type = core._type_for_tuple_values(values.values)
    return values._type


def _init_tuple(self, args, type=None):
    self.values = list(args)
    is_known = type is None or isinstance(type, core.tuple_type)
    self._type = type if is_known else core.tuple_type(type)


_NUMPY_TYPES = {
    scalar.name: interpreter._get_np_dtype(scalar)
    for scalar in (
        *(tl.int1, tl.int8, tl.int16, tl.int32, tl.int64),
        *(tl.uint8, tl.uint16, tl.uint32, tl.uint64),
        *(tl.float16, tl.bfloat16, tl.float32, tl.float64),
        *(tl.float8e5, tl.float8e5b16, tl.float8e4nv, tl.float8e4b8, tl.float8e4b15),
    )
}
_ADDRESS = np.dtype(np.uint64)


def _numpy_type(dtype):
    """The interpreter builds the table at each call."""
    scalar = dtype.scalar
    return _ADDRESS if isinstance(scalar, tl.pointer_type) else _NUMPY_TYPES[scalar.name]


# What follows does what the interpreter does, with less of Python's time. It makes a type of each
# value and a shape of each type, and finds constants in both, whatever it has seen before.
_unwrap = core._unwrap_if_constexpr
_UNWRAPPED = (core.constexpr, core.tuple, tuple, list)
_broadcast = TritonSemantic.broadcast_impl_value


def _unwrap_constant(value):
    """Most are neither constants nor lists of them; the interpreter looks for lists first."""
    if type(value) is core.constexpr:
        return value.value
    return _unwrap(value) if isinstance(value, _UNWRAPPED) else value


@cache
def _facts_of(shape):
    """Of a block's type: its shape, and its size. Of its tensors: both as constants."""
    sizes = core.tuple(shape)
    numel = validate_block_shape(sizes)
    return sizes, numel, core.tuple([core.constexpr(size) for size in shape]), core.constexpr(numel)


def _init_block_type(self, element_ty, shape):
    sizes = tuple(_unwrap_constant(size) for size in _unwrap_constant(shape))
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    self.element_ty = element_ty
    self._facts = _facts_of(sizes)
    self.shape, self.numel, *_ = self._facts


def _init_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    _, _, self.shape, self.numel = type._facts if type.is_block() else _facts_of(())


def _broadcast_values(self, lhs, rhs):
    """Most are of one shape already."""
    left, right = lhs.type, rhs.type
    if left.is_block() and right.is_block() and left.shape.values == right.shape.values:
        return lhs, rhs
    return _broadcast(self, lhs, rhs)


def _patch_member(obj, name, member, builder, scope):
    """The interpreter makes a new dictionary of each call's arguments."""
    semantic = TritonSemantic(builder)

    def call(*args, **options):
        options["_semantic"] = semantic
        return member(*args, **options)

    scope.set_attr(obj, name, call)


interpreter._patch_lang_tensor = _patch_index
interpreter._convert_float = _round_to_fp8
if DEVICE.type == "cpu":
    core.tuple.__init__ = _init_tuple
    core.tuple.type = property(_type_of_tuple, lambda self, type: setattr(self, "_type", type))
    core._unwrap_if_constexpr = _unwrap_constant
    core.block_type.__init__ = _init_block_type
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    core.tensor.__init__ = _init_tensor
    TritonSemantic.broadcast_impl_value = _broadcast_values
    interpreter._patch_attr = _patch_member
    interpreter._get_np_dtype = _numpy_type
    # Triton looks for integers that overflow, and drops what it finds unless it is in debug mode.
    unchecked = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = unchecked
    # The language (`tl` and `core`, as this module names it) is made the interpreter's once and for
    # all, not at each call of each function. Tests that compile do so in processes of their own.
    interpreter._patch_lang(_patch_index)
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
