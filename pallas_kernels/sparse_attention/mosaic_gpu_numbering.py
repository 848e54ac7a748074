"""How many pairs have each key, and the number of each pair among those of its key, in two ways.

By sorting, whatever the keys are. By bits, where no two pairs of a row have the same key: each key has a bit for each
row, and the number of a pair is that of the bits ahead of its own. That takes a GPU half the time, in fewer kernels,
but for a table of bits that grows with the number of keys.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from pallas_kernels.rows import at, divided

# Rows of a word, and words whose bits are counted together.
_BITS, _WORDS = 32, 8
# Numbers of which each is compared with each.
_FEW = 2049


class Numbering(NamedTuple):
    """counts: i32[keys]. numbers_from(starts: i32[keys]): i32[pairs], starts[key] + the number of each pair, from 0 on
    in the order of rows; of a pair that takes no part it means nothing.
    """

    counts: Int32[Array, " keys"]
    numbers_from: Callable[[Int32[Array, " keys"]], Int32[Array, " pairs"]]


def words_of_bits(num_keys: int, num_rows: int) -> int:
    """Words of 32 bits that a table for so many keys and rows has."""
    return -(-num_rows // (_BITS * _WORDS)) * _WORDS * num_keys


def by_bits(
    key: Int32[Array, " pairs"],
    row: Int32[Array, " pairs"],
    takes_part: Bool[Array, " pairs"],
    *,
    num_keys: int,
    num_rows: int,
) -> Numbering:
    """Pairs of keys less than num_keys and rows less than num_rows, where no two have both alike."""
    num_words = words_of_bits(num_keys, num_rows)
    # takes_part, though the keys could say it: so XLA needs no kernel to write the places down.
    # Keys innermost: those of one row are near to each other, and neighbouring rows' bits are not written at the same
    # time to the same place of memory, which takes three times as long.
    word = jnp.where(takes_part, divided(row, _BITS) * num_keys + key, num_words)
    bit = jnp.uint32(1) << (row & (_BITS - 1)).astype(jnp.uint32)
    words = jnp.zeros((num_words,), jnp.uint32).at[word].add(bit, mode="drop")
    in_words = lax.population_count(words).astype(jnp.int32).reshape(-1, _WORDS, num_keys)
    up_to_word = _sum_up(in_words, axis=1)
    in_groups = up_to_word[:, -1]
    up_to_group = _sum_up(in_groups, axis=0)

    def numbers_from(starts):
        of_words = (starts + up_to_group - in_groups)[:, None] + up_to_word - in_words
        # Or every pair would look up each part of it.
        of_words = lax.optimization_barrier(of_words.reshape(-1))
        of_pair = jnp.minimum(word, num_words - 1)
        ahead = lax.population_count(at(words, of_pair) & (bit - 1))
        return at(of_words, of_pair) + ahead.astype(jnp.int32)

    return Numbering(up_to_group[-1], numbers_from)


def by_sorting(key: Int32[Array, " pairs"], *, num_keys: int) -> Numbering:
    """Pairs in the order of rows, of which those with the key num_keys take no part."""
    num_pairs = key.shape[0]
    number = jnp.arange(num_pairs, dtype=jnp.int32)
    # A radix sort on the GPU, of which half the bits are half the passes.
    narrow = key.astype(jnp.uint16 if num_keys < 2**16 else jnp.uint32)
    key, pair = lax.sort((narrow, number), num_keys=1, is_stable=True)
    key = key.astype(jnp.int32)
    # A scatter of where each key begins: searchsorted is a loop of kernels. A key that is not there begins where the
    # next one does.
    is_first = jnp.concatenate([jnp.ones((1,), bool), key[1:] != key[:-1]])
    begins = jnp.full((num_keys + 1,), num_pairs, jnp.int32).at[jnp.where(is_first, key, num_keys + 1)]
    begins = _least_from(begins.set(number, mode="drop"))

    def numbers_from(starts):
        numbers = at(starts - begins[:-1], jnp.minimum(key, num_keys - 1)) + number
        return lax.empty((num_pairs,), jnp.int32).at[pair].set(numbers, unique_indices=True)

    return Numbering(begins[1:] - begins[:-1], numbers_from)


def running_sum(values: Int32[Array, "m n"]) -> Int32[Array, "m n"]:
    """Along rows; by comparisons, in one reduction, where there are few; of many it is quicker in several steps."""
    if values.shape[1] > _FEW:
        return jnp.cumsum(values, axis=1, dtype=jnp.int32)
    return _sum_up(values, axis=1)


def _sum_up(values: Int32[Array, "..."], axis: int) -> Int32[Array, "..."]:
    """Of each place the sum of the values up to there along an axis, each compared with each."""
    number = jnp.arange(values.shape[axis], dtype=jnp.int32)
    is_ahead = jnp.expand_dims(number <= number[:, None], range(2, values.ndim - axis + 1))
    return jnp.sum(jnp.where(is_ahead, jnp.expand_dims(values, axis), 0), axis=axis + 1, dtype=jnp.int32)


def _least_from(values: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """Of each place the least value there or behind it; computed as `running_sum` is."""
    if values.shape[0] > _FEW:
        return lax.cummin(values, reverse=True)
    number = jnp.arange(values.shape[0], dtype=jnp.int32)
    return jnp.min(jnp.where(number >= number[:, None], values, jnp.iinfo(jnp.int32).max), axis=1)
