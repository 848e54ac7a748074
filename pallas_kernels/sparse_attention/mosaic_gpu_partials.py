"""Rows of partial results as a prefill call keeps them: fixed-point numbers packed into words, and three statistics.

They are most of what such a call writes and reads. The numbers of a row are in steps of which its largest number has
as many as the bits can tell: for bfloat16 10 bits lose at most 1 / 1,022 of the row's largest number, where bfloat16
itself loses up to 1 / 256 of each. Columns are taken 8 at a time, which is as they lie in registers: as many such
groups as fit share a word, and those left over are spread over the bits that are free at the words' tops.

A row: words_of(dtype) words; then, as float32, the reference and the total of its softmax, sum(exp2(logits -
reference)) of logits in base 2, and the unit of its numbers; then nothing up to row_words_of(dtype).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from pallas_kernels import mosaic
from pallas_kernels.hopper import DIM

COLUMNS = 8
STATISTICS = 3
_GROUPS = DIM // COLUMNS
_WORD = 32
# Of float32: bits behind the point, and what 1 and 2 ** 23 are kept as. From there on all numbers are whole.
_FRACTION = 23
_ONE, _WHOLE = 0x3F800000, 0x4B000000
# A step: there is nothing but zeros below it.
_LEAST = 2.0**-126


def _bits_of(dtype: Any) -> int:
    """Of a number: 2 or 3 more than the dtype has significant ones."""
    return 10 if dtype == jnp.bfloat16 else 14


def words_of(dtype: Any) -> int:
    """Words of the numbers of a row."""
    return DIM * _bits_of(dtype) // _WORD


def row_words_of(dtype: Any) -> int:
    """Words of a row: as few as can be copied, in 16 bytes, but for float16 the first that divide a tile of queries."""
    return 44 if dtype == jnp.bfloat16 else 64


def _place_of(bits: int) -> int:
    """Where in the fraction of a float32 a number is put: high enough that sums of many are exact enough."""
    return min(bits, _FRACTION - bits)


def middle_of(dtype: Any) -> float:
    """What `unpack` makes of 0."""
    bits = _bits_of(dtype)
    return 1 + 2.0 ** (bits - 1 + _place_of(bits) - _FRACTION)


def mask_of(dtype: Any) -> int:
    """The bits of a number in its place."""
    bits = _bits_of(dtype)
    return (2**bits - 1) << _place_of(bits)


def pack(values: Float32[Array, "R H"], dtype: Any) -> tuple[list[Int32[Array, "R 8"]], Float32[Array, " R"]]:
    """The words of each row's numbers, and its unit: values are (unpack(words) - middle) * unit.

    The unit of a row with a NaN or an infinity is one.
    """
    bits = _bits_of(dtype)
    half, per_word = 2 ** (bits - 1), _WORD // bits
    spare, num_words = _WORD - per_word * bits, words_of(dtype) // COLUMNS
    largest = jnp.maximum(mosaic.halved(jnp.maximum, jnp.abs(values), COLUMNS).max(axis=1), half * _LEAST)
    steps = lax.broadcast_in_dim(1.0 / largest * (half - 1), (values.shape[0], COLUMNS), [0])

    def number(group: int, above: int) -> jax.Array:
        """The number + half of a group's columns, which the addition rounds; `above` goes into the bits above it."""
        columns = values[:, group * COLUMNS : (group + 1) * COLUMNS]
        return lax.bitcast_convert_type(columns * steps + jnp.float32(2.0**_FRACTION + above + half), jnp.int32)

    def joined(first: int, count: int) -> jax.Array:
        """Side by side. The second one makes up for what is above the first; of others it leaves at the top."""
        word = number(first, 0)
        for i in range(1, count):
            above = (2**_WORD - _WHOLE) >> bits if i == 1 else 0
            word = word + (number(first + i, above) << (i * bits))
        return word

    words = [joined(k * per_word, per_word) for k in range(num_words)]
    rest = joined(num_words * per_word, _GROUPS - num_words * per_word)
    top = jnp.int32(-(1 << (_WORD - spare)))
    tops = (rest << (_WORD - spare * (num_words - k)) for k in range(num_words))
    words = [word | (bits & top) for word, bits in zip(words, tops, strict=True)]
    return words, largest * (2.0 ** (_FRACTION - _place_of(bits)) / (half - 1))


def unpack(words: list[Int32[Array, "R 8"]], dtype: Any, mask: Any) -> list[Float32[Array, "R 8"]]:
    """The numbers of each group of columns, from 1 to 2, whatever the words.

    The mask is that of `mask_of`; a kernel should read it from memory, since a constant is put into a register of its
    own for each of its uses.
    """
    bits = _bits_of(dtype)
    per_word, place = _WORD // bits, _place_of(bits)
    spare = _WORD - per_word * bits
    tops = (lax.shift_right_logical(word, jnp.int32(_WORD - spare)) for word in words)
    rest = functools.reduce(lambda rest, top: rest << spare | top, tops)
    fields = [(word, i) for word in words for i in range(per_word)]
    fields += [(rest, i) for i in range(_GROUPS - len(fields))]

    def number(word: jax.Array, i: int) -> jax.Array:
        right = i * bits - place
        placed = lax.shift_right_logical(word, jnp.int32(right)) if right > 0 else word << -right
        return lax.bitcast_convert_type(placed & mask | jnp.int32(_ONE), jnp.float32)

    return [number(*field) for field in fields]
