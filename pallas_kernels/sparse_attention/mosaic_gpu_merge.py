"""Merge of the partial results of a prefill call on Hopper: a weighted mean over the chosen blocks.

A CTA merges four units, (token, KV head), two slots at a time: 4 x 16 rows of partial results of each. As an online
softmax does, it rescales what it has when a slot raises the reference, so that no slot is looked at twice.
"""

# jax does not export every name of Mosaic GPU.
# pyright: reportPrivateImportUsage=false

import functools
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
# Of a row without a valid slot: finite, so that no difference of two references is NaN.
_LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclass(frozen=True)
class TuningConfig:
    """stages: of the ring of partial results, 22 or 32 KiB each. More of them leave room for fewer CTAs in an SM."""

    CANDIDATES: ClassVar = {"stages": (1, 2, 3, 4, 6)}

    stages: int = 3

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

    places: i32[units * C], the place of each slot's partial result, 4 to a tile; -1 where a slot was not used.
    first_unit: i32[1], of `out` [T * K, G, H]. So no call has to be put together from its parts: a copy of it all.
    """
    groups = -(-units // _UNITS)
    dtype = out.dtype
    num_words, row_words = packing.words_of(dtype), partials.shape[2]
    widths = packing.widths_of(dtype)
    stages = min(config.stages, top_k // _SLOTS)
    places = jnp.pad(places, (0, (groups * _UNITS - units) * top_k), constant_values=-1)
    places = places.reshape(groups, _UNITS, top_k)
    # Few tokens see fewer blocks than they may choose, and unused slots are the last as a rule.
    slots = jnp.max(jnp.where(places >= 0, jnp.arange(1, top_k + 1, dtype=jnp.int32), 0), axis=(1, 2))
    # What is copied must be a multiple of 128 bytes.
    width = round_up(top_k, 32 // _UNITS)
    places = jnp.pad(places, ((0, 0), (0, 0), (0, width - top_k)), constant_values=-1)

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
        row = plgpu.broadcasted_iota(jnp.int32, (_ROWS,), 0, layout=_WGMMA.reduce(1))
        is_before = [row < (unit + 1) * GROUP for unit in range(_UNITS - 1)]
        plgpu.copy_gmem_to_smem(places_gmem.at[group], places_smem, places_barrier)

        def load(step, stage):
            for i in range(_SLOTS):
                for unit in range(_UNITS):
                    # An unused slot brings something that nobody looks at.
                    place = jnp.maximum(places_smem[unit, step * _SLOTS + i], 0)
                    rows = pl.ds(pl.multiple_of(lax.rem(place, jnp.int32(_UNITS)) * GROUP, GROUP), GROUP)
                    plgpu.copy_gmem_to_smem(
                        partials_gmem.at[lax.div(place, jnp.int32(_UNITS)), rows],
                        partials_smem.at[stage, i, pl.ds(unit * GROUP, GROUP)],
                        partials_barrier.at[stage],
                        oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,  # so it is taken for one run of bytes
                    )

        plgpu.barrier_wait(places_barrier)
        # A loop, since the kernel's code takes long to make.
        lax.fori_loop(0, jnp.minimum(num_steps, stages), lambda step, _: load(step, step), None)

        def by_unit(parts):
            """Of several scalars, each unit's rows of its own."""
            result = parts[-1]
            for unit in range(_UNITS - 2, -1, -1):
                result = jnp.where(is_before[unit], parts[unit], result)
            return result

        def spread(rows):
            return {width: mosaic.spread(rows, (_ROWS, width), 0, _WGMMA) for width in set(widths)}

        def step(number, carry):
            acc, shifted, reference, whole = carry
            stage = lax.rem(number, jnp.int32(stages))
            slots = [number * _SLOTS + i for i in range(_SLOTS)]
            valid = [by_unit([places_smem[unit, slot] >= 0 for unit in range(_UNITS)]) for slot in slots]
            plgpu.barrier_wait(partials_barrier.at[stage])

            def statistic(k, of_nothing):
                """Of the rows of each slot."""
                columns = (partials_smem.at[stage, i, :, num_words + k] for i in range(_SLOTS))
                words = (mosaic.load(column, _WGMMA.reduce(1)) for column in columns)
                floats = (lax.bitcast_convert_type(word, jnp.float32) for word in words)
                return [jnp.where(valid, x, jnp.float32(of_nothing)) for valid, x in zip(valid, floats, strict=True)]

            references, totals, row_units = (statistic(k, x) for k, x in enumerate((_LOWEST, 0.0, 0.0)))
            raised = functools.reduce(jnp.maximum, references, reference)
            rescale, *weights = (jnp.exp2(x - raised) for x in (reference, *references))
            scales = [x * weight for x, weight in zip(row_units, weights, strict=True)]
            rescale_all = spread(rescale)
            acc = [x * rescale_all[x.shape[1]] for x in acc]
            for i, scale in enumerate(scales):
                words = mosaic.load(partials_smem.at[stage, i, :, pl.ds(0, num_words)], _WGMMA)
                scale_all = spread(scale)
                # Of an unused slot the words are any, which are finite numbers.
                numbers = packing.unpack(words, dtype, mask)
                acc = [x + y * scale_all[y.shape[1]] for x, y in zip(acc, numbers, strict=True)]
            # The reads have to be over before the copy engine writes there again.
            plgpu.commit_smem()

            @mosaic.when(number + stages < num_steps)
            def _():
                load(number + stages, stage)

            whole = whole * rescale + sum(x * weight for x, weight in zip(totals, weights, strict=True))
            return acc, shifted * rescale + sum(scales), raised, whole

        nothing, lowest = (mosaic.full((_ROWS,), x, jnp.float32, _WGMMA.reduce(1)) for x in (0.0, _LOWEST))
        acc = [mosaic.full((_ROWS, width), 0.0, jnp.float32, _WGMMA) for width in widths]
        acc, shifted, _, whole = lax.fori_loop(0, num_steps, step, (acc, nothing, lowest, nothing))
        acc = jnp.concatenate(acc, axis=1)
        inverse = jnp.where(whole > 0, 1.0 / whole, 0.0)
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
            plgpu.SMEM((stages, _SLOTS, _ROWS, row_words), jnp.int32),
            plgpu.SMEM((_UNITS, width), jnp.int32),
            plgpu.SMEM((_ROWS, DIM), dtype, transforms=mosaic.TILING),
            plgpu.Barrier(num_arrivals=_SLOTS * _UNITS, num_barriers=stages),
            plgpu.Barrier(),
        ],
        compiler_params=mosaic.compiler_params(approx_math=True, unsafe_no_auto_barriers=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(partials, places, slots, first_unit, np.asarray([packing.mask_of(dtype)], np.int32), out)
