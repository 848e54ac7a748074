"""Merge of the partial results of a prefill call on Hopper: a weighted mean over the chosen blocks.

A CTA merges four units, (token, KV head), slot by slot: 4 x 16 rows of partial results at a time.
"""

# jax does not export every name of Mosaic GPU, and calls its transforms abstract.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import DIM, GROUP

_TILE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_WGMMA = plgpu.Layout.WGMMA
_UNITS = 4
_ROWS = _UNITS * GROUP
# Of a row without a valid slot: finite, so that no difference of two maxima is NaN.
_LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclass(frozen=True)
class TuningConfig:
    """stages: of the ring of partial results, 16 KiB each."""

    CANDIDATES: ClassVar = {"stages": (2, 3, 4, 6, 8)}

    stages: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.stages <= 8:
            raise ValueError(f"stages={self.stages} must be 1 to 8")


@functools.partial(jax.jit, static_argnames=("units", "top_k", "scale", "config", "interpret"))
def merge_prefill(
    partials,
    stats,
    places,
    first_unit,
    out,
    *,
    units: int,
    top_k: int,
    scale: float,
    config: TuningConfig,
    interpret: Any,
):
    """Write the results of `units` units, from what the passes left, into a Ref of the whole call's.

    places: i32[units * C], the place of each slot's partial result, 4 to a tile; -1 where a slot was not used.
    first_unit: i32[1], of `out` [T * K, G, H]. So no call has to be put together from its parts: a copy of it all.
    """
    groups = -(-units // _UNITS)
    dtype = partials.dtype
    factor = scale * math.log2(math.e)
    stages = min(config.stages, top_k)
    places = jnp.pad(places, (0, (groups * _UNITS - units) * top_k), constant_values=-1)
    places = places.reshape(groups, _UNITS, top_k)
    # Few tokens see fewer blocks than they may choose, and unused slots are the last as a rule.
    slots = jnp.max(jnp.where(places >= 0, jnp.arange(1, top_k + 1, dtype=jnp.int32), 0), axis=(1, 2))

    def merge(
        partials_gmem,
        stats_gmem,
        places_gmem,
        slots_gmem,
        first_unit_gmem,
        out_gmem,
        partials_smem,
        stats_smem,
        places_smem,
        out_smem,
        partials_barrier,
        stats_barrier,
        places_barrier,
    ):
        group = lax.axis_index("group")
        first_unit, num_slots = first_unit_gmem[0], slots_gmem[group]
        row_layout = _WGMMA.reduce(1)
        plgpu.copy_gmem_to_smem(places_gmem.at[group], places_smem, places_barrier)
        plgpu.copy_gmem_to_smem(stats_gmem.at[group], stats_smem, stats_barrier)

        def load(slot, stage):
            for unit in range(_UNITS):
                # An unused slot brings something that nobody looks at.
                place = jnp.maximum(places_smem[unit, slot], 0)
                rows = pl.ds(pl.multiple_of(lax.rem(place, jnp.int32(_UNITS)) * GROUP, GROUP), GROUP)
                partial = partials_gmem.at[lax.div(place, jnp.int32(_UNITS)), rows]
                where = partials_smem.at[stage, pl.ds(unit * GROUP, GROUP)]
                plgpu.copy_gmem_to_smem(partial, where, partials_barrier.at[stage])

        plgpu.barrier_wait(places_barrier)
        for slot in range(stages):
            pl.when(slot < num_slots)(functools.partial(load, slot, slot))
        plgpu.barrier_wait(stats_barrier)

        def is_valid(slot):
            row = plgpu.broadcasted_iota(jnp.int32, (_ROWS,), 0, layout=row_layout)
            place = places_smem[_UNITS - 1, slot]
            for unit in range(_UNITS - 2, -1, -1):
                place = jnp.where(row < (unit + 1) * GROUP, places_smem[unit, slot], place)
            return place >= 0

        def stat(slot, which, otherwise):
            return jnp.where(is_valid(slot), plgpu.load(stats_smem.at[slot, which], layout=row_layout), otherwise)

        def rows_of(value):
            return plgpu.layout_cast(jnp.full((_ROWS,), value, jnp.float32), row_layout)

        def raise_largest(slot, largest):
            return jnp.maximum(largest, stat(slot, 0, _LOWEST))

        largest = lax.fori_loop(0, num_slots, raise_largest, rows_of(_LOWEST))

        def step(slot, carry):
            acc, whole = carry
            stage = lax.rem(slot, jnp.int32(stages))
            weight = stat(slot, 1, 0.0) * jnp.exp2((stat(slot, 0, _LOWEST) - largest) * factor)
            plgpu.barrier_wait(partials_barrier.at[stage])
            partial = plgpu.load(partials_smem.at[stage], layout=_WGMMA).astype(jnp.float32)
            spread = lax.broadcast_in_dim(weight, partial.shape, [0])
            # An unused slot's partial result was never written, and may be a NaN.
            acc = acc + jnp.where(spread > 0, partial * spread, 0.0)
            # The reads have to be over before the copy engine writes there again.
            plgpu.commit_smem()

            @pl.when(slot + stages < num_slots)
            def _():
                load(slot + stages, stage)

            return acc, whole + weight

        acc = plgpu.layout_cast(jnp.zeros((_ROWS, DIM), jnp.float32), _WGMMA)
        acc, whole = lax.fori_loop(0, num_slots, step, (acc, rows_of(0.0)))
        inverse = jnp.where(whole > 0, 1.0 / whole, 0.0)
        out_smem[...] = (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(dtype)
        plgpu.commit_smem()
        for unit in range(_UNITS):

            @pl.when(group * _UNITS + unit < units)
            def _(unit=unit):
                rows = out_smem.at[pl.ds(unit * GROUP, GROUP)]
                plgpu.copy_smem_to_gmem(rows, out_gmem.at[first_unit + group * _UNITS + unit])

        plgpu.wait_smem_to_gmem(0)

    plgpu.kernel(
        merge,
        out_type=[],
        grid=(groups,),
        grid_names=("group",),
        scratch_types=[
            plgpu.SMEM((stages, _ROWS, DIM), dtype, transforms=_TILE),
            plgpu.SMEM((top_k, 2, _ROWS), jnp.float32),
            plgpu.SMEM((_UNITS, top_k), jnp.int32),
            plgpu.SMEM((_ROWS, DIM), dtype, transforms=_TILE),
            plgpu.Barrier(num_arrivals=_UNITS, num_barriers=stages),
            plgpu.Barrier(),
            plgpu.Barrier(),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(partials, stats, places, slots, first_unit, out)
