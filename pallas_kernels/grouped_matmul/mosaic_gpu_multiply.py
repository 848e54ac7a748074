"""The grouped matmul on Hopper: weights are the left operand, rows the right one.

A CTA takes a stretch of a group's output channels, 64 for each warpgroup and half, and a tile of its rows: out^T =
weights @ rows^T. Both lie in memory with the contracted channels innermost, as wgmma wants them, and the number of
rows, as the right operand's columns, can be any multiple of 8: few rows cost few multiplications, and a group that
ends early does not fill up a tile. One warp brings both operands through a ring of shared memory and runs ahead into
the next tile while the others finish one. The two halves are gate and up of the same channels, or two stretches of
channels. With two tiles a unit the CTAs of a cluster share the weights: each brings one half of them for both.
"""

# jax does not export every name of Mosaic GPU, and calls its transforms abstract.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul import mosaic_gpu_plan as planning
from pallas_kernels.hopper import NUM_SMS
from pallas_kernels.mosaic import TILING

# Rows of a result can be stored from any row on.
_RESULT = (plgpu.TilingTransform((1, 64)), plgpu.SwizzleTransform(128))
# Output channels of a warpgroup in a half, and contracted channels of a step.
CHANNELS, DEPTH = 64, 64
# Shared memory of a CTA, less what barriers take.
_SHARED_BYTES = 232_448 - 1024


@dataclass(frozen=True)
class TuningConfig:
    """How the work is cut up.

    widths: numbers of rows for which there is a multiplication, ascending multiples of 8. warpgroups: that multiply,
    1 or 2. stages: of the ring. ctas: that run at a time. tiles: of a unit, 1, or 2 for clusters of two CTAs. parts:
    of the contracted channels, each a CTA's, whose sums XLA adds up: each leaves as two bfloat16 numbers, the second
    what the first rounded away.
    """

    CANDIDATES: ClassVar = {"tiles": (1, 2), "parts": (1, 2, 4)}

    widths: tuple[int, ...]
    warpgroups: int
    stages: int
    ctas: int
    tiles: int = 1
    parts: int = 1

    def __post_init__(self) -> None:
        if not self.widths or list(self.widths) != sorted(set(self.widths)):
            raise ValueError(f"widths={self.widths} must ascend")
        if any(width % 8 or not 8 <= width <= 256 for width in self.widths):
            raise ValueError(f"widths={self.widths} must be multiples of 8 up to 256")
        if self.warpgroups not in (1, 2) or self.tiles not in (1, 2):
            raise ValueError(f"warpgroups={self.warpgroups} and tiles={self.tiles} must be 1 or 2")
        if self.parts < 1:
            raise ValueError(f"parts={self.parts} must be at least 1")
        if self.stages < 2 or self.ctas < 1 or self.ctas % self.tiles:
            raise ValueError(f"stages={self.stages} must be at least 2, ctas={self.ctas} a multiple of tiles")
        if not self.slots:
            raise ValueError(f"stages={self.stages} leave no shared memory for results")

    @classmethod
    def heuristic(cls, num_rows: int, num_groups: int, *, channels: int, depth: int) -> "TuningConfig":
        """For groups of about equal sizes of `channels` x `depth` matrices; any sizes are computed."""
        average = num_rows / num_groups
        if average <= 0.1:
            # So few rows meet so few matrices that whole stretches of channels do not occupy every SM.
            items, parts = num_rows * (channels // (2 * CHANNELS)), 1
            while items * parts < NUM_SMS and depth // DEPTH % (2 * parts) == 0 and parts < 8:
                parts *= 2
            return cls(widths=(8,), warpgroups=1, stages=12, ctas=NUM_SMS, parts=parts)
        if average <= 16:
            return cls(widths=(8, 16, 24, 32), warpgroups=1, stages=10, ctas=NUM_SMS)
        if average <= 64:
            return cls(widths=(16, 32, 64, 96, 128), warpgroups=2, stages=4, ctas=NUM_SMS)
        return cls(widths=(16, 64, 96, 112, 128, 136, 144, 160), warpgroups=2, stages=4, ctas=NUM_SMS, tiles=2)

    def fitted(self, depth: int) -> "TuningConfig":
        """With no more parts than divide these contracted channels: what was tuned serves a bucket of sizes."""
        parts = self.parts
        while depth // DEPTH % parts:
            parts -= 1
        return replace(self, parts=parts)

    @property
    def chunk(self) -> int:
        """Rows of a result that are stored at a time."""
        return next(chunk for chunk in (32, 16, 8) if self.widths[-1] % chunk == 0)

    @property
    def slots(self) -> int:
        """How many of those have a place in shared memory: as many as there is room for and use of."""
        channels = CHANNELS * self.warpgroups
        ring = 2 * self.stages * DEPTH * (2 * channels + self.widths[-1])
        room = (_SHARED_BYTES - ring) // (2 * channels * self.chunk)
        return max(0, min(room, 2 * self.widths[-1] // self.chunk))


def multiply(
    rows,
    weights,
    plan: planning.Plan,
    *,
    activation: Callable[[jax.Array, jax.Array], jax.Array] | None,
    config: TuningConfig,
    interpret: Any,
):
    """out[r] = weights[group of r] @ rows[r] for the rows of the plan's groups; others are left unwritten.

    rows [R, I], R below or a multiple of 8; weights [E, O, I], or [E, 2, F, I] with an activation of two float32
    products, gate and up. I is a multiple of 64, O of 128 * warpgroups, F of 64 * warpgroups.
    """
    num_rows, depth = rows.shape
    num_groups = weights.shape[0]
    fused = activation is not None
    stretch = CHANNELS * config.warpgroups
    out_channels = weights.shape[2] if fused else weights.shape[1]
    num_stretches = out_channels // (stretch if fused else 2 * stretch)
    parts, steps = config.parts, depth // DEPTH // config.parts
    if steps * parts * DEPTH != depth:
        raise ValueError(f"parts={parts} must divide the {depth // DEPTH} steps of {depth} contracted channels")
    widths, stages, tiles, warpgroups = config.widths, config.stages, config.tiles, config.warpgroups
    widest, chunk, slots = widths[-1], config.chunk, config.slots
    dtype = rows.dtype
    out_dtype = dtype if parts == 1 else jnp.bfloat16
    halves = 1 if fused and parts == 1 else 2
    pieces = 1 if parts == 1 else 2

    def multiply_groups(
        rows_gmem,
        weights_gmem,
        group_of_unit_gmem,
        sizes_gmem,
        begins_gmem,
        first_units_gmem,
        out_gmem,
        a_smem,
        b_smem,
        out_smem,
        full_barrier,
        free_barrier,
    ):
        wg = lax.axis_index("wg")
        member = lax.axis_index("cta") if tiles > 1 else jnp.int32(0)
        first_item = lax.axis_index("cluster")
        num_clusters = config.ctas // tiles

        def cut(group):
            begin, size = begins_gmem[group], sizes_gmem[group]
            return begin, begin + size, planning.cut(begin, size, widest=widest, tiles=tiles)

        num_units = first_units_gmem[num_groups - 1] + cut(jnp.int32(num_groups - 1))[2].num_units
        num_items = num_units * num_stretches * parts
        turns = jnp.maximum(lax.div(num_items - first_item + (num_clusters - 1), jnp.int32(num_clusters)), 0)

        def describe(turn):
            """Part, group, stretch of channels, first row, own rows [begin, end) relative to it, and which width."""
            item = first_item + turn * num_clusters
            part = lax.rem(item, jnp.int32(parts))
            item = lax.div(item, jnp.int32(parts))
            group = group_of_unit_gmem[lax.div(item, jnp.int32(num_stretches))]
            begin, end, (first_row, num_units, height) = cut(group)
            # The units of a group take turns at a stretch, so that its weights come from memory once.
            place = item - first_units_gmem[group] * num_stretches
            stretch = lax.div(place, num_units)
            row = first_row + ((place - stretch * num_units) * tiles + member) * height
            begin, end = jnp.maximum(begin - row, 0), jnp.minimum(end - row, height)
            which = jnp.int32(0)
            for width in widths[:-1]:
                which += (end > width).astype(jnp.int32)
            return part, group, stretch, row, begin, end, which

        def half_of(group, stretch, half):
            if fused:
                return weights_gmem.at[group, half, pl.ds(stretch * CHANNELS * warpgroups, CHANNELS * warpgroups)]
            first = (stretch * 2 + half) * (CHANNELS * warpgroups)
            return weights_gmem.at[group, pl.ds(first, CHANNELS * warpgroups)]

        def produce():
            def item(turn, _):
                part, group, stretch, row, _, _, which = describe(turn)
                # Divided and multiplied, which proves to the compiler that a copy may begin there.
                row = jnp.minimum(row, max(num_rows - planning.ALIGNMENT, 0))
                row = lax.div(row, jnp.int32(planning.ALIGNMENT)) * planning.ALIGNMENT

                def step(k, _):
                    number = turn * steps + k
                    slot = lax.rem(number, jnp.int32(stages))

                    @pl.when(number >= stages)
                    def _():
                        plgpu.barrier_wait(free_barrier.at[slot])

                    channels = pl.ds((part * steps + k) * DEPTH, DEPTH)
                    for half in range(2):
                        plgpu.copy_gmem_to_smem(
                            half_of(group, stretch, half).at[:, channels],
                            a_smem.at[slot, half],
                            full_barrier.at[slot],
                            collective_axes="cta" if tiles > 1 else None,
                        )

                    def bring(width):
                        plgpu.copy_gmem_to_smem(
                            rows_gmem.at[pl.ds(row, width), channels],
                            b_smem.at[slot, pl.ds(0, width)],
                            full_barrier.at[slot],
                        )

                    _switch(which, [functools.partial(bring, width) for width in widths])

                lax.fori_loop(0, steps, step, None)

            lax.fori_loop(0, turns, item, None)

            # Every completion of a barrier has to be awaited.
            def drain(number, _):
                plgpu.barrier_wait(free_barrier.at[lax.rem(number, jnp.int32(stages))])

            total = turns * steps
            lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, None)

        @pl.when(wg == warpgroups)
        def _produce():
            if warpgroups > 1:
                plgpu.set_max_registers(40, action="decrease")

            @pl.core_map(plgpu.WarpMesh(axis_name="warp"))
            def _():
                pl.when(lax.axis_index("warp") == 0)(produce)

        def consume(turn, _):
            part, _, stretch, row, begin, end, which = describe(turn)

            def product(*accs):
                def multiply(width):
                    def step(k, _):
                        number = turn * steps + k
                        slot = lax.rem(number, jnp.int32(stages))
                        plgpu.barrier_wait(full_barrier.at[slot])
                        for half, acc in enumerate(accs):
                            plgpu.wgmma(
                                acc.at[:, pl.ds(0, width)],
                                a_smem.at[slot, half, pl.ds(wg * CHANNELS, CHANNELS)],
                                b_smem.at[slot, pl.ds(0, width)].T,
                            )
                        plgpu.wgmma_wait(2)

                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(free_barrier.at[lax.rem(number - 1, jnp.int32(stages))])

                    lax.fori_loop(0, steps, step, None)
                    plgpu.wgmma_wait(0)

                _switch(which, [functools.partial(multiply, width) for width in widths])
                plgpu.barrier_arrive(free_barrier.at[lax.rem(turn * steps + (steps - 1), jnp.int32(stages))])
                return tuple(acc[...] for acc in accs)

            acc = plgpu.ACC((CHANNELS, widest), jnp.float32)
            products = pl.run_scoped(product, acc, acc)
            number = 0
            for first in range(0, widest, chunk):
                values = [value[:, first : first + chunk] for value in products]
                if halves == 1:
                    assert activation is not None
                    values = [activation(*values)]
                low, high = (jnp.clip(edge - first, 0, chunk) for edge in (begin, end))
                for half, piece in itertools.product(range(halves), range(pieces)):
                    value = values[half]
                    if piece:
                        value -= value.astype(out_dtype).astype(jnp.float32)
                    slot = number % slots
                    # Of the tile before nothing is left to be read as a rule, and of this one the slot's last part.
                    if number == 0 or number >= slots:
                        plgpu.wait_smem_to_gmem(slots - 1 if number else 0, wait_read_only=True)
                    # Gate and up are apart in the result, as they are in memory; other halves follow one another.
                    channel = (stretch if fused else stretch * 2 + half) * (CHANNELS * warpgroups) + wg * CHANNELS
                    channel += half * out_channels if fused else 0

                    @pl.when(low < high)
                    def _(value=value, first=first, low=low, high=high, slot=slot, channel=channel, piece=piece):
                        out_smem.at[wg, slot].T[...] = value.astype(out_dtype)
                        plgpu.commit_smem()
                        where = out_gmem.at[part, piece, :, pl.ds(channel, CHANNELS)]
                        _store_rows(out_smem.at[wg, slot], where, row + first, low, high, chunk)

                    # Also where nothing was stored: the waits above count.
                    plgpu.commit_smem_to_gmem_group()
                    number += 1

        @pl.when(wg < warpgroups)
        def _consume():
            if warpgroups > 1:
                plgpu.set_max_registers(232, action="increase")
            lax.fori_loop(0, turns, consume, None)
            plgpu.wait_smem_to_gmem(0)

    scratch = [
        plgpu.SMEM((stages, 2, stretch, DEPTH), dtype, transforms=TILING),
        plgpu.SMEM((stages, widest, DEPTH), dtype, transforms=TILING),
        plgpu.SMEM((warpgroups, slots, chunk, CHANNELS), out_dtype, transforms=_RESULT),
        plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        plgpu.ClusterBarrier(collective_axes=("cta",), num_arrivals=warpgroups, num_barriers=stages)
        if tiles > 1
        else plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    ]
    cluster = {"cluster": (tiles,), "cluster_names": ("cta",)} if tiles > 1 else {}
    channels = out_channels * (2 if fused and parts > 1 else 1)
    out = plgpu.kernel(
        multiply_groups,
        out_type=jax.ShapeDtypeStruct((parts, pieces, num_rows, channels), out_dtype),
        grid=(config.ctas // tiles,),
        grid_names=("cluster",),
        num_threads=warpgroups + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        **cluster,
        **({} if interpret is None else {"interpret": interpret}),
    )(rows, weights, *plan)
    if parts == 1:
        return out[0, 0]
    total = jnp.sum(out.astype(jnp.float32), axis=(0, 1))
    if activation is not None:
        total = activation(total[:, :out_channels], total[:, out_channels:])
    return total.astype(dtype)


def _switch(which, branches: list[Callable[[], None]]) -> None:
    """Run one of the branches. `lax.switch` clamps, which a single warp cannot, and nested ones lower slowly."""
    if len(branches) == 1:
        branches[0]()
        return
    for number, branch in enumerate(branches):
        pl.when(which == number)(branch)


def _store_rows(source, target, row, low, high, height: int) -> None:
    """Store rows [low, high) of a chunk: a copy's height is static, so in heights of powers of two."""
    store = functools.partial(plgpu.copy_smem_to_gmem, commit_group=False)
    count = high - low

    @pl.when(count == height)
    def _():
        store(source, target.at[pl.ds(row, height)])

    part = height // 2
    while part:

        @pl.when(jnp.logical_and(count < height, (count & part) > 0))
        def _(part=part):
            # The larger ones come first.
            first = low + (count & ~jnp.int32(2 * part - 1))
            store(source.at[pl.ds(first, part)], target.at[pl.ds(row + first, part)])

        part //= 2
