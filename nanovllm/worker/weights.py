"""Fills a built `Decoder` from safetensors, GGUF or random numbers.

Files are memory-mapped, and cast while they are copied into place piece by piece, so that the peak
is little above the model. `worker` calls `load_weights` once. Every parameter is filled exactly
once, or a `ValueError` says what the checkpoint lacks or has over.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanovllm.checkpoint import Checkpoint
from nanovllm.config import LoadFormat
from nanovllm.executor.base import ProgressCallback
from nanovllm.gguf_file import GGUFTensor
from nanovllm.worker.layers.linear import WeightSlot
from nanovllm.worker.layers.prepacked import can_prepack, prepack
from nanovllm.worker.models.decoder import Decoder

# Tensors that some checkpoints carry though they follow from the config.
DERIVED_SUFFIXES = ("rotary_emb.inv_freq", "rope_freqs.weight")
INDEX_NAME = "model.safetensors.index.json"
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

    seed: of load_format "dummy", which reads no file. on_progress is told the phase "weights".
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
        prepack(model.linears())


def _fill_randomly(model: Decoder, seed: int) -> Iterator[int]:
    """Normally distributed, norms one; drawn on the device. Yields the size of each tensor."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for slot in model.slots():
        if slot.part.endswith("norm"):
            slot.target.fill_(1.0)
        else:
            slot.target.normal_(0.0, DUMMY_STD, generator=generator)
        yield slot.target.numel()


def _fill_from_safetensors(model: Decoder, directory: Path) -> Iterator[int]:
    """From one file or many. Yields the size of each tensor."""
    files = _files_of_tensors(directory)
    slots = _match(model, model.spec.names.safetensors, files, where=directory)
    for path in sorted(set(files.values())):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if name in slots:
                    values = file.get_tensor(name)
                    _check(slots[name], values, name=name, where=path)
                    slots[name].target.copy_(values)
                    yield values.numel()


def _fill_from_gguf(model: Decoder, checkpoint: Checkpoint) -> Iterator[int]:
    """Dequantized piece by piece. Yields the size of each."""
    tensors = checkpoint.gguf.tensors
    slots = _match(model, model.spec.names.gguf, tensors, where=checkpoint.path)
    for name, slot in slots.items():
        _check_shape(slot, tensors[name].shape, name=name, where=checkpoint.path)
        for tensor, target in _pieces(tensors[name], _in_file_order(model, slot)):
            values = np.require(tensor.dequantize(), requirements="W")  # fp32 is a read-only map
            target.copy_(torch.from_numpy(values).view(target.shape))
            yield target.numel()


def _in_file_order(model: Decoder, slot: WeightSlot) -> Tensor:
    """A view of the target whose elements come in the order the GGUF file has them in."""
    if slot.part not in ("q", "k") or not model.spec.names.gguf_interleaved:
        return slot.target
    half = model.spec.head_dim // 2
    # [heads, 2, half, …] in a parameter, [heads, half, 2, …] in the file
    return slot.target.view(-1, 2, half, *slot.target.shape[1:]).transpose(1, 2)


def _pieces(tensor: GGUFTensor, target: Tensor) -> Iterator[tuple[GGUFTensor, Tensor]]:
    """Cut a tensor and where it goes along the first axis of the latter."""
    if len(tensor.shape) == 1:
        yield tensor, target
        return
    rows_per_entry = tensor.shape[0] // len(target)
    step = max(1, PIECE_VALUES // target[0].numel())
    for start in range(0, len(target), step):
        raw = tensor.raw[start * rows_per_entry : (start + step) * rows_per_entry]
        yield replace(tensor, raw=raw, shape=(len(raw), *tensor.shape[1:])), target[start:][:step]


def _match(
    model: Decoder, names: Mapping[str, str], found: Iterable[str], *, where: Path
) -> dict[str, WeightSlot]:
    """Checkpoint name → slot, for every slot. Raises if the names found are not those wanted."""
    slots = {f"{names[slot.part].format(slot.layer)}.{slot.kind}": slot for slot in model.slots()}
    optional = {f"{names['lm_head']}.weight"} if model.spec.tied_embeddings else set()
    present = {name for name in found if not name.endswith(DERIVED_SUFFIXES)} - optional
    for problem, odd in (("lacks", slots.keys() - present), ("has over", present - slots.keys())):
        if odd:
            some = ", ".join(sorted(odd)[:NUM_NAMES_SHOWN])
            raise ValueError(
                f"{where} {problem} {len(odd)} tensors that its config tells otherwise of "
                f"({some}): fetch the checkpoint again, or check that its config belongs to it"
            )
    return slots


def _files_of_tensors(directory: Path) -> dict[str, Path]:
    """Tensor name → file, from the index if there is one, else from the files themselves."""
    index = directory / INDEX_NAME
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        except (json.JSONDecodeError, KeyError):
            raise ValueError(f"{index} is damaged: fetch it again") from None
        return {name: directory / file for name, file in weight_map.items()}
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{directory} holds no .safetensors file: convert or fetch the weights")
    files: dict[str, Path] = {}
    for path in paths:
        with _opened(path) as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: fetch the checkpoint again") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): fetch it again") from error


def _check(slot: WeightSlot, values: Tensor, *, name: str, where: Path) -> None:
    _check_shape(slot, tuple(values.shape), name=name, where=where)
    if not values.is_floating_point() or values.itemsize == 1:
        raise ValueError(
            f"{where}: tensor {name} is {values.dtype}, and quantized safetensors are not "
            "supported: use an unquantized checkpoint or a GGUF file"
        )


def _check_shape(slot: WeightSlot, shape: tuple[int, ...], *, name: str, where: Path) -> None:
    wanted = tuple(slot.target.shape)
    if shape != wanted:
        raise ValueError(
            f"{where}: tensor {name} has shape {shape}, its config asks for {wanted}: "
            "check that the config belongs to it"
        )
