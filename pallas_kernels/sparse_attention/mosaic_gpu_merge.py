"""Merge of the partial results of a prefill call on Hopper: a weighted mean over the chosen blocks.

A CTA merges four units, (token, KV head), two slots at a time: 4 x 16 rows of partial results of each. As an online
softmax does, it rescales what it has when a slot raises the reference, so that no slot is looked at twice.
"""

# jax does not export every name of Mosaic GPU.
# pyright: reportPrivateImportUsage=false

import functools
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.hopper import DIM, GROUP, round_up
from pallas_kernels.sparse_attention import mosaic_gpu_partials as packing

_WGMMA = plgpu.Layout.WGMMA
_UNITS = 4
# At a time, which saves half of the rescaling: every number of slots that is served is even.
_SLOTS = 2
_ROWS = _UNITS * GROUP


@dataclass(frozen=True)
class TuningConfig:
    """stages: of the ring of partial results, 21 or 32 KiB each. More of them leave room for fewer CTAs in an SM."""

    CANDIDATES: ClassVar = {"stages": (1, 2, 3, 4, 6)}

    stages: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.stages <= 6:
            raise ValueError(f"stages={self.stages} must be 1 to 6")


@functools.partial(jax.jit, static_argnames=("units", "top_k", "config", "interpret"))
def merge_prefill(
    partials,
    places,
    first_unit,
    out,
    *,
    units: int,
    top_k: int,
    config: TuningConfig,
    interpret: Any,
):
    """Write the results of `units` units, from what `attend_prefill` returns, into a Ref of the whole call's.

    places: i32[units * C], the place of each slot's partial result, 4 to a tile; less than 0 where a slot was not used.
    first_unit: i32[1], of `out` [T * K, G, H]. So no call has to be put together from its parts: a copy of it all.
    """
    groups = -(-units // _UNITS)
    dtype = out.dtype
    num_words, row_words = packing.words_of(dtype), partials.shape[2]
    widths = packing.widths_of(dtype)
    stages = min(config.stages, top_k // _SLOTS)
    # Runs of bytes: a row is not a multiple of the 16 that the copy engine wants. The interpreter cannot reshape.
    flat = interpret is None
    of_unit, of_slot = ((GROUP * row_words,), (_UNITS,)) if flat else ((GROUP, row_words), (_ROWS,))
    places = jnp.pad(places, (0, (groups * _UNITS - units) * top_k), constant_values=-1)
    places = places.reshape(groups, _UNITS, top_k)
    # Few tokens see fewer blocks than they may choose, and unused slots are the last as a rule.
    slots = jnp.max(jnp.where(places >= 0, jnp.arange(1, top_k + 1, dtype=jnp.int32), 0), axis=(1, 2))
    # The others bring the last tile, which says that nothing is there.
    places = jnp.where(places >= 0, places, (partials.shape[0] - 1) * _UNITS)
    # What is copied must be a multiple of 128 bytes.
    width = round_up(top_k, 32 // _UNITS)
    places = jnp.pad(places, ((0, 0), (0, 0), (0, width - top_k)))

    def merge(
        partials_gmem,
        places_gmem,
        slots_gmem,
        first_unit_gmem,
        mask_gmem,
        out_gmem,
        partials_smem,
        places_smem,
        out_smem,
        partials_barrier,
        places_barrier,
    ):
        # The last ones first, of which some partial results are still in the L2 cache.
        group = (groups - 1) - lax.axis_index("group")
        first_unit, mask = first_unit_gmem[0], mask_gmem[0]
        num_steps = lax.div(slots_gmem[group] + (_SLOTS - 1), jnp.int32(_SLOTS))
        plgpu.copy_gmem_to_smem(places_gmem.at[group], places_smem, places_barrier)

        def load(step, stage):
            def load_units():
                for i, unit in itertools.product(range(_SLOTS), range(_UNITS)):
                    plgpu.copy_gmem_to_smem(
                        partials_gmem.at[places_smem[unit, step * _SLOTS + i]],
                        partials_smem.at[stage, i, unit if flat else pl.ds(unit * GROUP, GROUP)],
                        partials_barrier.at[stage],
                        oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
                    )

            # The instructions are felt: only one warp has them.
            @pl.core_map(plgpu.WarpMesh(axis_name="warp"))
            def _():
                mosaic.warp_when(lax.axis_index("warp") == 0)(load_units)

        plgpu.barrier_wait(places_barrier)
        # A loop, since the kernel's code takes long to make.
        lax.fori_loop(0, jnp.minimum(num_steps, stages), lambda step, _: load(step, step), None)

        def spread(rows):
            return {width: mosaic.spread(rows, (_ROWS, width), 0, _WGMMA) for width in set(widths)}

        def step(number, carry):
            acc, shifted, reference, whole = carry
            stage = lax.rem(number, jnp.int32(stages))
            plgpu.barrier_wait(partials_barrier.at[stage])

            def rows_of(i):
                rows = partials_smem.at[stage, i]
                return rows.reshape(_ROWS, row_words) if flat else rows

            def statistics(i):
                """Reference, total and unit of the rows of a slot."""
                columns = (rows_of(i).at[:, num_words + k] for k in range(2))
                return packing.unpack_statistics(*(mosaic.load(column, _WGMMA.reduce(1)) for column in columns))

            references, totals, row_units = zip(*map(statistics, range(_SLOTS)), strict=True)
            raised = functools.reduce(jnp.maximum, references, reference)
            rescale, *weights = (jnp.exp2(x - raised) for x in (reference, *references))
            scales = [x * weight for x, weight in zip(row_units, weights, strict=True)]
            rescale_all = spread(rescale)
            acc = [x * rescale_all[x.shape[1]] for x in acc]
            for i, scale in enumerate(scales):
                words = mosaic.load(rows_of(i).at[:, pl.ds(0, num_words)], _WGMMA)
                scale_all = spread(scale)
                numbers = packing.unpack(words, dtype, mask)
                acc = [x + y * scale_all[y.shape[1]] for x, y in zip(acc, numbers, strict=True)]
            # The reads have to be over before the copy engine writes there again.
            plgpu.commit_smem()

            @mosaic.when(number + stages < num_steps)
            def _():
                load(number + stages, stage)

            whole = whole * rescale + sum(x * weight for x, weight in zip(totals, weights, strict=True))
            return acc, shifted * rescale + sum(scales), raised, whole

        nothing, lowest = (mosaic.full((_ROWS,), x, jnp.float32, _WGMMA.reduce(1)) for x in (0.0, packing.LOWEST))
        acc = [mosaic.full((_ROWS, width), 0.0, jnp.float32, _WGMMA) for width in widths]
        acc, shifted, _, whole = lax.fori_loop(0, num_steps, step, (acc, nothing, lowest, nothing))
        acc = jnp.concatenate(acc, axis=1)
        inverse = jnp.where(whole > packing.NO_TOTAL, packing.step_of(dtype) / whole, 0.0)
        # What `unpack` adds to every number, in one go.
        inverse, shift = (
            lax.broadcast_in_dim(x, acc.shape, [0]) for x in (inverse, shifted * packing.middle_of(dtype))
        )
        out_smem[...] = ((acc - shift) * inverse).astype(dtype)
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
            plgpu.SMEM((stages, _SLOTS, *of_slot, of_unit[-1]), jnp.int32),
            plgpu.SMEM((_UNITS, width), jnp.int32),
            plgpu.SMEM((_ROWS, DIM), dtype, transforms=mosaic.TILING),
            plgpu.Barrier(num_arrivals=_SLOTS * _UNITS, num_barriers=stages),
            plgpu.Barrier(),
        ],
        compiler_params=mosaic.compiler_params(approx_math=True, unsafe_no_auto_barriers=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(partials.reshape(-1, *of_unit), places, slots, first_unit, np.asarray([packing.mask_of(dtype)], np.int32), out)
