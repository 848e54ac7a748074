"""A model as a checkpoint of this project's layout, written from wherever its weights lie."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from m3_jax.checkpoint.errors import CheckpointError, unreadable
from m3_jax.checkpoint.folder import CONFIG
from m3_jax.checkpoint.names import Part, parts
from m3_jax.checkpoint.orbax_parts import LazyArray, write_part
from m3_jax.checkpoint.partial import Partial, check_space, partial_of, write_file
from m3_jax.checkpoint.store import MANIFEST, PARTS, manifest_of
from m3_jax.config import M3Config
from m3_jax.model import M3ForCausalLM, weights_by_path

# Beside the weights: manifest and metadata of the arrays.
SPARE_BYTES = 16 << 20
STATE = {"command": "save"}


def save(model: M3ForCausalLM, path: str | Path) -> None:
    """Writes a model's weights and config in the layout of `m3-convert`, for `load` on any mesh.

    The files do not depend on where the weights lie. They are read from the devices in pieces of 64 MB, a few at a
    time, so that host memory stays under 0.5 GB whatever the model's size (one expert's matrix or a vocabulary that
    cannot be cut goes alone). Until the checkpoint is whole there is only path.partial, which no loader takes for one;
    an error removes it, and after a kill the next `save` begins anew.

    What belongs to the text model alone is written: no vision part and no tokenizer, whose files can be copied beside
    config.json.

    Args:
      model: of `load` or `random_model`, on one device or over a mesh of this process's devices.
      path: a folder that does not exist, in one that does.

    Raises `CheckpointError`, a `ValueError`: the folder exists, cannot be written or has not enough space, or the
    weights lie on devices of several processes.
    """
    dst = Path(path).absolute()
    if jax.process_count() > 1:
        raise CheckpointError(
            f"{dst}: save is for one process that sees all weights, there are {jax.process_count()} processes; "
            "load the model in one process, with a mesh of its own devices or on the CPU"
        )
    config = dataclasses.replace(model.config, vision=None)
    written = list(parts(config))
    weights = weights_by_path(model)
    dtypes = {name: np.dtype(weight.dtype) for name, weight in weights.items()}
    assert dtypes.keys() == {weight.path for part in written for weight in part.weights}
    with partial_of(dst) as partial:
        if partial.resumed not in (None, STATE):
            raise CheckpointError(f"{partial.path}: left by m3-convert; finish that or remove the folder")
        partial.restart()
        try:
            check_space(partial.path, sum(weight.nbytes for weight in weights.values()) + SPARE_BYTES)
            partial.begin(STATE)
            _write(partial, config, written, weights, dtypes)
        except OSError as error:
            partial.discard()
            raise unreadable(partial.path, error) from None
        except BaseException:
            partial.discard()
            raise


def _write(
    partial: Partial,
    config: M3Config,
    written: list[Part],
    weights: Mapping[str, jax.Array],
    dtypes: Mapping[str, np.dtype],
) -> None:
    folder = partial.path / PARTS
    folder.mkdir()
    write_file(partial.path / CONFIG, (json.dumps(config.to_hf(), indent=2) + "\n").encode())
    for part in written:
        arrays = {
            weight.path: LazyArray(
                weight.shape, dtypes[weight.path], functools.partial(read_rows, weights[weight.path])
            )
            for weight in part.weights
        }
        write_part(folder / part.name, arrays, lambda nbytes: None)
    write_file(partial.path / MANIFEST, manifest_of(written, dtypes, STATE))
    partial.commit()


def read_rows(array: jax.Array, out: np.ndarray, start: int) -> None:
    """Fills `out` with rows `start` onwards of an array, from those of its shards that hold them; copies once each."""
    seen = set()
    for shard in array.addressable_shards:
        if str(shard.index) in seen:
            continue
        seen.add(str(shard.index))
        first, stop, _ = shard.index[0].indices(array.shape[0])
        low, high = max(start, first), min(start + len(out), stop)
        if low < high:
            # A piece of its own: what NumPy sees of an array, the array keeps.
            piece = _rows(shard.data, low - first, high - low)
            out[(slice(low - start, high - start), *shard.index[1:])] = np.asarray(piece)


@functools.partial(jax.jit, static_argnums=2)
def _rows(x: jax.Array, start: int, count: int) -> jax.Array:
    # The start is no constant: pieces of one size share an executable.
    return jax.lax.dynamic_slice_in_dim(x, start, count)
