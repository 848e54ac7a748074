"""Parts on disk: each a plain Orbax PyTree checkpoint, written and read without a copy more than there must be.

The settings were measured (`benchmarks/convert.py` has the sum of them):

- zarr3 with no codec but "bytes" and no OCDBT, so a chunk's file is its memory: no compression, which costs more time
  than random mantissas give back, and nothing that tensorstore must assemble in memory of its own first;
- large weights cut along their first dimension, so that a device that needs four experts reads four experts;
- chunks read through a memory map straight into aligned memory that a CPU device takes as it is, where Orbax's own
  handler makes three copies. Files of ours are complete by then: they were renamed into place.
"""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import math
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from m3_jax.checkpoint.dtypes import cast
from m3_jax.checkpoint.errors import CheckpointError, one_line

# What a piece of a large weight should have; the experts' natural piece, one expert, has 75 MB in the release.
CHUNK_BYTES = 64 << 20
# Pieces that are read or written at one moment.
IN_FLIGHT_BYTES = 192 << 20
# Shards that are on their way to their devices at one moment; a larger one goes alone.
RESTORE_BYTES = 1 << 30
# What XLA asks of host memory that it is to use in place.
ALIGNMENT = 64
# How Orbax names a part while it writes it; a rename ends that.
UNFINISHED = ".orbax-checkpoint-tmp"

# Never used here; without it Orbax warns.
STANDARD = ((jax.Array, ocp.type_handlers.ArrayHandler()),)

Read = Callable[[np.ndarray, int], None]


class LazyArray:
    """An array that Orbax writes and that is read row range by row range while it does.

    `read(out, start)` fills `out` with rows `start` onwards. Orbax copies what it saves with `deepcopy`, which here
    copies nothing: the source does not change.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, read: Read):
        self.shape, self.dtype, self.read = shape, dtype, read
        self.ndim, self.size = len(shape), math.prod(shape)
        self.nbytes = self.size * dtype.itemsize
        self.rows = chunk_rows(shape, dtype.itemsize)

    def __deepcopy__(self, memo: object) -> "LazyArray":
        return self


def chunk_rows(shape: tuple[int, ...], itemsize: int) -> int:
    """Rows of a chunk: a divisor of the first dimension, so that all chunks are alike."""
    rows, row_bytes = shape[0], math.prod(shape[1:]) * itemsize
    if rows * row_bytes <= 2 * CHUNK_BYTES:
        return rows
    fitting = max((d for d in range(1, rows + 1) if rows % d == 0 and d * row_bytes <= CHUNK_BYTES), default=1)
    # A vocabulary without useful divisors would become a file a row; whole, it merely takes memory.
    return fitting if fitting * row_bytes >= CHUNK_BYTES // 16 else rows


class _Buffers:
    """Memory for the chunks in flight, used again and again; something larger than all of it goes alone."""

    def __init__(self, total: int):
        self._total = self._left = total
        self._idle: list[np.ndarray] = []
        self._changed = asyncio.Condition()

    async def take(self, nbytes: int) -> np.ndarray:
        """At least `nbytes` bytes, as soon as that many are free."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._left >= min(nbytes, self._total))
            self._left -= min(nbytes, self._total)
            for position, buffer in enumerate(self._idle):
                if nbytes <= buffer.nbytes <= 2 * nbytes:
                    return self._idle.pop(position)
            # Memory that fits nothing here must not add up to the memory that does.
            self._idle.clear()
            return np.empty(nbytes, np.uint8)

    async def give(self, buffer: np.ndarray, nbytes: int) -> None:
        """Takes back a buffer that was taken for `nbytes`."""
        async with self._changed:
            self._left += min(nbytes, self._total)
            self._idle.append(buffer)
            self._changed.notify_all()


class _Writer(ocp.type_handlers.NumpyHandler):
    """Writes a `LazyArray` as Orbax's own handler writes a NumPy array, chunk by chunk; plain Orbax reads it back.

    `_open_and_write` is the one method of Orbax that is private and overridden (its version is pinned): the public
    way takes whole arrays and copies them first, twice the layer before a byte is written.
    """

    def __init__(self, written: Callable[[int], None]):
        super().__init__()
        self._written = written
        self._buffers = _Buffers(IN_FLIGHT_BYTES)

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: Any) -> None:
        tspec["metadata"] = {
            "shape": value.shape,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": (value.rows, *value.shape[1:])}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        }
        store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        await asyncio.gather(*(self._write(store, value, start) for start in range(0, value.shape[0], value.rows)))

    async def _write(self, store: Any, value: LazyArray, start: int) -> None:
        nbytes = value.nbytes // value.shape[0] * value.rows
        buffer = await self._buffers.take(nbytes)
        data = buffer[:nbytes].view(value.dtype).reshape(value.rows, *value.shape[1:])
        await asyncio.to_thread(value.read, data, start)
        # The reference ends with the write: nothing is cached.
        await store[start : start + value.rows].write(data, can_reference_source_data_indefinitely=True)
        await self._buffers.give(buffer, nbytes)
        self._written(nbytes)


@dataclasses.dataclass
class _PlacedArgs(ocp.RestoreArgs):
    """Where an array is to go, and what it must be."""

    target: jax.ShapeDtypeStruct | None = None


class _Budget:
    """Bytes of host memory that shards may take at one moment; a larger one goes alone. For one event loop."""

    def __init__(self, total: int):
        self._total = self._left = total
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def bytes(self, nbytes: int) -> AsyncIterator[None]:
        """Waits until so many are free, and gives them back at the end."""
        nbytes = min(nbytes, self._total)
        async with self._changed:
            await self._changed.wait_for(lambda: self._left >= nbytes)
            self._left -= nbytes
        try:
            yield
        finally:
            async with self._changed:
                self._left += nbytes
                self._changed.notify_all()


class _Placer(ocp.type_handlers.NumpyHandler):
    """Restores arrays of the parts that `_Writer` wrote into their shards: each device's rows and columns, once."""

    async def deserialize(
        self, infos: Sequence[ocp.type_handlers.ParamInfo], args: Sequence[ocp.RestoreArgs] | None = None
    ) -> list[jax.Array]:
        """One array for every info, in the dtype and place of its target."""
        assert args is not None
        budget = _Budget(RESTORE_BYTES)
        return list(
            await asyncio.gather(*(self._place(info, arg, budget) for info, arg in zip(infos, args, strict=True)))
        )

    async def _place(self, info: ocp.type_handlers.ParamInfo, args: ocp.RestoreArgs, budget: _Budget) -> jax.Array:
        assert isinstance(args, _PlacedArgs)
        assert args.target is not None
        assert info.parent_dir is not None
        target, name = args.target, info.name
        store = await ts.open(_spec(Path(info.parent_dir) / name))
        if tuple(store.shape) != tuple(target.shape):
            raise CheckpointError(f"{info.parent_dir}: {name!r} has shape {store.shape}, {target.shape} expected")
        assert target.sharding is not None
        # Devices that hold the same rows share one copy on the host.
        devices_of: dict[str, list[Any]] = {}
        index_of: dict[str, Any] = {}
        for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
            devices_of.setdefault(str(index), []).append(device)
            index_of[str(index)] = index
        shard_bytes = math.prod(target.sharding.shard_shape(target.shape)) * target.dtype.itemsize
        arrays: list[jax.Array] = []
        for key, devices in devices_of.items():
            async with budget.bytes(shard_bytes):
                shard = await _read_aligned(store[index_of[key]], target.dtype)
                placed = [jax.device_put(shard, device) for device in devices]
                # A transfer keeps its host copy until it is done: the bytes are free only then.
                await asyncio.to_thread(jax.block_until_ready, placed)
                del shard
            arrays += placed
        return jax.make_array_from_single_device_arrays(target.shape, target.sharding, arrays)


def _spec(array: Path) -> ts.Spec:
    return ts.Spec(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(array)},
            "context": {"file_io_mode": {"mode": "memmap"}},
            # A chunk that is not there is an error and not zeros.
            "fill_missing_data_reads": False,
            "open": True,
        }
    )


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that a CPU device takes over without a copy: XLA asks for 64 bytes, NumPy gives 16."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


async def _read_aligned(source: Any, dtype: np.dtype) -> np.ndarray:
    values = empty_aligned(tuple(source.shape), source.dtype.numpy_dtype)
    await ts.array(values).write(source[ts.d[:].translate_to[0]])
    if values.dtype == dtype:
        return values
    out = empty_aligned(values.shape, dtype)
    await asyncio.to_thread(cast, values, out)
    return out


def tree_of(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": x} as {"a": {"b": x}}: the tree that a part is."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, name = path.split(".")
        functools.reduce(lambda node, key: node.setdefault(key, {}), folders, tree)[name] = value
    return tree


def flat_of(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The reverse of `tree_of`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flat_of(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def write_part(folder: Path, arrays: Mapping[str, LazyArray], written: Callable[[int], None]) -> None:
    """Writes a part that is there whole, under its name, or not at all.

    `written` hears of every piece's bytes, from another thread. What a failed attempt has left is removed.
    """
    registry = ocp.type_handlers.create_type_handler_registry(*STANDARD, (LazyArray, _Writer(written)))
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=True, use_compression=False, type_handler_registry=registry
    )
    try:
        with _quiet_orbax(), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(tree_of(arrays)))
    except CheckpointError:
        remove_unfinished(folder.parent)
        raise
    except Exception as error:  # tensorstore and Orbax raise what they like, a full disk as ValueError
        remove_unfinished(folder.parent)
        raise CheckpointError(f"{folder}: cannot write: {_reason(error)}") from error
    sync_folders(folder)


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Orbax warns of a missing OCDBT that it was told to do without, and logs errors that it also raises."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    text = one_line(error, 1000)
    for code in ("No space left on device", "File too large", "Disk quota exceeded", "Permission denied"):
        if code in text:
            return code
    return one_line(error)


def remove_unfinished(parts: Path) -> None:
    """Removes what Orbax leaves of a part that it did not finish."""
    for path in parts.glob(f"*{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def sync_folders(root: Path) -> None:
    """Makes the names of the files below `root` last; tensorstore has done so for their data."""
    for folder, _, _ in os.walk(root):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def read_rows(folder: Path, path: str, out: np.ndarray, start: int) -> None:
    """Fills `out` with rows `start` onwards of one array of a part, in out's dtype."""
    try:
        store = ts.open(_spec(folder / path)).result()
        rows = store[start : start + len(out)][ts.d[0].translate_to[0]]
        if store.dtype.numpy_dtype == out.dtype:
            ts.array(out).write(rows).result()
        else:
            cast(rows.read().result(), out)
    except Exception as error:  # see write_part
        raise CheckpointError(f"{folder}: {path!r} cannot be read: {one_line(error)}") from error


def read_part(folder: Path, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Restores the arrays of a part, all and no others, each with its target's shape, dtype and sharding."""
    registry = ocp.type_handlers.create_type_handler_registry(*STANDARD, (np.ndarray, _Placer()))
    arguments = {path: _PlacedArgs(restore_type=np.ndarray, target=target) for path, target in targets.items()}
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
            restored = checkpointer.restore(
                folder,
                args=ocp.args.PyTreeRestore(tree_of(dict.fromkeys(targets, 0)), restore_args=tree_of(arguments)),
            )
    except CheckpointError:
        raise
    except Exception as error:  # see write_part
        raise CheckpointError(f"{folder}: cannot be restored: {one_line(error)}") from error
    return flat_of(restored)
