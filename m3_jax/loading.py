"""A checkpoint as a model: abstract first, then filled weight by weight, straight into its shards."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from m3_jax.abstract_model import abstract_model, fill
from m3_jax.checkpoint.errors import CheckpointError, listing
from m3_jax.checkpoint.huggingface import HuggingFaceCheckpoint
from m3_jax.checkpoint.names import Part, Weight
from m3_jax.checkpoint.open import open_checkpoint
from m3_jax.checkpoint.orbax_parts import chunk_rows, empty_aligned, read_part
from m3_jax.checkpoint.store import OrbaxCheckpoint
from m3_jax.model import M3ForCausalLM, weights_by_path

VISION_PART = "vision"
# Threads that read the released layout: enough for a fast disk, and no more than a small machine bears.
READERS = 8


def load(path: str | Path, *, mesh: Mesh | None = None, dtype: jax.typing.DTypeLike | None = None) -> M3ForCausalLM:
    """The model of a checkpoint that `m3-convert` wrote, or of a Hugging Face folder in the released layout.

    Args:
      path: the folder.
      mesh: a mesh of `make_mesh`, over which every weight is cut as it is annotated; None: the default device.
      dtype: float32 or bfloat16; None: that of the stored embedding, float32 where it is float16. The router is
        float32 whatever is asked for.

    Each device gets its own shard of a weight straight from the files, whatever wrote them: host memory beyond what CPU
    devices hold stays within 1 GiB or one shard (Orbax) or within one weight (Hugging Face), less than a layer in both.
    Every process of a mesh over several calls this, and reads what its own devices need. Raises `CheckpointError`, a
    `ValueError`, where the folder is not a whole checkpoint.
    """
    checkpoint = open_checkpoint(path)
    if dtype is None:
        stored = checkpoint.dtypes["embed_tokens.weight"]
        dtype = stored if stored.name == "bfloat16" else np.dtype(np.float32)
    model = abstract_model(checkpoint.config, dtype=dtype, mesh=mesh)
    targets = weights_by_path(model)
    text_parts = [part for part in checkpoint.parts if part.name != VISION_PART]
    named = {weight.path for part in text_parts for weight in part.weights}
    if named != targets.keys():
        raise CheckpointError(f"{path}: model and checkpoint differ in {listing(named ^ targets.keys())}")
    values: list[tuple[str, jax.Array]] = []
    for part in text_parts:
        values += _read(checkpoint, part, targets)
    return fill(model, values)


def _read(
    checkpoint: OrbaxCheckpoint | HuggingFaceCheckpoint, part: Part, targets: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[tuple[str, jax.Array]]:
    wanted = {weight.path: targets[weight.path] for weight in part.weights}
    for weight in part.weights:
        if weight.shape != wanted[weight.path].shape:
            raise CheckpointError(
                f"{checkpoint.folder}: {weight.path!r} has shape {weight.shape}, the model {wanted[weight.path].shape}"
            )
    if isinstance(checkpoint, OrbaxCheckpoint):
        yield from read_part(checkpoint.part_folder(part), wanted).items()
    else:
        with ThreadPoolExecutor(READERS) as pool:
            for weight in part.weights:
                yield weight.path, _read_released(checkpoint, weight, wanted[weight.path], pool)


def _read_released(
    checkpoint: HuggingFaceCheckpoint, weight: Weight, target: jax.ShapeDtypeStruct, pool: ThreadPoolExecutor
) -> jax.Array:
    """One weight in its place. The host holds it whole, or the rows of it that this process's devices need."""
    assert target.sharding is not None
    indices = target.sharding.addressable_devices_indices_map(target.shape).values()
    needed = [index[0].indices(weight.shape[0]) for index in indices if index is not None]
    first, last = min(start for start, _, _ in needed), max(stop for _, stop, _ in needed)
    value = empty_aligned((last - first, *weight.shape[1:]), target.dtype)
    size = chunk_rows(weight.shape, value.dtype.itemsize)
    reads = [
        pool.submit(checkpoint.read, weight, value[start : start + size], first + start)
        for start in range(0, len(value), size)
    ]
    for read in reads:
        read.result()

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[0].indices(weight.shape[0])
        return value[(slice(start - first, stop - first), *index[1:])]

    # Waited for, because a transfer keeps its host copy until it is done.
    return jax.block_until_ready(jax.make_array_from_callback(target.shape, target.sharding, shard))
