"""Fills a built `Decoder` from safetensors, GGUF or random numbers.

Files are memory-mapped, and cast while they are copied into place piece by piece, so that the peak
is little above the model. `startup` calls `load_weights` once. Every parameter is filled exactly
once, or a `ValueError` says what the checkpoint lacks or has over.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from msgspec.structs import replace as replace_struct
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanovllm.checkpoint.gguf import GGUFTensor
from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.checkpoint.quantization import SUPPORTED
from nanovllm.checkpoint.spec import Rope
from nanovllm.checkpoint.weight_files import INDEX, SINGLE, indexed_files, weight_files
from nanovllm.checkpoint.weight_names import is_transposed, tensor_name
from nanovllm.config import LoadFormat
from nanovllm.protocol.plan import ProgressCallback
from nanovllm.worker.layers.linear import UNQUANTIZED, WeightSlot
from nanovllm.worker.layers.prepacked import can_prepack, prepack
from nanovllm.worker.layers.rotary import memory_order
from nanovllm.worker.models.decoder import Decoder
from nanovllm.worker.pieces import pieces, within

# Tensors that some checkpoints carry though they follow from the config.
DERIVED_SUFFIXES = (
    *("rotary_emb.inv_freq", "rope_freqs.weight"),
    *("rope_factors_long.weight", "rope_factors_short.weight"),
)
DUMMY_STD = 0.02  # what models are commonly initialized with
PIECE_VALUES = 2**18  # of a GGUF tensor at a time: what numpy makes on the way stays in the cache
NUM_NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a file's tensor a slot's piece lies. shape: of that whole tensor. is_transposed: it
    has inputs before outputs."""

    slot: WeightSlot
    shape: tuple[int, ...]
    index: tuple[slice, ...]
    is_transposed: bool = False

    @property
    def is_whole(self) -> bool:
        return all(
            piece == slice(0, size) for piece, size in zip(self.index, self.shape, strict=True)
        )

    def as_piece(self, values: Tensor) -> Tensor:
        """What was read, without the axis of experts, outputs first."""
        sizes = [cut.size for cut in self.slot.piece]
        return values.reshape(sizes[::-1]).t() if self.is_transposed else values.reshape(sizes)


def load_weights(
    model: Decoder,
    checkpoint: Checkpoint,
    *,
    load_format: LoadFormat,
    seed: int,
    on_progress: ProgressCallback,
    prepacks: bool = True,
) -> None:
    """Fill every parameter of `model`, then lay them out as its device likes them.

    Of each tensor only the pieces are read that this rank holds. What is kept quantized is
    quantized as it comes, so that the peak is little above the quantized model. seed: of
    load_format "dummy", which reads no file. on_progress is told the phase "weights". prepacks:
    false where somebody else lays weights out. Raises `ValueError` naming the file or tensor and
    the remedy.
    """
    if load_format not in ("auto", "dummy", checkpoint.format):
        raise ValueError(
            f"load_format: {checkpoint.path} is {checkpoint.format}, not {load_format}: use 'auto'"
        )
    slots = list(model.slots())
    if load_format == "dummy":
        filled = _fill_randomly(model, slots, seed)
    elif checkpoint.format == "gguf":
        filled = _fill_from_gguf(model, slots, checkpoint)
    else:
        filled = _fill_from_safetensors(model, slots, checkpoint.path)
    num_filled, total = 0, sum(slot.target.numel() for slot in slots)
    for num_values in filled:
        num_filled += num_values
        on_progress("weights", num_filled / total)
    assert num_filled == total
    for layer in model.layers:
        layer.attention.settle()
    if prepacks and can_prepack(model.dtype, model.device):
        plain = (linear for linear in model.linears() if linear.method is UNQUANTIZED)
        prepack(linear for linear in plain if len(linear.weight))  # a rank may have no ids


def _fill_randomly(model: Decoder, slots: list[WeightSlot], seed: int) -> Iterator[int]:
    """Normally distributed, norms one; drawn on the device. Yields the size of each tensor."""
    generator = torch.Generator(model.device)
    for slot in slots:
        assert slot.dtype is None, "a stored form has no numbers to draw"
        if slot.part.endswith("norm"):
            slot.target.fill_(1.0)
        elif slot.target.numel():
            # The whole tensor, whatever piece of it is here, and by its name, whatever other
            # tensors are here: ranks agree on what they share.
            expert = None if slot.expert is None else slot.expert.start
            name = f"{slot.part} {slot.kind} {slot.layer} {expert}"
            generator.manual_seed(seed + crc32(name.encode()))
            values = torch.empty(slot.shape, dtype=model.dtype, device=model.device)
            values.normal_(0.0, DUMMY_STD, generator=generator)
            slot.write(values[tuple(cut.slice for cut in slot.piece)])
        yield slot.target.numel()


def _fill_from_safetensors(
    model: Decoder, slots: list[WeightSlot], directory: Path
) -> Iterator[int]:
    """From one file or many. Yields the size of each piece."""
    files = _files_of_tensors(directory)
    names, known = model.spec.names.safetensors, model.spec.names.known
    places = _places(slots, names)
    elsewhere = _modules_of_other_ranks(slots, names)
    known_names = filter(None, map(known, files))
    found = (name for name in known_names if name.rpartition(".")[0] not in elsewhere)
    _match(names, places, _of_this_stage(model, found, names, slots), where=directory)
    for path in sorted(set(files.values())):
        with _opened(path) as file:
            promised = {
                name for name, where in files.items() if where == path and known(name) in places
            }
            if lost := promised - set(file.keys()):
                raise ValueError(
                    f"{path} lacks {min(lost)}, which {INDEX} says it holds: fetch both again"
                )
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if files.get(name) != path:  # the index says that another file has it
                    continue
                for place in places.get(known(name) or "", ()):
                    values = _read(file, name, place, where=path)
                    with _naming(name, path):
                        order = _order_of_heads(model, place.slot)
                        place.slot.write(values if order is None else _reordered(values, order))
                    yield place.slot.target.numel()


def _read(file: Any, name: str, place: Place, *, where: Path) -> Tensor:
    """The piece, in the precision of the file."""
    found = file.get_slice(name)
    shape = tuple(found.get_shape())
    # Scales of rows are stored as columns or as lists, a single one perhaps as a list of one.
    same = [size for size in shape if size != 1] == [size for size in place.shape if size != 1]
    if not same:
        raise _wrong_shape(place, shape, name=name, where=where)
    if shape == place.shape and not place.is_whole:
        values = found[place.index]
    else:
        values = file.get_tensor(name).view(place.shape)[place.index]
    slot, dtype = place.slot, values.dtype
    plain = dtype.is_floating_point and dtype.itemsize > 1
    if not (plain if slot.dtype is None else dtype == slot.dtype):
        told = "has a scale" if slot.dtype else "has no scale that its config tells of"
        raise ValueError(f"{where}: tensor {name} is {dtype} and {told}: use {SUPPORTED}")
    return place.as_piece(values)


def _fill_from_gguf(
    model: Decoder, slots: list[WeightSlot], checkpoint: Checkpoint
) -> Iterator[int]:
    """Dequantized piece by piece. Yields the size of each."""
    tensors = checkpoint.gguf.tensors
    names = model.spec.names
    places = _places(slots, names.gguf)
    found = _of_this_stage(model, tensors, names.gguf, slots)
    _match(names.gguf, places, found, where=checkpoint.path)
    for name, place in ((name, place) for name, some in places.items() for place in some):
        if tensors[name].shape != place.shape:
            raise _wrong_shape(place, tensors[name].shape, name=name, where=checkpoint.path)
        slot = place.slot
        order = _order_of_heads(model, slot, interleaved=names.gguf_interleaved)
        if slot.keep is not None:
            with _naming(name, checkpoint.path):
                slot.keep(_stored_piece(tensors[name], place, order))
            yield slot.target.numel()
            continue
        for values, rows in _gguf_pieces(tensors[name], place, unit=len(order or "1")):
            slot.write(values if order is None else _reordered(values, order), rows)
            yield slot.target[rows].numel()


def _order_of_heads(
    model: Decoder, slot: WeightSlot, *, interleaved: bool = False
) -> list[int] | None:
    """Which number of each head in a file lies where in memory, of what is rotated; None: as it is.

    interleaved: the file has been written so, whatever the family does.
    """
    if slot.layer is None or slot.part not in ("q", "k", "q_norm", "k_norm"):
        return None
    attention = model.spec.layers[slot.layer].attention
    rope = attention.rope
    if interleaved and slot.part in ("q", "k"):
        rope = replace_struct(rope or Rope(1.0), interleaved=True)
    order = None if rope is None else memory_order(rope, attention.head_dim)
    if order is None or not slot.shape or slot.shape == (1,):  # one scale for all
        return None
    if slot.kind not in ("weight", "bias", "weight_scale"):
        raise ValueError(
            f"has rows of {slot.part} that must be reordered for its rope, which packed weights "
            "do not allow: use the model unquantized"
        )
    return order


def _reordered(values: Tensor, order: list[int]) -> Tensor:
    """values: [heads * head_dim, …]."""
    return values.view(-1, len(order), *values.shape[1:])[:, order].flatten(0, 1)


def _stored_piece(tensor: GGUFTensor, place: Place, order: list[int] | None) -> GGUFTensor:
    """Some rows, in the order of parameters, and columns, as they are stored: whole blocks."""
    import gguf  # half a second that a start without GGUF need not wait for

    *leading, rows, columns = place.index
    size, num_bytes = gguf.GGML_QUANT_SIZES[tensor.type]
    assert columns.start % size == 0 and columns.stop % size == 0
    first, end = (at // size * num_bytes for at in (columns.start, columns.stop))
    before = sum(index.start for index in leading) * tensor.shape[-2]
    raw = tensor.raw[before + rows.start : before + rows.stop, first:end]
    if order is not None:
        raw = raw.reshape(-1, len(order), raw.shape[1])[:, order].reshape(raw.shape)
    return replace(tensor, raw=raw, shape=(len(raw), columns.stop - columns.start))


def _gguf_pieces(tensor: GGUFTensor, place: Place, *, unit: int) -> Iterator[tuple[Tensor, slice]]:
    """Some rows of the slot's piece at a time, a multiple of `unit`, and which ones."""
    *_, num_columns = tensor.shape
    if len(place.slot.piece) < 2:
        yield place.as_piece(_dequantized(tensor)[place.index]), slice(None)
        return
    *leading, rows, columns = place.index
    first = rows.start + sum(index.start for index in leading) * tensor.shape[-2]
    num_rows = rows.stop - rows.start
    for some in pieces(num_rows, num_columns, most_values=PIECE_VALUES, unit=unit):
        raw = tensor.raw[within(slice(first, first + num_rows), some)]
        piece = replace(tensor, raw=raw, shape=(len(raw), num_columns))
        yield _dequantized(piece)[:, columns], some


def _dequantized(tensor: GGUFTensor) -> Tensor:
    # fp32 is a read-only map
    return torch.from_numpy(np.require(tensor.dequantize(), requirements="W"))


def _places(slots: Iterable[WeightSlot], names: Mapping[str, str]) -> dict[str, list[Place]]:
    """A file's tensor → the pieces of it that are wanted (`WeightNames` says what lies where)."""
    by_name: dict[str, dict[str, list[WeightSlot]]] = {}
    for slot in slots:
        expert = 0 if slot.expert is None else slot.expert.start
        name = tensor_name(names[slot.part].format(slot.layer, expert), slot.kind)
        by_name.setdefault(name, {}).setdefault(slot.part, []).append(slot)
    order = list(names)
    return {
        name: _stacked([parts[part] for part in sorted(parts, key=order.index)], names)
        for name, parts in by_name.items()
    }


def _stacked(parts: list[list[WeightSlot]], names: Mapping[str, str]) -> list[Place]:
    """Places in one tensor, whose outputs are those of the parts, one behind the other."""
    first = parts[0][0]
    shape, axis = first.shape, first.outputs if first.shape else None
    if axis is not None:
        total = sum(part[0].shape[axis] for part in parts)
        shape = (*shape[:axis], total, *shape[axis + 1 :])
    is_stack = first.expert is not None and names[first.part].count("{}") < 2
    if is_stack and first.expert is not None:
        shape = (first.expert.whole, *shape)
    places, start = [], 0
    for part in parts:
        for slot in part:
            index = [cut.slice for cut in slot.piece]
            if axis is not None:
                index[axis] = slice(start + index[axis].start, start + index[axis].stop)
            turns = is_transposed(names[slot.part]) and slot.kind == "weight"
            if turns:
                index.reverse()
            if is_stack and slot.expert is not None:
                index.insert(0, slot.expert.slice)
            whole = (*shape[:-2], shape[-1], shape[-2]) if turns else shape
            places.append(Place(slot, whole, tuple(index), turns))
        start += 0 if axis is None else part[0].shape[axis]
    return places


def _modules_of_other_ranks(slots: list[WeightSlot], names: Mapping[str, str]) -> set[str]:
    """Names of experts that other ranks hold, where each expert has modules of its own."""
    every, own = set(), set()
    for slot in slots:
        if slot.expert is not None and names[slot.part].count("{}") > 1:
            every.add((slot.part, slot.layer, slot.expert.whole))
            own.add(names[slot.part].format(slot.layer, slot.expert.start))
    return {
        name
        for part, layer, count in every
        for expert in range(count)
        if (name := names[part].format(layer, expert)) not in own
    }


def _of_this_stage(
    model: Decoder, found: Iterable[str], names: Mapping[str, str], slots: list[WeightSlot]
) -> Iterator[str]:
    """Those of the names found that are no other stage's: of its layers, or of a part that lies
    outside of layers and for which there is no slot."""
    own, num_layers = model.stage.layers, model.spec.num_layers
    if len(own) == num_layers:
        yield from found
        return
    held, elsewhere = {slot.part for slot in slots}, set[str]()
    for part, name in names.items():
        layer, is_layers, _ = name.partition("{}")
        if is_layers:
            elsewhere |= {f"{layer}{index}." for index in range(num_layers) if index not in own}
        elif part not in held:
            elsewhere.add(f"{name}.")
    begins = tuple(elsewhere)
    yield from (name for name in found if not name.startswith(begins))


def _match(
    names: Mapping[str, str],
    places: Mapping[str, list[Place]],
    found: Iterable[str],
    *,
    where: Path,
) -> None:
    """Raises if the names found are not those wanted. A head that is tied may be there, too."""
    head = f"{names['lm_head']}.weight"
    spare = {name for name, found in places.items() if all(one.slot.is_optional for one in found)}
    optional = {head} - places.keys() | spare
    present = {name for name in found if not name.endswith(DERIVED_SUFFIXES)} - optional
    lost, over = places.keys() - spare - present, present - places.keys()
    for problem, odd in (("lacks", lost), ("has over", over)):
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


@contextmanager
def _naming(name: str, path: Path) -> Iterator[None]:
    """Says of which tensor it is, what is wrong with its values."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: tensor {name} {error}") from error


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: fetch the checkpoint again") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): fetch it again") from error


def _wrong_shape(place: Place, shape: tuple[int, ...], *, name: str, where: Path) -> ValueError:
    note = f" ({place.slot.note})" if place.slot.note else ""
    return ValueError(
        f"{where}: tensor {name} has shape {shape}, its config{note} asks for {place.shape}: "
        "check that the config belongs to it"
    )
