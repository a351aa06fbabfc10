"""Weights laid out for the native products: what is kept of a GGUF tensor or a bfloat16 one.

`quant.gguf` and `decoder` make them while weights are loaded. Packing moves bits and changes none.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanovllm.checkpoint.native_steps import TILE
from nanovllm.worker.kernels.native.library import BF16, Matrix, library

ALIGNMENT = 64  # bytes; of a vector


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight, [rows, columns]. `matrix` points into `data`, which must outlive its users."""

    matrix: Matrix
    data: npt.NDArray[np.uint8]

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes

    @property
    def kind(self) -> str:
        """As GGUF calls its type: "Q4_1"."""
        import gguf  # half a second that a start without GGUF need not wait for

        return gguf.GGMLQuantizationType(self.matrix.type).name


def can_pack(kind: int, columns: int) -> bool:
    """Whether there are products for weights of this GGUF type (or `BF16`)."""
    return columns % TILE == 0 and library().nv_packed_bytes(kind, 1, columns) > 0


def pack_gguf(raw: npt.NDArray[np.uint8], kind: int, *, columns: int, name: str) -> Packed:
    """raw: [rows, bytes per row] as in the file; kind: its GGUF type, which `can_pack`.

    Raises `ValueError` naming the tensor if one of its scales is no number.
    """
    raw = np.ascontiguousarray(raw)
    packed, bad_row = _pack(kind, len(raw), columns, raw.ctypes.data, raw.strides[0])
    if bad_row >= 0:
        raise ValueError(f"tensor {name!r} is damaged in row {bad_row}: fetch it again")
    return packed


def pack_bfloat16(weight: Tensor) -> Packed:
    """weight: [rows, columns] bfloat16."""
    assert weight.dtype == torch.bfloat16 and weight.shape[1] % TILE == 0
    weight = weight.contiguous()
    rows, columns = weight.shape
    return _pack(BF16, rows, columns, weight.data_ptr(), 2 * columns)[0]


def _pack(kind: int, rows: int, columns: int, raw: int, row_bytes: int) -> tuple[Packed, int]:
    """raw: the address of the rows. Returns the first bad row, too, or -1."""
    num_bytes = library().nv_packed_bytes(kind, rows, columns)
    room = np.zeros(num_bytes + ALIGNMENT, np.uint8)
    data = room[-room.ctypes.data % ALIGNMENT :][:num_bytes]
    bad_row: int = library().nv_pack(kind, rows, columns, raw, row_bytes, data.ctypes.data)
    return Packed(Matrix(kind, rows, columns, 0, data.ctypes.data), data), bad_row
