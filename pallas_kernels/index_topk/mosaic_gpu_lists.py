"""Sorted lists of candidates in registers: of arrays of keys and of numbers, the i-th holds everybody's i-th best."""

# jax does not export every name of Mosaic GPU, and calls its transforms abstract.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false

import jax.numpy as jnp


def insert(best, key, number, length: int):
    """Lists (keys, numbers), best first, with one more entry, cut to `length`; of equal keys the older stays ahead."""
    all_keys, numbers = best
    better = [key > other for other in all_keys]
    new_keys, new_numbers = [], []
    for j in range(min(len(all_keys) + 1, length)):
        # One that is better than its predecessor too stands before it, and the predecessor takes its place here.
        here_key, here_number = key, number
        if j > 0:
            here_key = jnp.where(better[j - 1], all_keys[j - 1], key)
            here_number = jnp.where(better[j - 1], numbers[j - 1], number)
        if j < len(all_keys):
            here_key = jnp.where(better[j], here_key, all_keys[j])
            here_number = jnp.where(better[j], here_number, numbers[j])
        new_keys.append(here_key)
        new_numbers.append(here_number)
    return tuple(new_keys), tuple(new_numbers)
