"""Two checkpoints, of either layout: are they the same model?"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from checkpoints_convert.progress import progress_bar
from m3_jax.checkpoint.errors import CheckpointError, listing
from m3_jax.checkpoint.open import Checkpoint, open_checkpoint
from m3_jax.checkpoint.orbax_parts import chunk_rows
from m3_jax.checkpoint.store import weight_bytes


class Comparison(NamedTuple):
    """What was compared: weights, their bytes in the second checkpoint, and how many of them have another dtype there.

    A weight of another dtype is equal when casting the first one's gives the second one's bytes.
    """

    weights: int
    nbytes: int
    cast: int


def verify(src: Path, dst: Path) -> Comparison:
    """Compares every weight bit by bit. Raises `CheckpointError` naming the first that differ, or the config's keys."""
    first, second = open_checkpoint(src), open_checkpoint(dst)
    _check_configs(first, second)
    weights = [weight for part in second.parts for weight in part.weights]
    total = sum(weight_bytes(weight, second.dtypes[weight.path]) for weight in weights)
    different, cast = [], 0
    with progress_bar("verify", total) as advance:
        for weight in weights:
            dtype = second.dtypes[weight.path]
            cast += first.dtypes[weight.path] != dtype
            rows = chunk_rows(weight.shape, dtype.itemsize)
            a, b = (np.empty((rows, *weight.shape[1:]), dtype) for _ in range(2))
            same = True
            for start in range(0, weight.shape[0], rows):
                first.read(weight, a, start)
                second.read(weight, b, start)
                same = same and np.array_equal(a.view(np.uint8), b.view(np.uint8))
                advance(b.nbytes)
            if not same:
                different.append(weight.path)
    if different:
        raise CheckpointError(
            f"{src} and {dst}: {len(different)} of {len(weights)} weights differ: {listing(different)}"
        )
    return Comparison(len(weights), total, cast)


def _check_configs(first: Checkpoint, second: Checkpoint) -> None:
    a, b = dataclasses.asdict(first.config), dataclasses.asdict(second.config)
    if different := [key for key in a if a[key] != b[key]]:
        raise CheckpointError(
            f"{first.folder} and {second.folder}: config.json differs in "
            + ", ".join(f"{key} ({a[key]!r}, {b[key]!r})" for key in different)
        )
