"""A model with random weights, drawn on the devices that hold them: for benchmarks and tests without a checkpoint."""

import functools
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding
from jaxtyping import Array, UInt

from m3_jax.abstract_model import abstract_model, fill
from m3_jax.checkpoint.folder import CONFIG, existing_folder
from m3_jax.checkpoint.huggingface import read_config
from m3_jax.config import M3Config
from m3_jax.model import M3ForCausalLM

# Weights whose making may be under way at one moment. On a GPU a weight is one fused kernel without temporaries; XLA's
# CPU backend takes about eight times a shard's float32 values for the random bits.
IN_FLIGHT_BYTES = 1 << 30


def random_model(
    config: M3Config, *, mesh: Mesh | None = None, dtype: jax.typing.DTypeLike = jnp.bfloat16, seed: int = 0
) -> M3ForCausalLM:
    """The model with the initial values of its declaration: normal, standard deviation `layers.INIT_STDDEV`; norms 0.

    Every device draws the values of its own shards and no others: nothing passes through the host, and no device ever
    holds a whole weight that is cut. Values depend on seed, weight and index alone (threefry's counter mode), so any
    mesh gives the same model.

    Args:
      config: the model's sizes.
      mesh: a mesh of `make_mesh`; None: the default device.
      dtype: float32 or bfloat16; values are drawn in float32 and rounded.
      seed: an integer of 0 to 2**32 - 1.

    Raises `ValueError` for a seed or dtype out of range, and where a weight does not divide over the mesh.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: must be between 0 and 2**32 - 1")
    model = abstract_model(config, dtype=dtype, mesh=mesh)
    values: list[tuple[str, jax.Array]] = []
    under_way: list[jax.Array] = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name, target = ".".join(map(str, path)), variable.get_value()
        draw = _draw(target.shape, target.dtype, target.sharding, variable.get_metadata("stddev"))
        value = draw(np.uint32(seed), np.uint32(zlib.crc32(name.encode())))
        values.append((name, value))
        under_way.append(value)
        if sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in under_way) > IN_FLIGHT_BYTES:
            jax.block_until_ready(under_way)
            under_way.clear()
    return fill(model, values)


@functools.cache
def _draw(
    shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding, stddev: float
) -> Callable[[np.uint32, np.uint32], jax.Array]:
    # Both are host values, which every process of a mesh passes alike; a key made outside would lie on one device.
    def draw(seed: UInt[Array, ""], weight: UInt[Array, ""]) -> Array:
        if not stddev:
            return jnp.zeros(shape, dtype)
        # As `layers.Weight` does, from a key for the weight's name.
        key = jax.random.fold_in(jax.random.key(seed), weight)
        return (stddev * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)


PRESETS = {"m3": M3Config.m3, "tiny": M3Config.tiny}


def named_config(name: str) -> M3Config:
    """The config that a command line names: "m3", "tiny", or the path of a config.json or of a folder with one.

    Raises `ValueError` where there is no such file, or it does not describe a model.
    """
    if name in PRESETS:
        return PRESETS[name]()
    path = Path(name)
    if not path.exists():
        raise ValueError(
            f"config {name!r}: must be {', '.join(PRESETS)} or the path of a config.json, which is not there"
        )
    folder, file = (path, CONFIG) if path.is_dir() else (path.absolute().parent, path.name)
    return read_config(existing_folder(folder), file)[1]
