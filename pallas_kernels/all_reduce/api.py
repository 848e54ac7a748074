"""The public function of the sum over devices: contract, checks, dispatch."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt32

from pallas_kernels.all_reduce.workspace import table_words
from pallas_kernels.dispatch import Operation

# In order of preference.
_MODULES = {
    "mosaic_gpu": "pallas_kernels.all_reduce.mosaic_gpu",
    "reference": "pallas_kernels.all_reduce.reference",
}
OPERATIONS = {"all_reduce": Operation("all_reduce", _MODULES)}


def all_reduce(
    x: Float[Array, "..."],
    axes: str | tuple[str, ...],
    table: UInt32[Array, "1 W"] | None = None,
    *,
    impl: str | None = None,
) -> Float[Array, "..."]:
    """The sum of x over the devices along mesh axes, on each of them, inside `jax.shard_map`.

    axes: the mesh axes, in the order in which the workspace was made.
    table: this device's row of `Workspace.table`; None where there is no workspace. Of two sums with one workspace, one
        must depend on the other's result: XLA does not know that both write to it, and may not run them at once or, on
        another device, in another order. Between programs the order of the calls of one thread is enough.
    impl: name of an implementation; None takes the first that is supported.

    The kernel adds in float32 in the order of the devices and rounds once, so that all of them have the same bits
    whatever the shape; `lax.psum`, the reference, adds in x's dtype in any order.

    Raises TypeError or ValueError for arguments that do not fit, NotImplementedError when the implementation cannot
    serve them.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x has dtype {x.dtype}, which must be a floating one")
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    if table is not None:
        if table.dtype != jnp.uint32:
            raise TypeError(f"table has dtype {table.dtype}, which must be uint32")
        words = table_words(lax.axis_size(axes))
        if table.shape != (1, words):
            raise ValueError(f"table has shape {table.shape}, which must be {(1, words)} for a sum along axes={axes}")
    return OPERATIONS["all_reduce"](x, table, axes=axes, impl=impl)
