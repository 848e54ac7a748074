"""Prefill attention's CTAs do without the largest logit at first, and begin anew where something was not within bounds.

A softmax takes the largest logit off all of them lest a weight overflows, or all of them vanish. Where nothing is near
to that, nothing has to be taken off and no largest one looked for, which is a twentieth of the time. So a CTA does
without at first; if anything that it found was not within bounds, it computes all of its tiles anew.
"""

# jax does not export every name of Mosaic GPU.
# pyright: reportPrivateImportUsage=false

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sparse_attention.mosaic_gpu_tile import ROWS, each

# Sums of a row's weights for which no reference is needed, and units of its numbers: far from the ends of float32 and
# bfloat16, so that no weight is lost but what is less than 2 ** -74 of its row's largest, of some thousand keys.
_LEAST_TOTAL, _MOST_TOTAL, _MOST_UNIT = 2.0**-40, 2.0**60, 2.0**100


class Attempts(NamedTuple):
    """is_beyond: i32[attempts, warpgroups], which was beyond the bounds at which. tried: all have said so of one."""

    is_beyond: Any
    tried: Any

    @property
    def _shape(self) -> tuple[int, int]:
        return self.is_beyond.shape

    def is_last(self, attempt: Any) -> Any:
        """Whether it is the one that looks for the largest logit."""
        return attempt == self._shape[0] - 1

    def until_within(self, run: Callable[[Any, Any], None], count: Any) -> None:
        """run(attempt, count), and again while anything was not within bounds.

        Nothing to do is nothing to wait for: a warp that is late would miss the barrier's second turn.
        """
        attempts, warpgroups = self._shape

        def step(state):
            attempt, count = state
            run(attempt, count)
            plgpu.barrier_wait(self.tried)
            found = [self.is_beyond[attempt, i] for i in range(warpgroups)]
            return attempt + 1, jnp.where(functools.reduce(jnp.maximum, found) > 0, count, jnp.int32(0))

        lax.while_loop(lambda state: (state[1] > 0) & (state[0] < attempts), step, (jnp.int32(0), count))

    def vote(self, attempt: Any, warpgroup: Any, bounds: tuple[Any, Any], rows: Any) -> None:
        """Say whether any of a warpgroup's rows is beyond them. rows: i32[ROWS, ...] of shared memory, to be spoilt."""
        least, most = bounds
        is_within = jnp.logical_and(least >= _LEAST_TOTAL, most <= _MOST_TOTAL)
        rows.at[:, 0][...] = jnp.where(is_within, each(0, jnp.int32), each(1, jnp.int32))
        plgpu.commit_smem()
        found = lax.fori_loop(0, ROWS, lambda row, found: jnp.maximum(found, rows[row, 0]), 0, unroll=8)
        self.is_beyond[attempt, warpgroup] = found
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.tried)


def attempts(dtype: Any, warpgroups: int) -> Attempts:
    """What `plgpu.kernel` is to allocate."""
    # Of float16 weights overflow soon.
    most = 1 if dtype == jnp.float16 else 2
    return Attempts(plgpu.SMEM((most, warpgroups), jnp.int32), plgpu.Barrier(num_arrivals=warpgroups))


def bounds() -> tuple[Any, Any]:
    """Of rows of which nothing has been found."""
    return each(1.0), each(1.0)


def wider(bounds: tuple[Any, Any], total: Any, unit: Any) -> tuple[Any, Any]:
    """The bounds of what was found, with a total and a unit of each row."""
    least, most = bounds
    return jnp.minimum(least, total), jnp.maximum(most, jnp.maximum(total, unit * (_MOST_TOTAL / _MOST_UNIT)))
