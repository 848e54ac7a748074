"""Kernels borrow the reference's derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.derivatives import with_derivative_of


def exact(x: jax.Array, table: jax.Array, y: jax.Array, *, scale: float) -> jax.Array:
    return scale * jnp.sin(x)[table] * y


def without_derivative(x: jax.Array, table: jax.Array, y: jax.Array, *, scale: float) -> jax.Array:
    shape = jax.ShapeDtypeStruct((table.shape[0],), x.dtype)
    return jax.pure_callback(lambda x, t, y: scale * np.sin(x)[t] * y, shape, x, table, y)


def test_value_from_one_and_derivative_from_the_other() -> None:
    x, y, table = jnp.arange(5.0), jnp.asarray([2.0, -1.0, 0.5]), jnp.asarray([4, 1, 1])
    borrowed = with_derivative_of(exact, without_derivative)
    np.testing.assert_allclose(borrowed(x, table, y, scale=3.0), exact(x, table, y, scale=3.0), rtol=1e-6)

    def loss(run):
        return jax.jit(jax.grad(lambda x, y: jnp.sum(run(x, table, y, scale=3.0) ** 2), argnums=(0, 1)))

    for gradient, expected in zip(loss(borrowed)(x, y), loss(exact)(x, y), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="Pure callbacks do not support JVP"):
        loss(without_derivative)(x, y)


def test_integers_beside_the_result_have_no_derivative() -> None:
    def with_integers(run):
        return lambda x, table, y, *, scale: (run(x, table, y, scale=scale), table + 1)

    x, y, table = jnp.arange(5.0), jnp.asarray([2.0, -1.0, 0.5]), jnp.asarray([4, 1, 1])
    borrowed = with_derivative_of(with_integers(exact), with_integers(without_derivative))
    np.testing.assert_array_equal(borrowed(x, table, y, scale=3.0)[1], table + 1)

    def gradient(run):
        return jax.jit(jax.grad(lambda x: jnp.sum(run(x, table, y, scale=3.0)[0] ** 2)))(x)

    np.testing.assert_allclose(gradient(borrowed), gradient(with_integers(exact)), rtol=1e-5)
