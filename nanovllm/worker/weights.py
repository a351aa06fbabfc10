"""Fills a built `Decoder` from safetensors, GGUF or random numbers.

Files are memory-mapped, and cast while they are copied into place piece by piece, so that the peak
is little above the model. `worker` calls `load_weights` once. Every parameter is filled exactly
once, or a `ValueError` says what the checkpoint lacks or has over.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanovllm.checkpoint.gguf import GGUFTensor
from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.checkpoint.quantization import SUPPORTED
from nanovllm.checkpoint.weight_files import INDEX, SINGLE, indexed_files, weight_files
from nanovllm.config import LoadFormat
from nanovllm.protocol.plan import ProgressCallback
from nanovllm.worker.layers.linear import UNQUANTIZED, WeightSlot
from nanovllm.worker.layers.prepacked import can_prepack, prepack
from nanovllm.worker.models.decoder import Decoder
from nanovllm.worker.quant.fp8 import E4M3, quantize_rows

# Tensors that some checkpoints carry though they follow from the config.
DERIVED_SUFFIXES = ("rotary_emb.inv_freq", "rope_freqs.weight")
DUMMY_STD = 0.02  # what models are commonly initialized with
PIECE_VALUES = 2**18  # of a GGUF tensor at a time: what numpy makes on the way stays in the cache
NUM_NAMES_SHOWN = 3


def load_weights(
    model: Decoder,
    checkpoint: Checkpoint,
    *,
    load_format: LoadFormat,
    seed: int,
    on_progress: ProgressCallback,
) -> None:
    """Fill every parameter of `model`, then lay them out as its device likes them.

    The linear layers have memory (`quant.select.allocate_linears`). What is kept quantized is
    quantized as it comes, so that the peak is little above the quantized model. seed: of
    load_format "dummy", which reads no file. on_progress is told the phase "weights".
    Raises `ValueError` naming the file or tensor and the remedy.
    """
    if load_format not in ("auto", "dummy", checkpoint.format):
        raise ValueError(
            f"load_format: {checkpoint.path} is {checkpoint.format}, not {load_format}: use 'auto'"
        )
    if load_format == "dummy":
        filled = _fill_randomly(model, seed)
    elif checkpoint.format == "gguf":
        filled = _fill_from_gguf(model, checkpoint)
    else:
        filled = _fill_from_safetensors(model, checkpoint.path)
    num_filled = 0
    for num_values in filled:
        num_filled += num_values
        on_progress("weights", num_filled / model.num_parameters)
    assert num_filled == model.num_parameters
    if can_prepack(model.dtype, model.device):
        prepack(linear for linear in model.linears() if linear.method is UNQUANTIZED)


def _fill_randomly(model: Decoder, seed: int) -> Iterator[int]:
    """Normally distributed, norms one; drawn on the device. Yields the size of each tensor."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for slot in model.slots():
        if slot.part.endswith("norm"):
            slot.target.fill_(1.0)
        elif slot.scale is None:
            slot.target.normal_(0.0, DUMMY_STD, generator=generator)
        else:
            values = torch.empty(slot.target.shape, dtype=model.dtype, device=model.device)
            _put(values.normal_(0.0, DUMMY_STD, generator=generator), slot.target, slot.scale)
        yield slot.target.numel()


def _fill_from_safetensors(model: Decoder, directory: Path) -> Iterator[int]:
    """From one file or many. Yields the size of each tensor."""
    files = _files_of_tensors(directory)
    names = model.spec.names.safetensors
    slots = _named_slots(model, names)
    scales = {
        f"{name}_scale": slot.scale
        for name, slot in slots.items()
        if slot.scale is not None and f"{name}_scale" in files
    }
    _match(names, slots, files.keys() - scales.keys(), where=directory)
    for path in sorted(set(files.values())):
        with _opened(path) as file:
            promised = {name for name, where in files.items() if where == path and name in slots}
            if lost := promised - set(file.keys()):
                raise ValueError(
                    f"{path} lacks {min(lost)}, which {INDEX} says it holds: fetch both again"
                )
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if files.get(name) != path:  # the index says that another file has it
                    continue
                if name in scales:
                    _put_scale(file.get_tensor(name), scales[name], name=name, where=path)
                elif name in slots:
                    slot, values = slots[name], file.get_tensor(name)
                    is_stored = f"{name}_scale" in scales
                    _check_shape(slot, tuple(values.shape), name=name, where=path)
                    _check_type(values.dtype, is_stored=is_stored, name=name, where=path)
                    _put(values, slot.target, None if is_stored else slot.scale)
                    yield values.numel()


def _fill_from_gguf(model: Decoder, checkpoint: Checkpoint) -> Iterator[int]:
    """Dequantized piece by piece. Yields the size of each."""
    tensors = checkpoint.gguf.tensors
    names = model.spec.names.gguf
    slots = _named_slots(model, names)
    _match(names, slots, tensors, where=checkpoint.path)
    for name, slot in slots.items():
        _check_shape(slot, tensors[name].shape, name=name, where=checkpoint.path)
        whole = _in_file_order(model, slot, slot.target)
        scales = None if slot.scale is None else _in_file_order(model, slot, slot.scale)
        for tensor, piece in _pieces(tensors[name], whole):
            values = np.require(tensor.dequantize(), requirements="W")  # fp32 is a read-only map
            target, scale = whole[piece], None if scales is None else scales[piece]
            _put(torch.from_numpy(values).view(target.shape), target, scale)
            yield target.numel()


def _in_file_order(model: Decoder, slot: WeightSlot, rows: Tensor) -> Tensor:
    """A view of a slot's rows in the order the GGUF file has them in."""
    if slot.layer is None or slot.part not in ("q", "k") or not model.spec.names.gguf_interleaved:
        return rows
    half = model.spec.layers[slot.layer].attention.head_dim // 2
    # [heads, 2, half, …] in a parameter, [heads, half, 2, …] in the file
    return rows.view(-1, 2, half, *rows.shape[1:]).transpose(1, 2)


def _pieces(tensor: GGUFTensor, target: Tensor) -> Iterator[tuple[GGUFTensor, slice]]:
    """Cut a tensor, and say which entries of the target's first axis each piece is for."""
    if len(tensor.shape) == 1:
        yield tensor, slice(None)
        return
    rows_per_entry = tensor.shape[0] // len(target)
    step = max(1, PIECE_VALUES // target[0].numel())
    for start in range(0, len(target), step):
        raw = tensor.raw[start * rows_per_entry : (start + step) * rows_per_entry]
        piece = slice(start, start + step)
        yield replace(tensor, raw=raw, shape=(len(raw), *tensor.shape[1:])), piece


def _put(values: Tensor, target: Tensor, scale: Tensor | None) -> None:
    """Copy, or quantize row by row on the target's device."""
    if scale is None:
        target.copy_(values)
    else:
        quantized = quantize_rows(values.to(target.device))
        target.copy_(quantized.values)
        scale.copy_(quantized.scale.squeeze(-1))


def _put_scale(values: Tensor, scale: Tensor, *, name: str, where: Path) -> None:
    """One number for all rows, or one each."""
    if values.numel() not in (1, len(scale)):
        raise ValueError(
            f"{where}: tensor {name} has shape {tuple(values.shape)}, where one scale, or one for "
            f"each of {len(scale)} rows, is supported: use a checkpoint quantized per channel"
        )
    scale.copy_(values.flatten())


def _named_slots(model: Decoder, names: Mapping[str, str]) -> dict[str, WeightSlot]:
    """Checkpoint name → slot, for every slot."""
    return {f"{names[slot.part].format(slot.layer)}.{slot.kind}": slot for slot in model.slots()}


def _match(
    names: Mapping[str, str],
    slots: Mapping[str, WeightSlot],
    found: Iterable[str],
    *,
    where: Path,
) -> None:
    """Raises if the names found are not those wanted. A head that is tied may be there, too."""
    head = f"{names['lm_head']}.weight"
    optional = {head} - slots.keys()
    present = {name for name in found if not name.endswith(DERIVED_SUFFIXES)} - optional
    for problem, odd in (("lacks", slots.keys() - present), ("has over", present - slots.keys())):
        if odd:
            some = ", ".join(sorted(odd)[:NUM_NAMES_SHOWN])
            raise ValueError(
                f"{where} {problem} {len(odd)} tensors that its config tells otherwise of "
                f"({some}): fetch the checkpoint again, or check that its config belongs to it"
            )


def _files_of_tensors(directory: Path) -> dict[str, Path]:
    """Tensor name → file, from the index if there is one, else from the files themselves."""
    if (indexed := indexed_files(directory)) is not None:
        return indexed
    files: dict[str, Path] = {}
    for path in weight_files(directory):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if name in files:
                    raise ValueError(
                        f"{path} and {files[name].name} both hold tensor {name}: fetch the "
                        f"checkpoint with its {INDEX}, or convert it again"
                    )
                files[name] = path
    if not files:
        raise ValueError(
            f"{directory} holds no .safetensors file of the model ({SINGLE}, or shards and their "
            f"index): convert or fetch the weights, or name one .gguf file"
        )
    return files


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: fetch the checkpoint again") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): fetch it again") from error


def _check_type(dtype: torch.dtype, *, is_stored: bool, name: str, where: Path) -> None:
    """is_stored: the checkpoint has a scale for it."""
    plain = dtype.is_floating_point and dtype.itemsize > 1
    if (dtype == E4M3) if is_stored else plain:
        return
    told = "has a scale" if is_stored else "has no scale that its config tells of"
    raise ValueError(f"{where}: tensor {name} is {dtype} and {told}: use {SUPPORTED}")


def _check_shape(slot: WeightSlot, shape: tuple[int, ...], *, name: str, where: Path) -> None:
    wanted = tuple(slot.target.shape)
    if shape != wanted:
        raise ValueError(
            f"{where}: tensor {name} has shape {shape}, its config asks for {wanted}: "
            "check that the config belongs to it"
        )
