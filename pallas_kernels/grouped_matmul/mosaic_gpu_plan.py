"""Which rows are multiplied with which matrix together, decided on the device from the sizes of the groups.

A unit is a stretch of rows of one group, cut into as many tiles as CTAs work together. A tile begins at a multiple
of `ALIGNMENT` rows, because copies into shared memory do, so the first of a group may begin in the rows of the group
before; only a group's own rows are stored. The tiles of a group are equally high.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from pallas_kernels.rows import count_up_to

ALIGNMENT = 8


class Plan(NamedTuple):
    """What a kernel needs to find its work; more would be more kernels before it.

    group_of_unit: i32[units], a group in range where the unit is not used. sizes, begins, first_units: of each group,
    its number of rows, the rows before it and the units before it.
    """

    group_of_unit: Int32[Array, " units"]
    sizes: Int32[Array, " E"]
    begins: Int32[Array, " E"]
    first_units: Int32[Array, " E"]


class Cut(NamedTuple):
    """How a group is cut: where its first tile begins, how many units it has, and how high its tiles are."""

    first_row: Array
    num_units: Array
    height: Array


def cut(begin: Array, size: Array, *, widest: int, tiles: int) -> Cut:
    """The cut of a group of `size` rows from `begin` on into units of `tiles` tiles of at most `widest` rows each."""
    first_row = lax.div(begin, _like(begin, ALIGNMENT)) * ALIGNMENT
    # Of a group without rows the numbers below are 0 to 7, and no unit's.
    span = begin + size - first_row
    num_units = jnp.where(size > 0, _ceil_div(span, _like(span, widest * tiles)), 0)
    height = _ceil_div(span, jnp.maximum(num_units, 1) * (tiles * ALIGNMENT)) * ALIGNMENT
    return Cut(first_row, num_units, height)


def max_units(num_rows: int, num_groups: int, height: int) -> int:
    """The most units of at most `height` rows that any sizes of groups need, at least 1."""
    groups = min(num_rows, num_groups)
    return max(1, (num_rows + groups * (height + ALIGNMENT - 2)) // height)


def plan(group_sizes: Int32[Array, " E"], *, num_rows: int, widest: int, tiles: int) -> Plan:
    """Cut the rows of each group into units."""
    num_groups = group_sizes.shape[0]
    group = jnp.arange(num_groups, dtype=jnp.int32)

    def sums_before(values: Array) -> Array:
        # Over all pairs instead of a running sum, which is several kernels.
        return jnp.sum(jnp.where(group[:, None] > group[None], values[None], 0), axis=1, dtype=jnp.int32)

    begins = sums_before(group_sizes)
    if num_rows <= widest * tiles:
        # A unit for each group that has rows: known before the groups' first rows are, and summed with them.
        num_units = (group_sizes > 0).astype(jnp.int32)
    else:
        num_units = cut(begins, group_sizes, widest=widest, tiles=tiles).num_units
    first_units = sums_before(num_units)
    unit = jnp.arange(max_units(num_rows, num_groups, widest * tiles), dtype=jnp.int32)
    # The last group's end is left out: a unit behind it is not used, and its group is still one in range.
    group_of_unit = count_up_to((first_units + num_units)[:-1], unit)
    return Plan(group_of_unit, group_sizes, begins, first_units)


def _ceil_div(value: Array, divisor: Array) -> Array:
    return lax.div(value + (divisor - 1), divisor)


def _like(value: Array, number: int) -> Array:
    # Numbers that are not negative: lax.div is one instruction less than // in a kernel, and takes equal shapes only.
    return jnp.int32(number) if not value.shape else jax.lax.full_like(value, number)
