"""Attention of a decode call on Hopper: to the blocks that were chosen, or to all that a row sees.

A CTA takes one (row, KV head) and a share of its blocks, and walks over their pages with an online softmax in
base 2. The products are turned round, keys x queries and channels x queries, so that the query heads that share the
KV head, 8 or 16, are the narrow side of a wgmma, of which the least is 8, instead of its 64 rows. The shares of a row
are a cluster if they are few, 16 at most: each of its CTAs merges some of the queries, for which the others send it
what they have. More than that are merged afterwards, a few by XLA, many by a second kernel: a partial result leaves as
two numbers of the queries' dtype, the second what the first rounded away.
"""

# jax does not export every name of Mosaic GPU.
# pyright: reportPrivateImportUsage=false

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_cluster as cluster
from pallas_kernels.hopper import DIM, MOST_CLUSTERED, NUM_SMS, PAGE_SIZE, round_up
from pallas_kernels.index_topk.mosaic_gpu_choose import Chooser
from pallas_kernels.mosaic import TILING, compiler_params, cond, full, load, meet, spread, when
from pallas_kernels.sparse_attention import mosaic_gpu_decode_merge as merging
from pallas_kernels.sparse_attention.mosaic_gpu_decode_blocks import AllBlocks, ChosenBlocks, GivenBlocks, Place

_WGMMA = plgpu.Layout.WGMMA
# A thread has one channel of every row.
_BY_CHANNEL = plgpu.Layout.TILED(plgpu.Tiling(((1, DIM), (32,), (1,))), (-3,), (-2,), -1)
# Rows of the least tile of a wgmma.
_ROWS = 64
# Rows of a tile of shared memory: fewer than that cannot be copied.
_TILE_ROWS = 8
# 16 shares take XLA 2.9 us and the kernel 3.4 on an H200, 64 shares take XLA four launches.
_FEW_SHARES = 32
# CTAs of a cluster at most, if two of them fit into an SM, so that 8 SMs do. And CTAs in clusters of so many.
_LARGEST_CLUSTER, _MOST_IN_SIXTEENS = 16, 64
# So many leave each of them all the shared memory of an SM, and more bandwidth than it can take.
_FEW_CTAS = 32
# Entries of a block table are copied in lines of 128 bytes.
_TABLE_LINE = 32
# Of a row that has seen no key: finite, so that no difference of two maxima is NaN.
_LOWEST = float(jnp.finfo(jnp.float32).min)


def _height(group: int) -> int:
    """Rows of the queries that share a KV head, in shared memory."""
    return round_up(group, _TILE_ROWS)


def _most_clustered(group: int) -> int:
    """CTAs of a cluster at most: each has queries to merge."""
    return min(_LARGEST_CLUSTER, _height(group))


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
        # More CTAs than any GPU has room for in a cluster must fit two to an SM.
        if self.shares > MOST_CLUSTERED and self.stages > 1:
            raise ValueError(f"stages={self.stages} must be 1 with more than {MOST_CLUSTERED} shares")

    @classmethod
    def heuristic(cls, units: int, top_k: int, group: int) -> "TuningConfig":
        """For `units` pairs of a row and a KV head: no more than a CTA for each SM, where a cluster shares a unit.

        On an H200, 4 units take 4.9 us in clusters of 16 and 5.5 in eights, but 8 units 6.9 and 6.4, and 16 units 11.2
        and 8.5: a cluster keeps to one part of the chip. 64 units take 20.5 us in pairs and 25.8 in fours, two of which
        have to share an SM. Where CTAs are few, a share of two blocks holds both at a time: 5.5 us instead of 5.9.
        """
        shares = 1
        while 2 * shares <= min(top_k, _most_clustered(group)):
            if 2 * shares * units > (NUM_SMS if 2 * shares <= MOST_CLUSTERED else _MOST_IN_SIXTEENS):
                break
            shares *= 2
        both = top_k == 2 * shares and shares <= MOST_CLUSTERED and shares * units <= _FEW_CTAS
        return cls(shares=shares, stages=2 if both else 1)

    @classmethod
    def for_all_blocks(cls, units: int, table_width: int) -> "TuningConfig":
        """As `heuristic`, of tables of so many blocks: up to four rounds of CTAs, which even out unequal lengths.

        A CTA beyond the first round has at least 8 blocks to pay for its partial result.
        """
        ctas = 2 * NUM_SMS
        shares = min(max(1, ctas // units), table_width)
        for rounds in (2, 3, 4):
            more = ctas * rounds // units
            if more * 8 <= table_width:
                shares = max(shares, more)
        return cls(shares=shares, stages=1)


@functools.partial(jax.jit, static_argnames=("scale", "config", "chooser", "interpret"))
def attend_decode(
    q,
    k,
    v,
    ids_or_scores,
    block_table,
    seq_lens,
    *,
    scale: float,
    config: TuningConfig,
    interpret: Any,
    chooser: Chooser | None = None,
):
    """Attention [T, N, H] of q [T, N, H] to the pages of k and v [P, K, S, H] that block ids [T, K, C] choose.

    None for them means all blocks up to a row's own. With a chooser there are scores f32[B, W, blocks] instead, from
    which it chooses C blocks of each row; it returns these as well. Where blocks are chosen, C must be a multiple of
    config.shares where it is not less; there are no more shares than a cluster has queries to merge.
    """
    num_rows, num_heads, _ = q.shape
    num_pages, kv_heads, _, _ = k.shape
    num_sequences, table_width = block_table.shape
    num_queries = num_rows // num_sequences
    if chooser is not None:
        num_blocks = chooser.choice.top_k
    else:
        num_blocks = table_width if ids_or_scores is None else ids_or_scores.shape[2]
    group = num_heads // kv_heads
    height = _height(group)
    shares = min(config.shares, num_blocks)
    if ids_or_scores is not None:
        shares = min(shares, _most_clustered(group))
    most = -(-num_blocks // shares)
    if ids_or_scores is not None and num_blocks % shares:
        raise ValueError(f"shares={shares} must divide the {num_blocks} chosen blocks")
    if chooser is not None:
        blocks = ChosenBlocks(ids_or_scores, chooser, most, num_rows)
    else:
        blocks = AllBlocks(num_blocks, shares) if ids_or_scores is None else GivenBlocks(most, (ids_or_scores,))
    # A row of the table comes while the blocks are chosen, where it can be copied.
    tabled = chooser is not None and table_width % _TABLE_LINE == 0
    stages = min(config.stages, most)
    # Pages of a step: all that a share has, where there is room for them.
    together = most if most == stages else 1
    factor = scale * math.log2(math.e)
    dtype = q.dtype
    queries = q.reshape(num_rows, kv_heads, group, DIM)
    if height > group:
        queries = jnp.pad(queries, ((0, 0), (0, 0), (0, height - group), (0, 0)))
    # The shares of a row are a cluster, and merge what they have, where there are so few: of all blocks, CTAs are many.
    clustered = 1 < shares <= (MOST_CLUSTERED if ids_or_scores is None else _LARGEST_CLUSTER) and height % shares == 0
    apart = shares > 1 and not clustered
    # Queries that a CTA merges.
    each = height // shares

    def merge(row, head, part, out_gmem, sent_gmem, partial_smem, stats_smem, sent_smem, barrier):
        """Each CTA of a cluster merges its part of the queries, which all of them send to it."""
        if sent_gmem is None:
            sent = sent_smem
            cluster.send_parts(partial_smem, stats_smem, sent[0], sent[1], barrier, shares)
            cluster.wait(barrier)
        else:
            sent = [ref.at[row, head, part] for ref in sent_gmem]
            here = pl.ds(part * each, each)
            for to in range(shares):
                queries = pl.ds(to * each, each)
                sent_gmem[0][row, head, to, here] = load(partial_smem.at[queries], _BY_CHANNEL)
                for which in range(2):
                    stat = load(stats_smem.at[which, queries], _BY_CHANNEL.reduce(1))
                    sent_gmem[1][row, head, to, which, here] = stat
            meet(barrier)
        partials = load(sent[0], _BY_CHANNEL)
        stats = [load(sent[1].at[which], _BY_CHANNEL.reduce(1)) for which in range(2)]
        stats = [spread(stat, partials.shape, 0, _BY_CHANNEL) for stat in stats]
        partials, maxima, totals = ([x[i * each : (i + 1) * each] for i in range(shares)] for x in (partials, *stats))
        largest = functools.reduce(jnp.maximum, maxima)
        weights = [jnp.exp2((maximum - largest) * factor) for maximum in maxima]
        whole, acc = (
            functools.reduce(jnp.add, [weight * value for weight, value in zip(weights, values, strict=True)])
            for values in (totals, partials)
        )
        result = (acc * jnp.where(whole > 0, 1.0 / whole, 0.0)).astype(dtype)
        out_gmem[row, head, pl.ds(part * each, each)] = result

    def attend(
        q_gmem,
        k_gmem,
        v_gmem,
        table_gmem,
        lens_gmem,
        *rest,
    ):
        blocks_gmem, (out_gmem, *rest) = rest[: len(blocks.operands)], rest[len(blocks.operands) :]
        chosen_gmem, rest = rest[: len(blocks.results)], rest[len(blocks.results) :]
        stats_gmem, rest = (rest[0], rest[1:]) if apart else (None, rest)
        sent_gmem, rest = (rest[:2], rest[2:]) if clustered and interpret is not None else (None, rest)
        q_smem, k_smem, v_smem, weights_smem, stats_smem, q_barrier, k_barrier, v_barrier, *rest = rest
        blocks_smem, rest = rest[: len(blocks.scratch)], rest[len(blocks.scratch) :]
        line_smem, rest = (rest[:2], rest[2:]) if tabled else (None, rest)
        row, head, part = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("share")
        if clustered and interpret is None:
            cluster.expect(rest[-1], height * (DIM + 2))
        plgpu.copy_gmem_to_smem(q_gmem.at[row, head], q_smem, q_barrier)
        sequence, query = (f(row, jnp.int32(num_queries)) for f in (lax.div, lax.rem))
        if line_smem is not None:
            plgpu.copy_gmem_to_smem(table_gmem.at[sequence], *line_smem)
        position = lens_gmem[sequence] - num_queries + query
        own = jnp.where(position >= 0, lax.div(position, jnp.int32(PAGE_SIZE)), -1)
        place = Place(row, head, part, sequence, query, own)

        def page_of(block, line):
            # What a masked block's entry holds is no address.
            block = jnp.clip(block, 0, table_width - 1)
            index = [f(block, jnp.int32(_TABLE_LINE)) for f in (lax.div, lax.rem)] if tabled else [block]
            return jnp.clip(line[*index], 0, num_pages - 1)

        def load_k(page, slot):
            plgpu.copy_gmem_to_smem(k_gmem.at[page, head], k_smem.at[slot], k_barrier.at[slot])

        def load_v(page, slot):
            plgpu.copy_gmem_to_smem(v_gmem.at[page, head], v_smem.at[slot], v_barrier.at[slot])

        line = table_gmem.at[sequence]
        early, is_early = blocks.early(place), False
        if early is not None:
            # On its way while the others are chosen.
            is_early = jnp.logical_and(part == 0, own >= 0)
            early_page = page_of(early, line)

            @when(is_early)
            def _():
                load_k(early_page, 0)
                load_v(early_page, 0)

        count, block = blocks.walk(place, *blocks_gmem, *chosen_gmem, *blocks_smem)
        if line_smem is not None:
            plgpu.barrier_wait(line_smem[1])
            line = line_smem[0]

        def page(i):
            return page_of(block(i), line)

        def over_keys(value):
            return lax.broadcast_in_dim(value, (PAGE_SIZE, height), [1])

        # Before the first copy begins, so that none waits for the next one's page.
        first_pages = [page(jnp.int32(i)) for i in range(stages + (together == 1))]

        def step(i, carry):
            acc, largest, total, *next_page = carry
            # It takes as long as a step.
            pages_then = [page(i + stages + 1) for _ in next_page]
            slots = [lax.rem(i, jnp.int32(stages))] if together == 1 else list(range(together))

            def seen_of(i):
                is_used = jnp.logical_and(i < count, place.used(block(i)))
                return jnp.where(is_used, position + 1 - block(i) * PAGE_SIZE, 0)

            nums_seen = [seen_of(i * together + j) for j in range(together)]

            def mask(logits, num_seen):
                key = plgpu.broadcasted_iota(jnp.int32, (PAGE_SIZE, height), 0, layout=_WGMMA)
                return jnp.where(key < num_seen, logits, -jnp.inf)

            logits = []
            for slot, num_seen in zip(slots, nums_seen, strict=True):
                plgpu.barrier_wait(k_barrier.at[slot])

                def multiply_k(acc, slot=slot):
                    plgpu.wgmma(acc, k_smem.at[slot], q_smem.T)
                    return acc[...]

                of_page = pl.run_scoped(multiply_k, plgpu.ACC((PAGE_SIZE, height), jnp.float32))
                if together == 1:

                    @when(i + stages < count)
                    def _():
                        plgpu.commit_smem()  # every warp has read the page
                        load_k(next_page[0], slots[0])

                logits.append(cond(num_seen < PAGE_SIZE, mask, lambda logits, _: logits, of_page, num_seen))
            new_largest = jnp.maximum(largest, functools.reduce(jnp.maximum, logits).max(axis=0))
            # The difference first: scaled huge logits are not exact, and the largest must weigh 1.
            decay = over_keys(jnp.exp2((largest - new_largest) * factor))
            total = total * decay
            for j in range(together):
                weights = jnp.exp2((logits[j] - over_keys(new_largest)) * factor).astype(dtype)
                # Of what is multiplied: the rounding of equal weights then cancels.
                total = total + weights.astype(jnp.float32)
                # Every warp has multiplied with the weights before: the maxima above waited for all.
                weights_smem.at[j].T[...] = plgpu.layout_cast(weights, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            for slot, num_seen in zip(slots, nums_seen, strict=True):
                plgpu.barrier_wait(v_barrier.at[slot])

                @when(num_seen < PAGE_SIZE)
                def _(slot=slot, num_seen=num_seen):
                    # A weight of 0 does not silence a NaN in an unused slot.
                    key = plgpu.broadcasted_iota(jnp.int32, (_ROWS, DIM), 0, layout=_WGMMA)
                    for first in range(0, PAGE_SIZE, _ROWS):
                        rows = v_smem.at[slot, pl.ds(first, _ROWS)]
                        values = plgpu.load(rows, layout=_WGMMA)
                        rows[...] = jnp.where(key + first < num_seen, values, jnp.zeros_like(values))
                    plgpu.commit_smem()

            def multiply_v(acc):
                for j, slot in enumerate(slots):
                    plgpu.wgmma(acc, v_smem.at[slot].T, weights_smem.at[j].T)
                return acc[...]

            values = pl.run_scoped(multiply_v, plgpu.ACC((DIM, height), jnp.float32))
            acc = acc * decay + values
            if together == 1:

                @when(i + stages < count)
                def _():
                    plgpu.commit_smem()
                    load_v(next_page[0], slots[0])

            return acc, new_largest, total, *pages_then

        for i in range(stages):
            is_due = i < count if together == 1 else count > 0
            if i == 0 and early is not None:
                is_due = jnp.logical_and(is_due, jnp.logical_not(is_early))

            @when(is_due)
            def _(i=i):
                load_k(first_pages[i], i)
                load_v(first_pages[i], i)

        nothing = full((PAGE_SIZE, height), 0.0, jnp.float32, _WGMMA)
        largest = full((height,), _LOWEST, jnp.float32, _WGMMA.reduce(0))
        if clustered and interpret is None:
            cluster.all_expect()
        plgpu.barrier_wait(q_barrier)
        steps_over = count if together == 1 else (count > 0).astype(jnp.int32)
        carry = (nothing, largest, nothing, *first_pages[stages:])
        acc, largest, total, *_pages = lax.fori_loop(0, steps_over, step, carry)
        total = total.sum(axis=0)
        if clustered:
            partial_smem, *sent_smem, barrier = rest
            partial_smem.T[...] = plgpu.layout_cast(acc, plgpu.Layout.WGMMA_TRANSPOSED)
            stats_smem[0] = largest
            stats_smem[1] = total
            plgpu.commit_smem()
            merge(row, head, part, out_gmem, sent_gmem, partial_smem, stats_smem, sent_smem, barrier)
            return
        inverse = jnp.where(total > 0, 1.0 / total, 0.0)
        acc = acc * over_keys(inverse)
        # All queries and weights have been used, so the results leave from their places.
        high = acc.astype(dtype)
        q_smem.T[...] = plgpu.layout_cast(high, plgpu.Layout.WGMMA_TRANSPOSED)
        if stats_gmem is not None:
            low = (acc - high.astype(jnp.float32)).astype(dtype)
            weights_smem.at[0].T[...] = plgpu.layout_cast(low, plgpu.Layout.WGMMA_TRANSPOSED)
            stats_smem[0] = largest
            stats_smem[1] = total
        plgpu.commit_smem()
        if stats_gmem is not None:
            plgpu.copy_smem_to_gmem(q_smem, out_gmem.at[row, head, part, 0])
            plgpu.copy_smem_to_gmem(weights_smem.at[0], out_gmem.at[row, head, part, 1])
            for i in range(2):
                plgpu.copy_smem_to_gmem(stats_smem.at[i], stats_gmem.at[row, head, part, i])
        else:
            plgpu.copy_smem_to_gmem(q_smem, out_gmem.at[row, head])
        plgpu.wait_smem_to_gmem(0)

    partial = (num_rows, kv_heads, shares)
    if apart:
        room = round_up(shares, merging.TILE)
        out = [
            jax.ShapeDtypeStruct((*partial, 2, height, DIM), dtype),
            jax.ShapeDtypeStruct((num_rows, kv_heads, room, 2, height), jnp.float32),
        ]
    else:
        out = [jax.ShapeDtypeStruct((num_rows, kv_heads, height, DIM), dtype)]
    out[1:1] = blocks.results
    tile = plgpu.SMEM((height, DIM), dtype, transforms=TILING)
    page = plgpu.SMEM((stages, PAGE_SIZE, DIM), dtype, transforms=TILING)
    scratch = [
        tile,
        page,
        page,
        plgpu.SMEM((together, height, PAGE_SIZE), dtype, transforms=TILING),
        plgpu.SMEM((2, height), jnp.float32),
        plgpu.Barrier(),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
    ]
    scratch += blocks.scratch
    if tabled:
        block_table = block_table.reshape(num_sequences, -1, _TABLE_LINE)
        scratch += [plgpu.SMEM(block_table.shape[1:], jnp.int32), plgpu.Barrier()]
    grid, names, clusters = (num_rows, kv_heads, shares), ("row", "head", "share"), {}
    if clustered:
        grid, names, clusters = grid[:2], names[:2], {"cluster": (shares,), "cluster_names": ("share",)}
        sent = [(height, DIM), (2, height)]
        scratch.append(plgpu.SMEM(sent[0], jnp.float32))
        if interpret is None:
            scratch += [*(plgpu.SMEM(shape, jnp.float32) for shape in sent), cluster.MAILBOX]
        else:  # it knows clusters, but not the shared memory of others
            scratch.append(plgpu.ClusterBarrier(collective_axes=("share",)))
            out += [jax.ShapeDtypeStruct((*partial, *shape), jnp.float32) for shape in sent]
    if ids_or_scores is None:
        attend.__name__ = "attend_all"  # for profiles
    result, *others = plgpu.kernel(
        attend,
        out_type=out,
        grid=grid,
        grid_names=names,
        **clusters,
        scratch_types=scratch,
        # Without a barrier before and behind whatever is written.
        compiler_params=compiler_params(approx_math=True, unsafe_no_auto_barriers=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(queries, k, v, block_table, seq_lens, *blocks.operands)
    chosen, stats = (None, others) if chooser is None else (others[0], others[1:])
    if apart and shares <= _FEW_SHARES:
        result = _merge(result, stats[0], factor)
    elif apart:
        result = merging.merge_decode(result, stats[0], group=group, factor=factor, interpret=interpret)
    result = result[:, :, :group].reshape(num_rows, num_heads, DIM)
    return result if chooser is None else (result, chosen)


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
