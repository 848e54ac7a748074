"""What kernels leave open in their results: blocks that a row does not see, and rows that are dead.

Positions are the rows', negative where a row is dead.
"""

import jax.numpy as jnp

from pallas_kernels.index_topk import keys


def only_visible(scores, position, page_size: int):
    """scores [..., M], -inf where the block begins beyond the position, which has one axis for M too."""
    first_key = jnp.arange(scores.shape[-1], dtype=jnp.int32) * page_size
    return jnp.where(first_key <= position, scores, -jnp.inf)


def live_choice(ids, position):
    """ids i32[T, K, C], -1 in dead rows."""
    return jnp.where(position[:, None, None] >= 0, ids, -1)


def live_candidates(candidates, position):
    """candidates i32[T, K, 2, C], as if no block were visible in dead rows."""
    nothing = jnp.asarray([keys.INVISIBLE, -1], jnp.int32)[:, None]
    return jnp.where(position[:, None, None, None] >= 0, candidates, nothing)
