"""The layers without attention or routing: weights, RMSNorm, rotary embedding, SwiGLU-OAI MLP, embedding, projection.

Matrices keep the [out, in] order of the released files, so that conversion never transposes; the einsum of each
projection says what is contracted.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from m3_jax.config import M3Config
from m3_jax.sharding import all_reduce, axis_index, axis_size
from pallas_kernels import skinny_matmul

INIT_STDDEV = 0.02
# Rows, as of a decode step, of which a product takes the time in which its matrix is read.
FEW_ROWS = 64


class Weight(nnx.Param[jax.Array]):
    """One weight: shape, dtype, logical axes (see `sharding.RULES`) and initial values, declared in one place."""

    def __init__(
        self,
        shape: tuple[int, ...],
        logical_axes: tuple[str, ...],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        stddev: float = INIT_STDDEV,
    ):
        assert len(shape) == len(logical_axes)
        value = jnp.zeros(shape, dtype)
        if stddev:
            value = (stddev * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)
        super().__init__(value, logical_axes=logical_axes, stddev=stddev)


class Projection(nnx.Module):
    """A product with one matrix and no bias; `equation` names the dimensions of input, weight and output.

    What is contracted comes last in input and weight.
    """

    def __init__(
        self,
        equation: str,
        shape: tuple[int, ...],
        logical_axes: tuple[str, ...],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.equation = equation
        self.weight = Weight(shape, logical_axes, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        if x.shape[0] * x.shape[1] <= FEW_ROWS:
            return project(x, self)[0]
        return jnp.einsum(self.equation, x, self.weight[...])


def project(x: Float[Array, "B T ..."], *projections: Projection) -> list[Array]:
    """Several projections of the same few rows, whose matrices are read in one go."""
    rows = x.reshape(x.shape[0] * x.shape[1], -1)
    matrices = [projection.weight[...].reshape(-1, rows.shape[1]) for projection in projections]
    outputs = []
    for projection, product in zip(projections, skinny_matmul(rows, matrices), strict=True):
        given, weight, output = re.split(",|->", projection.equation)
        free = [(name, size) for name, size in zip(weight, projection.weight.shape, strict=True) if name not in given]
        product = product.reshape(*x.shape[:2], *(size for _, size in free))
        outputs.append(jnp.einsum(f"{given[:2]}{''.join(name for name, _ in free)}->{output}", product))
    return outputs


class RMSNorm(nnx.Module):
    """Gemma's RMSNorm over the last dimension: x / rms(x) * (1 + w), in float32, then cast to the input's dtype."""

    def __init__(self, size: int, axis: str, eps: float, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.eps = eps
        self.weight = Weight((size,), (axis,), dtype=dtype, rngs=rngs, stddev=0.0)

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        x32 = x.astype(jnp.float32)
        unit = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (unit * (1.0 + self.weight[...].astype(jnp.float32))).astype(x.dtype)


def rotary_tables(
    positions: Int[Array, "B T"], rotary_dim: int, theta: float
) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """Cosines and sines of position * theta^(-2i/rotary_dim), float32, R = rotary_dim / 2 (RoFormer, equation 15)."""
    frequencies = (theta ** -(np.arange(0, rotary_dim, 2) / rotary_dim)).astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N H"], tables: tuple[Float[Array, "B T R"], Float[Array, "B T R"]]
) -> Float[Array, "B T N H"]:
    """Rotates the first 2R channels of every head, in halves (channel i with i + R); the others pass unchanged."""
    cos, sin = (table[:, :, None, :] for table in tables)
    half = cos.shape[-1]
    x1, x2, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class SwiGLUOAI:
    """(up + beta) * gate * sigmoid(alpha * gate): gate clamped from above alone, up on both sides.

    The activation of gpt-oss with the two halves apart instead of interleaved. The constants have no defaults: a
    path that drops them computes garbage without an error.
    """

    alpha: float
    limit: float
    beta: float

    @classmethod
    def of(cls, config: M3Config) -> "SwiGLUOAI":
        """The activation of every MLP of a model."""
        return cls(config.swiglu_alpha, config.swiglu_limit, config.swiglu_beta)

    def __call__(self, gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
        gate = jnp.minimum(gate, self.limit)
        up = jnp.clip(up, -self.limit, self.limit)
        return (up + self.beta) * (gate * jax.nn.sigmoid(self.alpha * gate))


class MLP(nnx.Module):
    """SwiGLU-OAI MLP of width F: the dense layers' and the shared expert's."""

    def __init__(self, config: M3Config, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        size = config.hidden_size
        self.activation = SwiGLUOAI.of(config)
        self.gate_up_proj = Projection(
            "btd,gfd->gbtf", (2, width, size), ("gate_up", "mlp", "embed"), dtype=dtype, rngs=rngs
        )
        self.down_proj = Projection("btf,df->btd", (size, width), ("embed", "mlp"), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The output; over a mesh, the part that this device's channels give, to be summed over `tensor`."""
        gate, up = self.gate_up_proj(x)
        return self.down_proj(self.activation(gate, up))


class Embedding(nnx.Module):
    """Token embedding [V, D]; a tied head reads the same matrix."""

    def __init__(self, config: M3Config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = Weight((config.vocab_size, config.hidden_size), ("vocab", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        rows = self.weight[...]
        if axis_size("tensor") == 1:
            return rows[tokens]
        # Each token's row is on one of the devices; the others add zeros.
        local = tokens - axis_index("tensor") * rows.shape[0]
        here = (local >= 0) & (local < rows.shape[0])
        return all_reduce(jnp.where(here[..., None], rows[jnp.where(here, local, 0)], 0), "tensor")


class Head(nnx.Module):
    """The output matrix [V, D] of an untied model."""

    def __init__(self, config: M3Config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = Weight((config.vocab_size, config.hidden_size), ("vocab", "embed"), dtype=dtype, rngs=rngs)


def vocabulary_logits(hidden: Float[Array, "*rows D"], weight: Float[Array, "V D"]) -> Float[Array, "*rows V"]:
    """Logits of the rows of `weight`, accumulated and returned in float32 whatever the weights' dtype."""
    return jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)
