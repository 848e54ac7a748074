"""A model without memory: every weight's shape, dtype and place, before any of them exists.

`load` and `random_model` fill it; the planner counts its bytes and compiles the passes for it.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, SingleDeviceSharding

from m3_jax.config import M3Config
from m3_jax.model import M3ForCausalLM
from m3_jax.sharding import named_sharding


def abstract_model(
    config: M3Config, *, dtype: jax.typing.DTypeLike = jnp.bfloat16, mesh: Mesh | AbstractMesh | None = None
) -> M3ForCausalLM:
    """The model with a `jax.ShapeDtypeStruct` for every weight, its sharding included.

    Args:
      config: the model's sizes.
      dtype: float32 or bfloat16.
      mesh: a mesh of `make_mesh`, or an abstract one of the same axes; None: this process's first device.

    Raises `ValueError` where a weight does not divide over the mesh, or the mesh leaves out a process.
    """
    if isinstance(mesh, Mesh) and jax.process_count() > 1:
        missing = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
        if missing:
            raise ValueError(
                f"the mesh {dict(mesh.shape)} has no device of process {min(missing)}: it must reach all "
                f"{jax.process_count()} processes, which have {jax.device_count()} devices"
            )
    graphdef, state = nnx.split(nnx.eval_shape(lambda: M3ForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(0))))
    single = SingleDeviceSharding(jax.local_devices()[0])
    placed = []
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        axes = variable.get_metadata("logical_axes")
        sharding = single if mesh is None else named_sharding(mesh, axes, value.shape)
        target = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
        placed.append((path, variable.replace(target)))
    return nnx.merge(graphdef, nnx.from_flat_state(placed))


def fill(model: M3ForCausalLM, values: Iterable[tuple[str, jax.Array]]) -> M3ForCausalLM:
    """The abstract model with these weights, by path; there must be one for each."""
    graphdef, state = nnx.split(model)
    variables = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    filled = []
    for name, value in values:
        path, variable = variables.pop(name)
        filled.append((path, variable.replace(value)))
    assert not variables, f"weights without a value: {sorted(variables)}"
    return nnx.merge(graphdef, nnx.from_flat_state(filled))
