"""Rows of partial results as a prefill call keeps them: fixed-point numbers packed into words, and three statistics.

They are most of what such a call writes and reads. The numbers of a row are in steps of which its largest number,
rounded up by 1 / 16 at most, has as many as the bits can tell: for bfloat16 10 bits lose at most 1 / 961 of the row's
largest number, where bfloat16 itself loses up to 1 / 256 of each. As many numbers as fit share a word, as far apart as
a row has words, so that whole arrays are packed at a time. The last columns, a few at a time as they lie in registers,
are spread over the bits that are free at the words' tops.

A row: words_of(dtype) words; then the reference of its softmax, as float32; then a word with the total of that,
sum(exp2(logits - reference)) of logits in base 2, and the unit of its numbers; then nothing up to row_words_of(dtype).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from pallas_kernels.hopper import DIM
from pallas_kernels.mosaic import COLUMNS, folded

_WORD = 32
# Of float32: bits behind the point, and what 1 and 2 ** 23 are kept as. From there on all numbers are whole.
_FRACTION = 23
_ONE, _WHOLE = 0x3F800000, 0x4B000000
# A step: there is nothing but zeros below it.
_LEAST = 2.0**-126
# The reference of a row that says that there is nothing: finite, so that no difference of two references is NaN. All
# else in it is zeros, of which `unpack_statistics` makes a total that is less than this, and than that of any other.
LOWEST = float(jnp.finfo(jnp.float32).min)
NO_TOTAL = 2.0**-100
# Of the bits of a unit's float32, which is not negative, those that are kept: behind the exponent 4. All others are
# set. A total has the rest of a word: behind the exponent 12, and half of the next one's worth is added.
_UNIT_BITS = 12
_BELOW_UNIT, _BELOW_TOTAL = 31 - _UNIT_BITS, _UNIT_BITS - 1


def _bits_of(dtype: Any) -> int:
    """Of a number: 2 or 3 more than the dtype has significant ones."""
    return 10 if dtype == jnp.bfloat16 else 14


def words_of(dtype: Any) -> int:
    """Words of the numbers of a row."""
    return DIM * _bits_of(dtype) // _WORD


def row_words_of(dtype: Any) -> int:
    """Words of a row: as few as there are, but for float16 the first that divide a tile of queries."""
    return 42 if dtype == jnp.bfloat16 else 64


def widths_of(dtype: Any) -> list[int]:
    """Of the arrays that a row's columns are cut into."""
    num_words, per_word = words_of(dtype), _WORD // _bits_of(dtype)
    return [num_words] * per_word + [COLUMNS] * ((DIM - num_words * per_word) // COLUMNS)


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


def step_of(dtype: Any) -> float:
    """What a number's difference from the middle is to be multiplied by, beside its row's unit."""
    bits = _bits_of(dtype)
    return 2.0 ** (_FRACTION - _place_of(bits)) / (2 ** (bits - 1) - 1)


def pack(values: Float32[Array, "R H"], dtype: Any) -> tuple[Int32[Array, "R W"], Float32[Array, " R"]]:
    """The words of each row's numbers, and its unit: values are (unpack(words) - middle) * step * unit.

    The unit is the row's largest number, rounded up to one that can be kept; of a row with a NaN or an infinity it is
    a NaN.
    """
    bits, num_words = _bits_of(dtype), words_of(dtype)
    half, spare = 2 ** (bits - 1), _WORD % bits
    # Numbers that are not negative are in the order of their bits, of which Hopper compares three at a time.
    largest = lax.max(*(lax.abs(values[:, first : first + DIM // 2]) for first in (0, DIM // 2)))
    largest = folded(lax.max, _as_int(largest)).max(axis=1)
    largest = lax.max(_as_float(largest), jnp.float32(half * _LEAST))
    unit = _as_float(_as_int(largest) | jnp.int32(2**_BELOW_UNIT - 1))
    # Takes fewer instructions than a quotient, which is guarded against numbers that are not among these.
    root = lax.rsqrt(unit)
    # Rounded by the addition of what makes them whole.
    values = values * lax.broadcast_in_dim(root * jnp.float32(half - 1) * root, values.shape, [0])

    def joined(first: int, width: int, count: int) -> jax.Array:
        """Numbers + half of so many columns side by side.

        Above a number are bits of its float32. The second number makes up for those of the first; of others they leave
        at the top.
        """
        word = None
        for i in range(count):
            above = (2**_WORD - _WHOLE) >> bits if i == 1 else 0
            columns = values[:, first + i * width : first + (i + 1) * width] + jnp.float32(2**_FRACTION + above + half)
            number = _as_int(columns)
            word = number if word is None else word + lax.shift_left(number, jnp.int32(i * bits))
        assert word is not None
        return word

    words = joined(0, num_words, _WORD // bits)
    packed = num_words * (_WORD // bits)
    rest = joined(packed, COLUMNS, (DIM - packed) // COLUMNS)
    shifts = range(_WORD - spare * (num_words // COLUMNS), _WORD, spare)
    tops = lax.concatenate([lax.shift_left(rest, jnp.int32(shift)) for shift in shifts], 1)
    words = words | (tops & jnp.int32(-(1 << (_WORD - spare))))
    return words, unit


def pack_statistics(
    reference: Float32[Array, " R"], total: Float32[Array, " R"], unit: Float32[Array, " R"]
) -> tuple[Int32[Array, " R"], Int32[Array, " R"]]:
    """The words of a row behind its numbers. The unit is that of `pack`."""
    kept = lax.shift_left(_as_int(total), jnp.int32(1)) & jnp.int32(-(2**_UNIT_BITS))
    return _as_int(reference), kept | lax.shift_right_logical(_as_int(unit), jnp.int32(_BELOW_UNIT))


def unpack_statistics(reference: Int32[Array, " R"], word: Int32[Array, " R"]) -> tuple[Float32[Array, " R"], ...]:
    """Reference, total and unit; the total within 2 ** -13 of what it was."""
    total = lax.shift_right_logical(word, jnp.int32(1)) & jnp.int32(-(2**_BELOW_TOTAL))
    unit = lax.shift_left(word, jnp.int32(_BELOW_UNIT)) & jnp.int32(2**31 - 2**_BELOW_UNIT)
    total, unit = total | jnp.int32(2 ** (_BELOW_TOTAL - 1)), unit | jnp.int32(2**_BELOW_UNIT - 1)
    return tuple(_as_float(bits) for bits in (reference, total, unit))


def _as_int(values: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(values, jnp.int32)


def _as_float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def unpack(words: Int32[Array, "R W"], dtype: Any, mask: Any) -> list[Float32[Array, "R _"]]:
    """The numbers of a row's columns, from 1 to 2, whatever the words: arrays of `widths_of` columns.

    The mask is that of `mask_of`; a kernel should read it from memory, since a constant is put into a register of its
    own for each of its uses.
    """
    bits, num_words = _bits_of(dtype), words_of(dtype)
    place, spare = _place_of(bits), _WORD % bits
    tops = lax.shift_right_logical(words, jnp.int32(_WORD - spare))
    rest = tops[:, :COLUMNS]
    for first in range(COLUMNS, num_words, COLUMNS):
        rest = lax.shift_left(rest, jnp.int32(spare)) | tops[:, first : first + COLUMNS]
    count = len(widths_of(dtype))
    fields = [(words, i) if i < _WORD // bits else (rest, i - _WORD // bits) for i in range(count)]

    def number(word: jax.Array, i: int) -> jax.Array:
        right = i * bits - place
        shift = lax.shift_right_logical if right > 0 else lax.shift_left
        placed = shift(word, jnp.int32(abs(right)))
        return _as_float(placed & mask | jnp.int32(_ONE))

    return [number(*field) for field in fields]
