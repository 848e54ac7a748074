"""Attention of a decode call on Hopper: to the blocks that were chosen, or to all that a row sees.

A CTA takes one (row, KV head) and a share of its blocks, and walks over their pages with an online softmax in
base 2. The query heads that share the KV head, up to 16, are the first of the 64 rows of a wgmma: what the others
compute is never stored. Several shares of a row are merged afterwards, a few by XLA, many by a second kernel: a
partial result leaves as two numbers of the queries' dtype, the second what the first rounded away.
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

from pallas_kernels.hopper import DIM, PAGE_SIZE, round_up
from pallas_kernels.sparse_attention import mosaic_gpu_decode_merge as merging

_TILE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_ROWS = 64
_WGMMA = plgpu.Layout.WGMMA
# Rows of a tile of shared memory: fewer than that cannot be copied.
_TILE_ROWS = 8
_NUM_SMS = 132
# 16 shares take XLA 2.9 us and the kernel 3.4 on an H200, 64 shares take XLA four launches.
_FEW_SHARES = 32
# Of a row that has seen no key: finite, so that no difference of two maxima is NaN.
_LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclass(frozen=True)
class TuningConfig:
    """shares: CTAs that a row's blocks are split over. stages: of the ring of pages, 64 KiB each."""

    CANDIDATES: ClassVar = {"shares": (1, 2, 4, 8, 16), "stages": (1, 2)}

    shares: int
    stages: int

    def __post_init__(self) -> None:
        if self.shares < 1:
            raise ValueError(f"shares={self.shares} must be at least 1")
        if self.stages not in (1, 2, 3):
            raise ValueError(f"stages={self.stages} must be 1, 2 or 3")

    @classmethod
    def heuristic(cls, units: int, top_k: int) -> "TuningConfig":
        """For `units` pairs of a row and a KV head: two CTAs for each SM of an H200, which hide each other's waits."""
        shares = 1
        while shares < top_k and shares * units <= 128:
            shares *= 2
        return cls(shares=shares, stages=1)

    @classmethod
    def for_all_blocks(cls, units: int, table_width: int) -> "TuningConfig":
        """As `heuristic`, of tables of so many blocks: up to four rounds of CTAs, which even out unequal lengths.

        A CTA beyond the first round has at least 8 blocks to pay for its partial result.
        """
        ctas = 2 * _NUM_SMS
        shares = min(max(1, ctas // units), table_width)
        for rounds in (2, 3, 4):
            more = ctas * rounds // units
            if more * 8 <= table_width:
                shares = max(shares, more)
        return cls(shares=shares, stages=1)


@functools.partial(jax.jit, static_argnames=("scale", "config", "interpret"))
def attend_decode(q, k, v, block_ids, block_table, seq_lens, *, scale: float, config: TuningConfig, interpret: Any):
    """Attention [T, N, H] of q [T, N, H] to the pages of k and v [P, K, S, H] that block_ids [T, K, C] choose.

    None for block_ids means all blocks up to a row's own. With block_ids, C must be a multiple of config.shares
    where it is not less.
    """
    num_rows, num_heads, _ = q.shape
    num_pages, kv_heads, _, _ = k.shape
    num_sequences, table_width = block_table.shape
    num_queries = num_rows // num_sequences
    num_blocks = table_width if block_ids is None else block_ids.shape[2]
    shares = min(config.shares, num_blocks)
    most = -(-num_blocks // shares)
    if block_ids is not None and num_blocks % shares:
        raise ValueError(f"shares={shares} must divide the {num_blocks} chosen blocks")
    stages = min(config.stages, most)
    factor = scale * math.log2(math.e)
    dtype = q.dtype
    group = num_heads // kv_heads
    height = round_up(group, _TILE_ROWS)
    queries = q.reshape(num_rows, kv_heads, group, DIM)
    if height > group:
        queries = jnp.pad(queries, ((0, 0), (0, 0), (0, height - group), (0, 0)))

    def attend(
        q_gmem,
        k_gmem,
        v_gmem,
        table_gmem,
        lens_gmem,
        *rest,
    ):
        ids_gmem, rest = (None, rest) if block_ids is None else (rest[0], rest[1:])
        out_gmem, *rest = rest
        stats_gmem, rest = (rest[0], rest[1:]) if shares > 1 else (None, rest)
        q_smem, k_smem, v_smem, stats_smem, q_barrier, k_barrier, v_barrier, *weights_smem = rest
        row, head, part = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("share")
        sequence = lax.div(row, jnp.int32(num_queries))
        position = lens_gmem[sequence] - num_queries + lax.rem(row, jnp.int32(num_queries))
        own = jnp.where(position >= 0, lax.div(position, jnp.int32(PAGE_SIZE)), -1)

        def used(block):
            return jnp.logical_and(block >= 0, block <= own)

        if ids_gmem is None:
            # Equal shares of what is visible, not of the table.
            visible = jnp.minimum(own + 1, table_width)
            share = lax.div(visible + (shares - 1), jnp.int32(shares))
            first = part * share
            count = jnp.clip(visible - first, 0, share)

            def block(i):
                return first + i
        else:

            def block(i):
                return ids_gmem[row, head, part * most + i]

            # Unused ids lie on the right as a rule; one in between is walked over with every key masked.
            count = jnp.int32(0)
            for i in range(most):
                count = jnp.where(used(block(i)), i + 1, count)

        def page(i):
            # What a masked block's entry holds is no address.
            entry = table_gmem[sequence, jnp.clip(block(i), 0, table_width - 1)]
            return jnp.clip(entry, 0, num_pages - 1)

        def load_k(i, slot):
            plgpu.copy_gmem_to_smem(k_gmem.at[page(i), head], k_smem.at[slot], k_barrier.at[slot])

        def load_v(i, slot):
            plgpu.copy_gmem_to_smem(v_gmem.at[page(i), head], v_smem.at[slot], v_barrier.at[slot])

        def step(i, carry):
            acc, largest, total = carry
            slot = lax.rem(i, jnp.int32(stages))
            num_seen = jnp.where(used(block(i)), position + 1 - block(i) * PAGE_SIZE, 0)
            plgpu.barrier_wait(k_barrier.at[slot])

            def multiply_k(acc):
                plgpu.wgmma(acc, q_smem, k_smem.at[slot].T)
                return acc[...]

            logits = pl.run_scoped(multiply_k, plgpu.ACC((_ROWS, PAGE_SIZE), jnp.float32))

            @pl.when(i + stages < count)
            def _():
                load_k(i + stages, slot)

            def mask(logits):
                key = plgpu.broadcasted_iota(jnp.int32, (_ROWS, PAGE_SIZE), 1, layout=_WGMMA)
                return jnp.where(key < num_seen, logits, -jnp.inf)

            logits = lax.cond(num_seen < PAGE_SIZE, mask, lambda logits: logits, logits)
            new_largest = jnp.maximum(largest, logits.max(axis=1))
            # The difference first: scaled huge logits are not exact, and the largest must weigh 1.
            decay = jnp.exp2((largest - new_largest) * factor)
            weights = jnp.exp2((logits - lax.broadcast_in_dim(new_largest, logits.shape, [0])) * factor)
            weights = weights.astype(dtype)
            # Of what is multiplied: the rounding of equal weights then cancels.
            total = total * decay + weights.astype(jnp.float32).sum(axis=1)
            plgpu.barrier_wait(v_barrier.at[slot])

            @pl.when(num_seen < PAGE_SIZE)
            def _():
                # A weight of 0 does not silence a NaN in an unused slot.
                values = plgpu.load(v_smem.at[slot], layout=_WGMMA)
                key = plgpu.broadcasted_iota(jnp.int32, (PAGE_SIZE, DIM), 0, layout=_WGMMA)
                v_smem.at[slot][...] = jnp.where(key < num_seen, values, jnp.zeros_like(values))
                plgpu.commit_smem()

            if weights_smem:
                weights_smem[0][...] = weights
                plgpu.commit_smem()

            def multiply_v(acc):
                plgpu.wgmma(acc, weights_smem[0] if weights_smem else weights, v_smem.at[slot])
                return acc[...]

            values = pl.run_scoped(multiply_v, plgpu.ACC((_ROWS, DIM), jnp.float32))
            acc = acc * lax.broadcast_in_dim(decay, (_ROWS, DIM), [0]) + values

            @pl.when(i + stages < count)
            def _():
                load_v(i + stages, slot)

            return acc, new_largest, total

        plgpu.copy_gmem_to_smem(q_gmem.at[row, head], q_smem.at[pl.ds(0, height)], q_barrier)
        for i in range(stages):

            @pl.when(i < count)
            def _(i=i):
                load_k(jnp.int32(i), i)
                load_v(jnp.int32(i), i)

        def rows_of(value):
            return plgpu.layout_cast(jnp.full((_ROWS,), value, jnp.float32), _WGMMA.reduce(1))

        acc = plgpu.layout_cast(jnp.zeros((_ROWS, DIM), jnp.float32), _WGMMA)
        plgpu.barrier_wait(q_barrier)
        acc, largest, total = lax.fori_loop(0, count, step, (acc, rows_of(_LOWEST), rows_of(0.0)))
        inverse = jnp.where(total > 0, 1.0 / total, 0.0)
        acc = acc * lax.broadcast_in_dim(inverse, (_ROWS, DIM), [0])
        # Every page of keys has been used, so the results leave from the first one's place.
        high = acc.astype(dtype)
        k_smem.at[0, pl.ds(0, _ROWS)][...] = high
        if stats_gmem is not None:
            k_smem.at[0, pl.ds(_ROWS, _ROWS)][...] = (acc - high.astype(jnp.float32)).astype(dtype)
            stats_smem[0] = largest
            stats_smem[1] = total
        plgpu.commit_smem()
        for i in range(out_gmem.shape[3]):
            rows = k_smem.at[0, pl.ds(i * _ROWS, height)]
            plgpu.copy_smem_to_gmem(rows, out_gmem.at[row, head, part, i])
        if stats_gmem is not None:
            for i in range(2):
                plgpu.copy_smem_to_gmem(stats_smem.at[i, pl.ds(0, height)], stats_gmem.at[row, head, part, i])
        plgpu.wait_smem_to_gmem(0)

    halves = 2 if shares > 1 else 1
    out = [jax.ShapeDtypeStruct((num_rows, kv_heads, shares, halves, height, DIM), dtype)]
    if shares > 1:
        room = round_up(shares, merging.TILE)
        out.append(jax.ShapeDtypeStruct((num_rows, kv_heads, room, 2, height), jnp.float32))
    page = plgpu.SMEM((stages, PAGE_SIZE, DIM), dtype, transforms=_TILE)
    scratch = [
        plgpu.SMEM((_ROWS, DIM), dtype, transforms=_TILE),
        page,
        page,
        plgpu.SMEM((2, _ROWS), jnp.float32),
        plgpu.Barrier(),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
    ]
    if interpret is not None:  # it multiplies from shared memory only
        scratch.append(plgpu.SMEM((_ROWS, PAGE_SIZE), dtype, transforms=_TILE))
    if block_ids is None:
        attend.__name__ = "attend_all"  # for profiles
    partials, *stats = plgpu.kernel(
        attend,
        out_type=out,
        grid=(num_rows, kv_heads, shares),
        grid_names=("row", "head", "share"),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        **({} if interpret is None else {"interpret": interpret}),
    )(queries, k, v, block_table, seq_lens, *(() if block_ids is None else (block_ids,)))
    if stats and shares <= _FEW_SHARES:
        result = _merge(partials, stats[0], factor)[:, :, :group]
    elif stats:
        result = merging.merge_decode(partials, stats[0], group=group, factor=factor, interpret=interpret)
    else:
        result = partials[:, :, 0, 0, :group]
    return result.reshape(num_rows, num_heads, DIM)


def _merge(partials, stats, factor: float):
    """[T, K, G, H] from partials [T, K, shares, 2, G, H] and the maxima and sums f32[T, K, shares or more, 2, G].

    Written out share by share: sums and maxima of so few are faster within elementwise fusions than as reductions.
    """
    shares = partials.shape[2]
    stats = stats[:, :, :shares]
    largest = functools.reduce(jnp.maximum, [stats[:, :, i, 0] for i in range(shares)])
    weights = stats[:, :, :, 1] * jnp.exp2((stats[:, :, :, 0] - largest[:, :, None]) * factor)
    if shares > 4:
        # Else each of the DIM channels would compute its row's weights anew.
        weights = lax.optimization_barrier(weights)
    result, whole = jnp.float32(0), jnp.float32(0)
    for i in range(shares):
        share = partials[:, :, i].astype(jnp.float32)
        result = result + weights[:, :, i, :, None] * (share[:, :, 0] + share[:, :, 1])
        whole = whole + weights[:, :, i]
    return (result / jnp.where(whole > 0, whole, 1)[..., None]).astype(partials.dtype)
