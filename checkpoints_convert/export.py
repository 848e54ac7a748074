"""From this project's layout back to the released one."""

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from checkpoints_convert.convert import SPARE_BYTES, copy_side_files, write_config
from checkpoints_convert.progress import Advance, progress_bar
from m3_jax.checkpoint.dtypes import SAFETENSORS_NAMES
from m3_jax.checkpoint.errors import CheckpointError, unreadable
from m3_jax.checkpoint.folder import INDEX, WEIGHTS, existing_folder
from m3_jax.checkpoint.names import Slice, Weight
from m3_jax.checkpoint.orbax_parts import chunk_rows
from m3_jax.checkpoint.partial import Partial, check_space, partial_of, write_file
from m3_jax.checkpoint.store import OrbaxCheckpoint

# safetensors pads a header with spaces to a multiple of this.
ALIGNMENT = 8


class Entry(NamedTuple):
    """A tensor of a shard: where its data is to lie behind the header."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    nbytes: int


class Shard:
    """A safetensors file whose header is laid out before its data is written."""

    def __init__(self, name: str, entries: list[Entry]):
        self.name = name
        # Wide types first, as safetensors writes them: every tensor is then aligned for its type.
        self.entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets, position = {}, 0
        for entry in self.entries:
            offsets[entry.name] = position
            header[entry.name] = {
                "dtype": SAFETENSORS_NAMES[entry.dtype.name],
                "shape": list(entry.shape),
                "data_offsets": [position, position := position + entry.nbytes],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self.header = len(text).to_bytes(8, "little") + text
        self.offsets = {name: len(self.header) + offset for name, offset in offsets.items()}

    def create(self, folder: Path) -> int:
        """Opens the new file with its header written."""
        fd = os.open(folder / self.name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        _write_at(fd, self.header, 0)
        return fd


def export(src: Path, dst: Path, max_shard_bytes: int) -> OrbaxCheckpoint:
    """Writes a checkpoint of this project's layout as a folder in the released one, byte for byte where it came so.

    Args:
      src: a folder that `convert` wrote.
      dst: where the release is to be; must not exist.
      max_shard_bytes: shards have at most so much data, but at least one tensor; one shard becomes one file.

    Returns the source. Nothing is left of a failed export. Raises `CheckpointError`.
    """
    if max_shard_bytes < 1:
        raise CheckpointError(f"max-shard-size={max_shard_bytes}: must be at least 1 byte")
    source = OrbaxCheckpoint(existing_folder(src))
    with partial_of(dst.absolute()) as partial:
        if partial.resumed is not None:
            if partial.resumed.get("command") != "export":
                raise CheckpointError(
                    f"{partial.path}: left by m3-convert {partial.resumed.get('command')}; finish that or remove it"
                )
            partial.restart()
        try:
            partial.begin({"command": "export", "source": str(source.folder)})
            _write(source, partial, max_shard_bytes)
        except CheckpointError:
            partial.discard()
            raise
        except OSError as error:
            partial.discard()
            raise unreadable(partial.path, error) from None
    return source


def _weights(source: OrbaxCheckpoint) -> list[Weight]:
    return [weight for part in source.parts for weight in part.weights]


def _shards(source: OrbaxCheckpoint, max_shard_bytes: int) -> list[Shard]:
    groups: list[list[Entry]] = [[]]
    size = 0
    for weight in _weights(source):
        dtype = source.dtypes[weight.path]
        for piece in weight.slices():
            nbytes = math.prod(piece.shape) * dtype.itemsize
            if groups[-1] and size + nbytes > max_shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(Entry(piece.name, dtype, piece.shape, nbytes))
            size += nbytes
    if len(groups) == 1:
        return [Shard(WEIGHTS, groups[0])]
    return [Shard(f"model-{n:05d}-of-{len(groups):05d}.safetensors", group) for n, group in enumerate(groups, 1)]


def _write(source: OrbaxCheckpoint, partial: Partial, max_shard_bytes: int) -> None:
    shards = _shards(source, max_shard_bytes)
    home = {entry.name: shard for shard in shards for entry in shard.entries}
    total = sum(entry.nbytes for shard in shards for entry in shard.entries)
    check_space(partial.path, total + SPARE_BYTES)
    write_config(source.raw_config, partial.path, None)
    copy_side_files(source.folder, partial.path)
    with progress_bar("export", total) as advance, _Files(partial.path, home) as files:
        for weight in _weights(source):
            _write_weight(source, weight, files, advance)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: home[name].name for name in sorted(home)},
        }
        write_file(partial.path / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    partial.commit()


class _Files:
    """The shards, one open at a time: tensors are written in the order in which they were dealt out to the shards."""

    def __init__(self, folder: Path, home: dict[str, Shard]):
        self._folder, self._home = folder, home
        self._shard: Shard | None = None
        self._fd = -1

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def write(self, name: str, data: np.ndarray, offset: int) -> None:
        """Writes bytes of a tensor from `offset` on."""
        shard = self._home[name]
        if shard is not self._shard:
            self._close()
            self._shard, self._fd = shard, shard.create(self._folder)
        _write_at(self._fd, data.reshape(-1).view(np.uint8), shard.offsets[name] + offset)

    def _close(self) -> None:
        if self._shard is not None:
            self._shard = None
            try:
                os.fsync(self._fd)
            finally:
                os.close(self._fd)


def _write_weight(source: OrbaxCheckpoint, weight: Weight, files: _Files, advance: Advance) -> None:
    dtype = source.dtypes[weight.path]
    rows = chunk_rows(weight.shape, dtype.itemsize)
    values = np.empty((rows, *weight.shape[1:]), dtype)
    for start in range(0, weight.shape[0], rows):
        source.read(weight, values, start)
        for piece in weight.slices():
            _write_piece(piece, values, start, files)
        advance(values.nbytes)


def _write_piece(piece: Slice, values: np.ndarray, start: int, files: _Files) -> None:
    if not piece.index:
        files.write(piece.name, values, start * values[0].nbytes)
    elif start <= piece.index[0] < start + len(values):
        files.write(piece.name, values[(piece.index[0] - start, *piece.index[1:])], 0)


def _write_at(fd: int, data: bytes | np.ndarray, position: int) -> None:
    view = memoryview(data)
    while view.nbytes:
        count = os.pwrite(fd, view, position)
        view, position = view[count:], position + count
