"""The grouped matmul in plain JAX: the specification of the other implementations, and the path on a CPU.

`jax.lax.ragged_dot` multiplies every row with every group's matrix on the CPU and is far from the hardware's speed on
GPUs. Here the sorted rows are cut into tiles of one group each, and a tile multiplies with one matrix: work and
traffic are those of the groups that have rows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.dispatch import Implementation

MIN_TILE, MAX_TILE = 8, 128


def _supported(*_args, **_kwargs) -> str | None:
    return None


@jax.jit
def _matmul(rows, weights, group_sizes):
    def product(tile, weights):
        return jnp.einsum("ri,oi->ro", tile, weights, preferred_element_type=jnp.float32)

    return _walk(product, rows, weights, group_sizes, weights.shape[1])


def _swiglu(rows, gate_up, group_sizes, *, alpha, limit, beta):
    return _jitted_swiglu(rows, gate_up, group_sizes, alpha, limit, beta)


@jax.jit
def _jitted_swiglu(rows, gate_up, group_sizes, alpha, limit, beta):
    def product(tile, gate_up):
        gate, up = jnp.einsum("ri,gfi->grf", tile, gate_up, preferred_element_type=jnp.float32)
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return (up + beta) * (gate * jax.nn.sigmoid(alpha * gate))

    return _walk(product, rows, gate_up, group_sizes, gate_up.shape[2])


def _walk(
    product: Callable[[Array, Array], Array],
    rows: Float[Array, "R I"],
    weights: Float[Array, "E ..."],
    group_sizes: Int32[Array, " E"],
    num_outputs: int,
) -> Float[Array, "R O"]:
    """product(rows, a group's weights) for each tile of rows; rows behind the last group give 0."""
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
    # What stands in a tile behind its group's last row is another's or anything: NaN there must not reach a derivative.
    row_of_tile = jnp.where(row_of_tile < last_row[group_of_tile][:, None], row_of_tile, num_rows)

    def multiply(tile: tuple[Array, Array, Array]) -> Array:
        group, used, row_ids = tile

        def compute() -> Array:
            return product(rows.at[row_ids].get(mode="fill", fill_value=0), weights[group]).astype(rows.dtype)

        return jax.lax.cond(used, compute, lambda: jnp.zeros((height, num_outputs), rows.dtype))

    products = jax.lax.map(multiply, (group_of_tile, in_use, row_of_tile))

    row = jnp.arange(num_rows)
    group = jnp.searchsorted(last_row, row, side="right")
    grouped = group < num_groups
    group = jnp.minimum(group, num_groups - 1)
    offset = row - first_row[group]
    out = products[jnp.where(grouped, first_tile[group] + offset // height, 0), offset % height]
    return jnp.where(grouped[:, None], out, 0)


grouped_matmul = Implementation(_supported, _matmul)
grouped_swiglu = Implementation(_supported, _swiglu)
