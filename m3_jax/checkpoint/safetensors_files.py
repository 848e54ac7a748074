"""The safetensors files of a folder: headers checked before anything is believed, data read by position.

Reading is `pread` straight into the destination, so an expert's matrix lands in its row of the stack without a second
copy, and a file that is cut while it is read gives an error instead of the signal that a memory map would.
"""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3_jax.checkpoint.dtypes import ITEMSIZE
from m3_jax.checkpoint.errors import CheckpointError, listing, unreadable
from m3_jax.checkpoint.folder import INDEX, MAX_JSON_BYTES, WEIGHTS, parse_json, read_json, regular_file

LENGTH_BYTES = 8
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack", ".h5")


class Tensor(NamedTuple):
    """Where a tensor lies: `offset` counts from the beginning of the file, `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def _natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, name: str, entry: Any, data_start: int) -> Tensor:
    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r}: {what}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse("must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise refuse(f"dtype {dtype!r} is unknown")
    if not isinstance(shape, list) or not all(map(_natural, shape)):
        raise refuse(f"shape {shape!r} must be a list of integers >= 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise refuse(f"data_offsets {offsets!r} must be two integers >= 0")
    begin, end = offsets
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    if end - begin != nbytes:
        raise refuse(f"data_offsets {offsets} hold {end - begin} bytes, {dtype}{shape} has {nbytes}")
    return Tensor(name, dtype, tuple(shape), path, data_start + begin, nbytes)


def read_header(folder: Path, name: str) -> list[Tensor]:
    """The tensors of a file in the order of their data, which must fill the file without gap or overlap."""
    path = regular_file(folder, name)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or length > size - LENGTH_BYTES:
                raise CheckpointError(f"{path}: header of {length} bytes does not fit in a file of {size} bytes")
            if length > MAX_JSON_BYTES:
                raise CheckpointError(f"{path}: header of {length} bytes, at most {MAX_JSON_BYTES} are read")
            header = parse_json(path, file.read(length))
    except OSError as error:
        raise unreadable(path, error) from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    data_start = LENGTH_BYTES + length
    tensors = sorted(
        (_entry(path, tensor, entry, data_start) for tensor, entry in header.items()),
        key=lambda tensor: (tensor.offset, tensor.nbytes),
    )
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} begins at byte {tensor.offset}, {position} expected: gap or overlap"
            )
        position += tensor.nbytes
    if position != size:
        raise CheckpointError(f"{path}: the tensors end at byte {position}, the file has {size} bytes")
    return tensors


def _shards(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The names of the weight files, and the file of every tensor where an index says so."""
    present = sorted(path.name for path in folder.iterdir())
    if INDEX in present:
        weight_map = read_json(folder, INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX}: weight_map must map tensors to files")
        for tensor, file in weight_map.items():
            if not isinstance(file, str) or not file.endswith(".safetensors"):
                raise CheckpointError(f"{folder / INDEX}: tensor {tensor!r} is in {file!r}, not a .safetensors file")
        files = sorted(set(weight_map.values()))
        if WEIGHTS in present and WEIGHTS not in files:
            raise CheckpointError(f"{folder}: both {WEIGHTS} and {INDEX}, which does not name it; remove one")
        return files, weight_map
    files = [name for name in present if name.endswith(".safetensors")]
    if WEIGHTS in files:
        files = [WEIGHTS]
    if len(files) > 1:
        raise CheckpointError(f"{folder / INDEX}: file not found, and there are {len(files)} .safetensors files")
    if not files:
        pickles = [name for name in present if name.endswith(PICKLES)]
        if pickles:
            raise CheckpointError(
                f"{folder / pickles[0]}: not a .safetensors file, and pickles are never read: they can run code"
            )
        raise CheckpointError(f"{folder}: no .safetensors file found")
    return files, None


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by name, from one file or from shards with an index, which must agree with them.

    The index's `total_size` is not looked at: it is wrong in the released checkpoint.
    """
    try:
        files, weight_map = _shards(folder)
    except OSError as error:
        raise unreadable(folder, error) from None
    for file in files:
        regular_file(folder, file)
    tensors: dict[str, Tensor] = {}
    for file in files:
        for tensor in read_header(folder, file):
            if (other := tensors.get(tensor.name)) is not None:
                raise CheckpointError(f"tensor {tensor.name!r} is both in {other.file} and in {tensor.file}")
            tensors[tensor.name] = tensor
            if weight_map is not None and weight_map.get(tensor.name) != file:
                raise CheckpointError(
                    f"{folder / INDEX}: tensor {tensor.name!r} of {file} is "
                    + (f"said to be in {weight_map[tensor.name]!r}" if tensor.name in weight_map else "not named")
                )
    if weight_map is not None and (absent := weight_map.keys() - tensors.keys()):
        raise CheckpointError(f"{folder / INDEX}: tensors that no shard has: {listing(absent)}")
    return tensors


def read_into(tensor: Tensor, out: np.ndarray, byte_offset: int = 0) -> None:
    """Fills the contiguous array `out` with the tensor's bytes from `byte_offset` on."""
    # Types such as bfloat16 have no buffer of their own: take the bytes.
    view = memoryview(out.reshape(-1).view(np.uint8))
    position = tensor.offset + byte_offset
    try:
        fd = os.open(tensor.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while view.nbytes:
                count = os.preadv(fd, [view], position)
                if count == 0:
                    raise CheckpointError(f"{tensor.file}: ends at byte {position}, inside tensor {tensor.name!r}")
                view, position = view[count:], position + count
        finally:
            os.close(fd)
    except OSError as error:
        raise unreadable(tensor.file, error) from None
