"""Norm, rotation and cache write in plain JAX: the specification of the other implementation."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.dispatch import Implementation


def _supported(*_args, **_kwargs) -> str | None:
    return None


@partial(jax.jit, static_argnames=("eps",))
def _run(heads, cos, sin, pages, slots, *, eps):
    results = []
    for x, norm, cache in heads:
        if norm is not None:
            x = _rotate(_norm(x, norm, eps), cos, sin)
        if cache is not None:
            # A page below 0 would count from the end.
            page = jnp.where(pages < 0, cache.shape[0], pages)
            x = cache.at[page, :, slots].set(x.astype(cache.dtype), mode="drop")
        results.append(x)
    return results


def _norm(x: Array, weight: Array, eps: float) -> Array:
    x32 = x.astype(jnp.float32)
    unit = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (unit * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    cos, sin = cos[:, None], sin[:, None]
    half = cos.shape[-1]
    x1, x2, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1).astype(x.dtype)


norm_rope_cache = Implementation(_supported, _run)
