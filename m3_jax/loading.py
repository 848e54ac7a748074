"""A checkpoint as a model: abstract first, then filled weight by weight, straight into its shards."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from m3_jax.checkpoint.errors import CheckpointError, listing
from m3_jax.checkpoint.huggingface import HuggingFaceCheckpoint
from m3_jax.checkpoint.names import Part
from m3_jax.checkpoint.open import open_checkpoint
from m3_jax.checkpoint.orbax_parts import chunk_rows, empty_aligned, read_part
from m3_jax.checkpoint.store import OrbaxCheckpoint
from m3_jax.model import M3ForCausalLM
from m3_jax.sharding import named_sharding

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

    Memory of the host stays at about one layer beyond what its devices hold. Raises `CheckpointError`, a `ValueError`,
    where the folder is not a whole checkpoint.
    """
    checkpoint = open_checkpoint(path)
    if dtype is None:
        stored = checkpoint.dtypes["embed_tokens.weight"]
        dtype = stored if stored.name == "bfloat16" else np.dtype(np.float32)
    model_dtype = jnp.dtype(dtype)
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: M3ForCausalLM(checkpoint.config, dtype=model_dtype, rngs=nnx.Rngs(0)))
    )
    variables = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    targets = {name: _target(variable, mesh) for name, (_, variable) in variables.items()}
    text_parts = [part for part in checkpoint.parts if part.name != VISION_PART]
    named = {weight.path for part in text_parts for weight in part.weights}
    if named != targets.keys():
        raise CheckpointError(f"{path}: model and checkpoint differ in {listing(named ^ targets.keys())}")
    filled = []
    for part in text_parts:
        for name, value in _read(checkpoint, part, targets):
            where, variable = variables[name]
            filled.append((where, variable.replace(value)))
        # A transfer keeps its host copy until it is done: wait, so that no more than a part of them is alive.
        jax.block_until_ready([variable.get_value() for _, variable in filled])
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _target(variable: nnx.Variable[Any], mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    """Shape, dtype and place that an abstract weight is to have."""
    value = variable.get_value()
    if mesh is None:
        sharding: Sharding = SingleDeviceSharding(jax.devices()[0])
    else:
        sharding = named_sharding(mesh, variable.get_metadata("logical_axes"), value.shape)
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)


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
        for path, value in _read_released(checkpoint, part, wanted).items():
            yield path, jax.device_put(value, wanted[path].sharding)


def _read_released(
    checkpoint: HuggingFaceCheckpoint, part: Part, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
    values = {weight.path: empty_aligned(weight.shape, wanted[weight.path].dtype) for weight in part.weights}
    with ThreadPoolExecutor(READERS) as pool:
        reads = []
        for weight in part.weights:
            value = values[weight.path]
            rows = chunk_rows(weight.shape, value.dtype.itemsize)
            reads += [
                pool.submit(checkpoint.read, weight, value[start : start + rows], start)
                for start in range(0, len(value), rows)
            ]
        for read in reads:
            read.result()
    return values
