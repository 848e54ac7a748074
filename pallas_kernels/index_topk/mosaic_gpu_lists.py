"""Sorted lists of candidates in registers: arrays of keys and of numbers, everybody's best first, then the second best.

Each operation is one on whole lists, since the time that a kernel's compilation takes grows with their number.
"""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.index_topk import keys
from pallas_kernels.mosaic import full


def nothing(*shape: int, layout: Any = None):
    """Keys and numbers of lists without a block."""
    return tuple(full(shape, value, jnp.int32, layout) for value in (keys.INVISIBLE, -1))


def only(key, number, length: int, layout: Any = None):
    """Lists (keys, numbers) i32[length * n] with one entry each, i32[n]."""
    rest = nothing((length - 1) * key.shape[0], layout=layout)
    return tuple(jnp.concatenate(parts) for parts in zip((key, number), rest, strict=True))


def insert(best, key, number, layout: Any = None):
    """Lists (keys, numbers) i32[length * n] with one more entry, cut to their length; of equal keys the older is ahead.

    key: i32[n]. number: i32[n], or a scalar. length is a power of two.
    """
    width, size = key.shape[0], best[0].shape[0]
    key = repeated(key, size // width)
    number = repeated(number, size // width) if jnp.ndim(number) else full((size,), number, jnp.int32, layout)
    better = key > best[0]

    def inserted(values, new):
        # What is better than its predecessor too stands before it, and the predecessor takes its place here.
        here = jnp.concatenate([new[:width], jnp.where(better, values, new)[: size - width]])
        return jnp.where(better, here, values)

    return inserted(best[0], key), inserted(best[1], number)


def repeated(values, times: int):
    """[times * n] of [n]; times is a power of two."""
    while times > 1:
        values, times = jnp.concatenate([values, values]), times // 2
    return values
