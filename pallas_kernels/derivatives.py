"""Derivatives for kernels that have none of their own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def with_derivative_of(reference: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, with the derivative of `reference`, which computes the same of the same arguments.

    Positional arguments are arrays, keyword arguments static options. Integer arrays have no derivative.
    """

    def differentiable(*arrays: jax.Array, **options: Any) -> Any:
        @jax.custom_vjp
        def kernel(*arrays: jax.Array) -> Any:
            return run(*arrays, **options)

        def forward(*arrays: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
            return kernel(*arrays), arrays

        def backward(arrays: tuple[jax.Array, ...], cotangent: Any) -> tuple[jax.Array | None, ...]:
            moving = [jnp.issubdtype(array.dtype, jnp.floating) for array in arrays]

            def of_moving(*values: jax.Array) -> Any:
                given = iter(values)
                mixed = (next(given) if moves else array for array, moves in zip(arrays, moving, strict=True))
                return reference(*mixed, **options)

            _, pull_back = jax.vjp(of_moving, *(a for a, moves in zip(arrays, moving, strict=True) if moves))
            gradients = iter(pull_back(cotangent))
            return tuple(next(gradients) if moves else None for moves in moving)

        kernel.defvjp(forward, backward)
        return kernel(*arrays)

    return differentiable
