"""Random models: weights by NumPy, on a scale at which routing and block choice vary from token to token."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from m3_jax import M3Config, M3ForCausalLM
from m3_jax import model as model_module
from m3_jax.sharding import named_sharding


def random_model(config: M3Config, *, dtype: str = "float32", seed: int = 0) -> M3ForCausalLM:
    """A model with weights drawn from a stream that NumPy keeps stable."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: M3ForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(0))))
    draw = np.random.RandomState(seed)
    flat = nnx.to_flat_state(state)
    values = []
    for path, variable in flat:
        shape = variable.get_value().shape
        if len(shape) == 1:
            value = 0.2 * draw.standard_normal(shape)
        elif path[0] == "embed_tokens":
            value = draw.standard_normal(shape)
        else:
            inputs = np.prod(shape[1:]) if path[-2] == "o_proj" else shape[-1]
            value = draw.standard_normal(shape) * 1.5 / np.sqrt(inputs)
        values.append((path, variable.replace(jnp.asarray(value, variable.get_value().dtype))))
    return nnx.merge(graphdef, nnx.from_flat_state(values))


def placed(model: M3ForCausalLM, mesh: Mesh) -> M3ForCausalLM:
    """The model with its weights over the mesh."""
    graphdef, weights = nnx.split(model)
    flat = []
    for path, weight in nnx.to_flat_state(weights):
        value = weight.get_value()
        sharding = named_sharding(mesh, weight.get_metadata("logical_axes"), value.shape)
        flat.append((path, weight.replace(jax.device_put(value, sharding))))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def weights_by_path(model: M3ForCausalLM) -> dict[str, np.ndarray]:
    """The weights as the oracle reads them, such as "layers.0.self_attn.q_proj.weight"."""
    return {path: np.asarray(jax.device_get(weight)) for path, weight in model_module.weights_by_path(model).items()}


def random_tokens(config: M3Config, *shape: int, seed: int = 0) -> np.ndarray:
    """Token ids."""
    return np.random.RandomState(seed).randint(0, config.vocab_size, shape).astype(np.int32)
