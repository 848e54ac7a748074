"""Merge of the partial results of a prefill call on Hopper: a weighted mean over the chosen blocks.

A CTA merges four units, (token, KV head), slot by slot: 4 x 16 rows of partial results at a time. As an online softmax
does, it rescales what it has when a slot raises the maximum, so that no slot is looked at twice.
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

from pallas_kernels import mosaic
from pallas_kernels.hopper import DIM, GROUP, round_up

_TILE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_WGMMA = plgpu.Layout.WGMMA
_UNITS = 4
_ROWS = _UNITS * GROUP
# Of a row without a valid slot: finite, so that no difference of two maxima is NaN.
_LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclass(frozen=True)
class TuningConfig:
    """stages: of the ring of partial results, 16 KiB each. More of them leave room for fewer CTAs in an SM."""

    CANDIDATES: ClassVar = {"stages": (1, 2, 3, 4, 6)}

    stages: int = 3

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
    """Write the results of `units` units, from what `attend_prefill` returns, into a Ref of the whole call's.

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
    # What is copied must be a multiple of 128 bytes.
    width = round_up(top_k, 32 // _UNITS)
    places = jnp.pad(places, ((0, 0), (0, 0), (0, width - top_k)), constant_values=-1)

    def merge(
        partials_gmem,
        stats_gmem,
        places_gmem,
        slots_gmem,
        first_unit_gmem,
        out_gmem,
        partials_smem,
        places_smem,
        out_smem,
        partials_barrier,
        places_barrier,
    ):
        group = lax.axis_index("group")
        first_unit, num_slots = first_unit_gmem[0], slots_gmem[group]
        # The only layout: it settles the others, and the compiler would try out each that it is told.
        row = plgpu.broadcasted_iota(jnp.int32, (2 * _ROWS,), 0, layout=_WGMMA.reduce(1))
        is_before = [lax.rem(row, jnp.int32(_ROWS)) < (unit + 1) * GROUP for unit in range(_UNITS - 1)]
        of_nothing = jnp.where(row < _ROWS, jnp.float32(_LOWEST), jnp.float32(0))
        plgpu.copy_gmem_to_smem(places_gmem.at[group], places_smem, places_barrier)

        def load(slot, stage):
            for unit in range(_UNITS):
                # An unused slot brings something that nobody looks at.
                place = jnp.maximum(places_smem[unit, slot], 0)
                rows = pl.ds(pl.multiple_of(lax.rem(place, jnp.int32(_UNITS)) * GROUP, GROUP), GROUP)
                partial = partials_gmem.at[lax.div(place, jnp.int32(_UNITS)), rows]
                where = partials_smem.at[stage, pl.ds(unit * GROUP, GROUP)]
                plgpu.copy_gmem_to_smem(partial, where, partials_barrier.at[stage])

        plgpu.barrier_wait(places_barrier)
        # A loop, since the kernel's code takes long to make.
        lax.fori_loop(0, jnp.minimum(num_slots, stages), lambda slot, _: load(slot, slot), None)

        def places_of(slot):
            slot = jnp.minimum(slot, top_k - 1)
            return [places_smem[unit, slot] for unit in range(_UNITS)]

        def load_stats(slot):
            """For each unit both statistics of a whole tile's rows, shifted so that the unit's own are in their place.

            The copy engine refuses a unit's 16 rows alone, as misaligned.
            """

            def rows(place, unit):
                place = jnp.maximum(place, 0) + _UNITS  # behind the room for reading beyond
                tile, pair = lax.div(place, jnp.int32(_UNITS)), lax.rem(place, jnp.int32(_UNITS))
                start = 2 * tile * _ROWS + (pair - unit) * GROUP
                return mosaic.load(stats_gmem.at[pl.ds(start, 2 * _ROWS)], _WGMMA.reduce(1))

            return [rows(place, unit) for unit, place in enumerate(places_of(slot))]

        def by_unit(parts):
            """Of several vectors of rows, or scalars, each unit's rows of its own."""
            result = parts[-1]
            for unit in range(_UNITS - 2, -1, -1):
                result = jnp.where(is_before[unit], parts[unit], result)
            return result

        def step(slot, carry):
            acc, largest, whole, stats = carry
            # A step ahead, since they come from memory.
            next_stats = load_stats(slot + 1)
            valid = by_unit([place >= 0 for place in places_of(slot)])
            stats = jnp.where(valid, by_unit(stats), of_nothing)
            maximum, total = stats[:_ROWS], stats[_ROWS:]
            raised = jnp.maximum(largest, maximum)
            rescale, weight = (jnp.exp2((x - raised) * factor) for x in (largest, maximum))
            weight = total * weight
            stage = lax.rem(slot, jnp.int32(stages))
            plgpu.barrier_wait(partials_barrier.at[stage])
            partial = plgpu.load(partials_smem.at[stage], layout=_WGMMA).astype(jnp.float32)
            spread = lax.broadcast_in_dim(weight, partial.shape, [0])
            # An unused slot's partial result was never written, and may be a NaN.
            acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [0]) + jnp.where(spread > 0, partial * spread, 0.0)
            # The reads have to be over before the copy engine writes there again.
            plgpu.commit_smem()

            @mosaic.when(slot + stages < num_slots)
            def _():
                load(slot + stages, stage)

            return acc, raised, whole * rescale + weight, next_stats

        acc, largest, whole = (
            mosaic.full(shape, value, jnp.float32, layout)
            for shape, value, layout in (
                ((_ROWS, DIM), 0.0, _WGMMA),
                ((_ROWS,), _LOWEST, _WGMMA.reduce(1)),
                ((_ROWS,), 0.0, _WGMMA.reduce(1)),
            )
        )
        first = (acc, largest, whole, load_stats(0))
        acc, _, whole, _ = lax.fori_loop(0, num_slots, step, first)
        inverse = jnp.where(whole > 0, 1.0 / whole, 0.0)
        out_smem[...] = (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(dtype)
        plgpu.commit_smem()
        for unit in range(_UNITS):

            @mosaic.when(group * _UNITS + unit < units)
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
            plgpu.SMEM((_UNITS, width), jnp.int32),
            plgpu.SMEM((_ROWS, DIM), dtype, transforms=_TILE),
            plgpu.Barrier(num_arrivals=_UNITS, num_barriers=stages),
            plgpu.Barrier(),
        ],
        compiler_params=mosaic.compiler_params(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(partials, stats.reshape(-1), places, slots, first_unit, out)
