"""Rows sorted by group, each group times its own matrix: the one place that a faster kernel replaces.

`jax.lax.ragged_dot` multiplies every row with every group's matrix on the CPU and is far from the hardware's speed on
GPUs. Here the sorted rows are cut into tiles of one group each, and a tile multiplies with one matrix: work and
traffic are those of the groups that have rows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MIN_TILE, MAX_TILE = 8, 128


def grouped_matmul(
    rows: Float[Array, "R I"], weights: Float[Array, "E O I"], group_sizes: Int[Array, " E"]
) -> Float[Array, "R O"]:
    """out[r] = weights[group of r] @ rows[r], where the first group_sizes[0] rows are of group 0, and so on.

    Accumulated in float32 for bfloat16 inputs and returned in the rows' dtype. Rows behind the last group give 0.
    """
    num_rows, num_groups = rows.shape[0], weights.shape[0]
    height = min(MAX_TILE, max(MIN_TILE, 1 << (num_rows // num_groups).bit_length()))
    # Every group that has rows may end in a tile that is not full.
    num_tiles = num_rows // height + min(num_groups, num_rows)

    tiles_of_group = -(-group_sizes // height)
    last_tile = jnp.cumsum(tiles_of_group)
    first_tile = last_tile - tiles_of_group
    last_row = jnp.cumsum(group_sizes)
    first_row = last_row - group_sizes

    tile = jnp.arange(num_tiles)
    group_of_tile = jnp.searchsorted(last_tile, tile, side="right")
    in_use = group_of_tile < num_groups
    group_of_tile = jnp.minimum(group_of_tile, num_groups - 1)
    start = first_row[group_of_tile] + (tile - first_tile[group_of_tile]) * height
    row_of_tile = start[:, None] + jnp.arange(height)

    def multiply(tile: tuple[Array, Array, Array]) -> Array:
        group, used, row_ids = tile

        def product() -> Array:
            # Rows of the next group may lie in the tile: they are computed here too, and read from their own tile.
            return jnp.einsum("ri,oi->ro", rows.at[row_ids].get(mode="clip"), weights[group])

        return jax.lax.cond(used, product, lambda: jnp.zeros((height, weights.shape[1]), rows.dtype))

    products = jax.lax.map(multiply, (group_of_tile, in_use, row_of_tile))

    row = jnp.arange(num_rows)
    group = jnp.searchsorted(last_row, row, side="right")
    grouped = group < num_groups
    group = jnp.minimum(group, num_groups - 1)
    offset = row - first_row[group]
    out = products[jnp.where(grouped, first_tile[group] + offset // height, 0), offset % height]
    return jnp.where(grouped[:, None], out, 0)
