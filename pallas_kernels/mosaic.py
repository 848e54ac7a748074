"""How the Mosaic GPU kernels are lowered: what of it takes less time than by default, and arrays with their layouts."""

# jax does not export every name of Mosaic GPU, and calls its transforms abstract.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

# The fewest of an array as a wgmma leaves it.
COLUMNS = 8
# Of a matrix in shared memory that wgmma multiplies: its tiles, and how their rows are swizzled.
TILING = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
# Of a few rows that are to be rearranged: of 32 channels of 8 rows, a warp has 8, and a lane 2 of one row.
FEW_ROWS = plgpu.Layout.TILED(plgpu.Tiling(((8, 32), (8, 8), (2,))), (-4,), (-3, -2), -1)


def compiler_params(**others: Any) -> plgpu.CompilerParams:
    """Parameters of a kernel that says the layout of every array in registers where it comes to be.

    Otherwise Mosaic looks for the layouts, which takes it about as long as all the rest of its lowering. Of a select in
    such a kernel the first value must be an array: jax 0.11.2 takes the result for unsigned where it is a scalar, and
    compares it so (tests/kernels/test_lowering.py looks for that).
    """
    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, **others)


def load(ref: Any, layout: Any) -> Any:
    """What a Ref of any memory holds, without a plan against conflicts of banks, which not every layout has."""
    return plgpu.load(ref, layout=layout, optimized=False)


def full(shape: tuple[int, ...], value: Any, dtype: Any, layout: Any) -> Any:
    """One value throughout, as an array that can be joined to others of the layout; None for it outside of kernels."""
    values = jnp.full(shape, value, dtype)
    return values if layout is None else plgpu.layout_cast(values, layout)


def spread(vector: Any, shape: tuple[int, ...], axis: int, layout: Any) -> Any:
    """A vector along one axis of a shape."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, [axis]), layout)


def cond(predicate: Any, when_true: Callable, when_false: Callable, *operands: Any) -> Any:
    """`lax.cond` of a kernel's scalar.

    That one converts the predicate to a number, for which jax 0.11.2 asks ptxas for its version each time: 11 ms. Not
    for the code of a single warp, in which this one's clamping is not lowered.
    """
    return lax.switch(jnp.where(predicate, jnp.int32(1), jnp.int32(0)), (when_false, when_true), *operands)


def when(predicate: Any) -> Callable[[Callable[[], None]], None]:
    """`pl.when` by means of `cond`."""
    return lambda body: cond(predicate, body, lambda: None)


def warp_when(predicate: Any) -> Callable[[Callable[[], None]], None]:
    """`when` for the code of a single warp, in which `cond` is not lowered: a loop of one turn or none."""
    turns = jnp.where(predicate, jnp.int32(1), jnp.int32(0))
    return lambda body: lax.fori_loop(0, turns, lambda _, nothing: body(), None)


def meet(cluster_barrier: Any) -> None:
    """Wait until all CTAs of the cluster are here, and what each has written to its shared memory is seen by all."""
    plgpu.commit_smem()
    plgpu.barrier_arrive(cluster_barrier)
    plgpu.barrier_wait(cluster_barrier)


def folded(combine: Callable, values: Any) -> Any:
    """[R, C] as [R, COLUMNS], combined one after the other: of integers Hopper finds the largest of three at once.

    Otherwise a thread's part of a row is reduced by one long chain.
    """
    columns = (values[:, first : first + COLUMNS] for first in range(0, values.shape[1], COLUMNS))
    return functools.reduce(combine, columns)
