"""Choice of the best blocks of a decode call on Hopper: exact top-k of each column of scores, one warpgroup a column.

A score becomes a key (`keys`), and a block's rank breaks ties. A warp takes the best of its blocks, every fourth one:
each lane sorts its few blocks into a list, and then, time and again: the largest of the first keys of the lists, the
lowest block that has it, and that lane goes on to its next. It stops short of k where the last that it gave is not
among the k best of all, which is the rule, since chosen blocks are spread over the warps. Of few candidates, such as
what the four warps have found, the place of each is the number of those that are better, all pairs at once. So it is
with what several CTAs found: up to 8 are a cluster, of which all send it to the first one, and more leave it to a
second kernel. A table of no more than 64 blocks begins there.
"""

# jax does not export every name of Mosaic GPU, and calls its transforms abstract.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_cluster as cluster
from pallas_kernels.hopper import MOST_CLUSTERED, PAGE_SIZE, round_up
from pallas_kernels.index_topk import keys
from pallas_kernels.index_topk.mosaic_gpu_lists import nothing
from pallas_kernels.index_topk.shares import Shares
from pallas_kernels.mosaic import compiler_params, full, load, meet, spread, when

_WARPS, _LANES = 4, 32
_LARGEST_CHUNK = 256
# Blocks of which all pairs are compared at once.
_FEW = 64
# Of 16 chosen blocks that may be anywhere one of four warps has so many or more in one case of a thousand.
_LIKELY = 11
# [rows, warps]: rows over a warp's lanes, so that a reduction over them is one instruction.
_LAYOUT = plgpu.Layout.TILED(plgpu.Tiling(((_LANES, _WARPS), (1,))), (-2,), (-3,), -1)
# [candidates, candidates]: the former over the warps and 8 lanes, the latter over 4 lanes and 4 registers of each.
_PAIRS = plgpu.Layout.TILED(plgpu.Tiling(((32, 16), (8, 4))), (-4,), (-2, -3), -1)


@dataclass(frozen=True)
class Choice:
    """What is chosen from a slab of scores, a table of a share's blocks x columns.

    Column c belongs to head c % num_heads of a token, and the token stands at the slab's position + shift +
    c // num_heads, negative when dead. Of the columns of a slab the first num_columns mean something.
    with_keys: return candidates (keys and numbers) instead of the numbers alone.
    """

    num_heads: int
    num_columns: int
    shares: Shares
    top_k: int
    init_blocks: int
    local_blocks: int
    shift: int = 0
    with_keys: bool = False

    def out_type(self, slabs: int) -> jax.ShapeDtypeStruct:
        """What is chosen for the columns of all slabs."""
        inner = (2, self.top_k) if self.with_keys else (self.top_k,)
        return jax.ShapeDtypeStruct((slabs, self.num_columns, *inner), jnp.int32)

    def block_of(self, rank: Any, blocks: int, share: Any) -> Any:
        """The blocks of ranks in a table of so many."""
        return jnp.where(rank >= 0, self.shares.block((blocks - 1) - rank, share), jnp.int32(-1))

    def write(self, out_gmem: Any, slab: Any, column: Any, key: Any, rank: Any, blocks: int, share: Any) -> None:
        """Write the best of a column, keys and ranks i32[top_k], of a table of so many blocks."""
        block = self.block_of(rank, blocks, share)
        if self.with_keys:
            out_gmem[slab, column, 0] = key
            out_gmem[slab, column, 1] = block
        else:
            out_gmem[slab, column] = block


@dataclass(frozen=True)
class TuningConfig:
    """chunk: blocks of a warp, of which a CTA has four."""

    CANDIDATES: ClassVar = {"chunk": (32, 64, 128, 256)}

    chunk: int = 256

    def __post_init__(self) -> None:
        few = self.chunk in (_LANES // _WARPS, _FEW // _WARPS)
        if not few and (self.chunk % _LANES or not _LANES <= self.chunk <= _LARGEST_CHUNK):
            raise ValueError(f"chunk={self.chunk} must be 8, 16, or a multiple of {_LANES} up to {_LARGEST_CHUNK}")

    def fitted(self, table_width: int) -> "TuningConfig":
        """No larger than a narrow table wants, and large enough for a cluster to see all of a wide one if it can."""
        if table_width <= _FEW:
            return TuningConfig(round_up(table_width, _LANES) // _WARPS)
        chunk = max(self.chunk, round_up(-(-table_width // (_WARPS * MOST_CLUSTERED)), _LANES))
        wanted = round_up(-(-table_width // _WARPS), _LANES)
        return TuningConfig(min(chunk, wanted, _LARGEST_CHUNK))

    @property
    def blocks(self) -> int:
        """Blocks of a CTA: a table of scores must have room for a multiple of them."""
        return self.chunk * _WARPS


@dataclass(frozen=True)
class Chooser:
    """A choice that the CTAs of another kernel make by themselves, with four warps, of all blocks of a table."""

    choice: Choice
    config: TuningConfig

    def operand(self, scores: Any) -> Any:
        """What the kernel is given for the scores f32[slabs, width, blocks]."""
        return _by_warp(scores, 1, self.config)

    def scratch(self) -> list[Any]:
        """What `choose` needs."""
        return [plgpu.SMEM((_candidates(self.choice.top_k, self.config),), jnp.int32)] * 3

    def first(self, own: Any) -> Any:
        """The block that comes first in a live row, given the row's own block, where that does not depend on scores."""
        if self.choice.init_blocks:
            return jnp.int32(0)
        if self.choice.local_blocks:
            return jnp.maximum(self._within(own) - (self.choice.local_blocks - 1), 0)
        return None

    def choose(self, scores_gmem: Any, slab: Any, column: Any, own: Any, scratch: Sequence[Any]) -> Any:
        """The chosen blocks i32[top_k] of a column, best first and -1 where there is none.

        own: the row's own block, negative in a dead row.
        """
        scores, blocks = scores_gmem.at[slab, column, 0], self.config.blocks
        _, rank = _best(scores, self._within(own), 0, blocks, 0, scratch, choice=self.choice, config=self.config)
        return self.choice.block_of(rank, blocks, 0)

    def _within(self, own: Any) -> Any:
        return jnp.minimum(own, self.choice.shares.table_width - 1)


def choose(scores, positions, share, *, choice: Choice, config: TuningConfig, interpret: Any):
    """Choose for each column: i32[slabs, choice.num_columns, top_k], or [..., 2, top_k] with keys.

    scores: f32[slabs, width, n * config.blocks]; what is invisible may hold anything. positions: i32[slabs].
    share: i32[1].
    """
    blocks = scores.shape[2]
    found = _choose_scores(scores, positions, share, choice=choice, config=config, interpret=interpret)
    if blocks <= config.blocks * MOST_CLUSTERED:
        return found[0]
    ctas = blocks // config.blocks
    return _choose_found(*found, share, choice=choice, blocks=blocks, ctas=ctas, interpret=interpret)


def _own_block(column, slab_position, choice: Choice):
    """The own block of a column; -1 in a dead row."""
    position = lax.div(column, jnp.int32(choice.num_heads)) + (slab_position + choice.shift)
    block = lax.div(jnp.maximum(position, 0), jnp.int32(PAGE_SIZE))
    return jnp.where(position >= 0, jnp.minimum(block, choice.shares.table_width - 1), jnp.int32(-1))


def _row(tiles: int):
    """Row numbers of so many tiles of 32 rows, one below the other, of all warps."""
    return plgpu.broadcasted_iota(jnp.int32, (tiles * _LANES, _WARPS), 0, layout=_LAYOUT)


def _tiles(values, first: int, end: int):
    return lax.slice(values, (first * _LANES, 0), (end * _LANES, _WARPS))


def _key(scores, block, own, choice: Choice):
    """Keys of scores of blocks, of the same shape, given the column's own block."""
    forced = block > own - choice.local_blocks
    if choice.init_blocks:
        forced = jnp.logical_or(forced, block < choice.init_blocks)
    key = jnp.where(jnp.logical_not(forced), keys.keys_of(scores), jnp.int32(keys.FORCED))
    return jnp.where(block <= own, key, jnp.int32(keys.INVISIBLE))


def _nothing(tiles: int):
    return nothing(tiles * _LANES, _WARPS, layout=_LAYOUT)


def _exchanged(earlier, later):
    """Entries (keys, ranks) of two places, the better one first; of equal keys the one that was."""
    swap = earlier[0] < later[0]
    return tuple(
        tuple(jnp.where(swap, a, b) for a, b in zip(*pair, strict=True))
        for pair in ((later, earlier), (earlier, later))
    )


def _sorted(entries):
    """Lists of each lane's entries, best first: those in even and those in odd places, keys and ranks [n * 32, 4] each.

    entries: keys and ranks of n tiles, the ranks of a lane in descending order. Neighbours change places where they are
    in the wrong order, those at even places and at odd ones in turn: each time all such pairs in one operation, and in
    a loop, since the kernel's code takes long to make.
    """
    count = entries[0].shape[0] // _LANES
    if count == 1:
        return entries, ()
    if count % 2:
        entries = tuple(jnp.concatenate(pair) for pair in zip(entries, _nothing(1), strict=True))
    half = (count + 1) // 2

    def places(parity):
        """Those of one parity, out of both."""
        pairs = (values.reshape(half, 2, _LANES, _WARPS) for values in entries)
        first, end = (0, parity, 0, 0), (half, parity + 1, _LANES, _WARPS)
        return tuple(lax.slice(pair, first, end).reshape(-1, _WARPS) for pair in pairs)

    def step(_, places):
        even, odd = _exchanged(*places)
        if half > 1:
            heads, tails = (tuple(_tiles(x, 0, half - 1) for x in odd), tuple(_tiles(x, 1, half) for x in even))
            heads, tails = _exchanged(heads, tails)
            even = tuple(jnp.concatenate([_tiles(x, 0, 1), tail]) for x, tail in zip(even, tails, strict=True))
            odd = tuple(jnp.concatenate([head, _tiles(x, half - 1, half)]) for x, head in zip(odd, heads, strict=True))
        return even, odd

    return lax.fori_loop(0, half, step, (places(0), places(1)))


def _winners(best, begin, end, found_smem):
    """Write keys and ranks of each warp's best of lists, best first: place j * 4 + warp has the j-th best.

    best: the lists without the first `begin` of all; returns them without the first `end`.
    A rank is distinct in a warp, larger for lower blocks, and 0 or more; invisible entries get -1.
    found_smem: i32[end * 4 or more] twice. A loop, since the kernel's code takes long to make.
    """
    half = best[0][0].shape[0] // _LANES

    def following(best):
        """The lists without their first entries."""
        even, odd = best
        rest = _nothing(1)
        if half > 1:
            rest = tuple(jnp.concatenate([_tiles(x, 1, half), no]) for x, no in zip(even, rest, strict=True))
        return (odd, rest) if odd else (rest, ())

    def over_rows(vector):
        return spread(vector, (_LANES, _WARPS), 1, _LAYOUT)

    def step(j, best):
        first_keys, first_ranks = (_tiles(values, 0, 1) for values in best[0])
        largest = first_keys.max(axis=0)
        rank = jnp.where(first_keys == over_rows(largest), first_ranks, jnp.int32(-1)).max(axis=0)
        gives = first_ranks == over_rows(rank)
        gives = jnp.concatenate([gives] * half) if half > 1 else gives
        place = pl.ds(j * _WARPS, _WARPS)
        found_smem[0][place] = largest
        found_smem[1][place] = _or_nothing(largest, rank)
        return jax.tree.map(lambda new, old: jnp.where(gives, new, old), following(best), best)

    return lax.fori_loop(begin, end, step, best)


def _or_nothing(key, rank):
    """Ranks, -1 of what is invisible."""
    return jnp.where(key > jnp.int32(keys.INVISIBLE), rank, jnp.int32(-1))


def _ranked(count: int, found_smem, places_smem, places: int, with_keys: bool):
    """Keys, or None, and ranks i32[places] of the best of candidates, best first.

    found_smem: keys and ranks i32[count or more] of the candidates; a rank is distinct, or -1 of what is invisible.
    places_smem: i32[count or more]. count: a multiple of 32. places: a multiple of 4.
    """

    def read(ref, shape, axis: int, layout: Any):
        """Along one axis of a shape."""
        return spread(load(ref.at[pl.ds(0, count)], layout.reduce(1 - axis)), shape, axis, layout)

    key, rank = (read(ref, (count, count), 0, _PAIRS) for ref in found_smem)
    other_key, other_rank = (read(ref, (count, count), 1, _PAIRS) for ref in found_smem)
    better = jnp.logical_or(other_key > key, jnp.logical_and(other_key == key, other_rank > rank))
    one, zero = (full((count, count), x, jnp.int32, _PAIRS) for x in (1, 0))
    places_smem.at[pl.ds(0, count)][...] = jnp.where(better, one, zero).sum(axis=1)
    plgpu.commit_smem()
    # Each warp looks for those at places of its own.
    shape = (count, places)
    wanted = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_LAYOUT)
    here = read(places_smem, shape, 0, _LAYOUT) == wanted

    def at_places(ref, otherwise):
        return jnp.where(here, read(ref, shape, 0, _LAYOUT), jnp.int32(otherwise)).max(axis=0)

    return at_places(found_smem[0], keys.INVISIBLE) if with_keys else None, at_places(found_smem[1], -1)


def _best_of_warps(entries, found_smem, places_smem, top_k: int, with_keys: bool):
    """As `_ranked`, of entries: keys and ranks i32[n * 32, 4], a column for each warp, ranks descending in a lane."""
    kept, likely = _kept(top_k), _LIKELY * top_k // 16
    lists = _sorted(entries)
    if kept > top_k or likely * _WARPS < top_k:
        _winners(lists, 0, kept, found_smem)
        plgpu.commit_smem()
        return _ranked(kept * _WARPS, found_smem, places_smem, top_k, with_keys)
    rest = (kept - likely) * _WARPS
    for ref, no in zip(found_smem, (keys.INVISIBLE, -1), strict=True):
        ref[pl.ds(likely * _WARPS, rest)] = full((rest,), no, jnp.int32, _LAYOUT.reduce(0))

    def look(state):
        begin, _open, lists, *_found = state

        @when(begin > 0)
        def _():
            plgpu.commit_smem()  # what was found before has been read

        end = jnp.where(begin == 0, jnp.int32(likely), jnp.int32(kept))
        lists = _winners(lists, begin, end, found_smem)
        plgpu.commit_smem()
        key, rank = _ranked(kept * _WARPS, found_smem, places_smem, top_k, with_keys)
        # What a warp still has is worse than the last that it gave.
        last = [(end - 1) * _WARPS + warp for warp in range(_WARPS)]
        is_among = [jnp.logical_and(places_smem[i] < top_k, found_smem[1][i] >= 0) for i in last]
        goes_on = jnp.logical_and(functools.reduce(jnp.logical_or, is_among), end < kept)
        return end, jnp.where(goes_on, jnp.int32(1), jnp.int32(0)), lists, *([key] if with_keys else []), rank

    empty = full((top_k,), 0, jnp.int32, _LAYOUT.reduce(0))
    state = (jnp.int32(0), jnp.int32(1), lists, *([empty] if with_keys else []), empty)
    _, _, _, *found = lax.while_loop(lambda state: state[1] > 0, look, state)
    return found[0] if with_keys else None, found[-1]


def _kept(top_k: int) -> int:
    """How many of the best each warp hands on: 32 of all four together at least."""
    return max(top_k, _LANES // _WARPS)


def _by_warp(scores, ctas: int, config: TuningConfig):
    """Scores f32[slabs, width, blocks] as the CTAs and their warps take them."""
    slabs, width, _ = scores.shape
    return scores.reshape(slabs, width, ctas, -1, *(() if config.blocks <= _FEW else (_WARPS,)))


def _candidates(top_k: int, config: TuningConfig) -> int:
    """Of which all pairs are compared in a CTA."""
    return config.blocks if config.blocks <= _FEW else _kept(top_k) * _WARPS


def _best(scores_gmem, own, first, blocks: int, share, scratch, *, choice: Choice, config, with_keys: bool = False):
    """Keys, or None, and ranks i32[top_k] of the best of a CTA's blocks, which begin at `first` of so many.

    scores_gmem: the CTA's, as `_by_warp` has them. own: the column's own block. scratch: i32[_candidates] thrice.
    """
    *found_smem, places_smem = scratch

    def entries(scores, block):
        block = block + first
        return _key(scores, choice.shares.block(block, share), own, choice), (blocks - 1) - block

    if config.blocks <= _FEW:
        layout = _PAIRS.reduce(1)
        row = plgpu.broadcasted_iota(jnp.int32, (config.blocks,), 0, layout=layout)
        key, rank = entries(load(scores_gmem, layout), row)
        for ref, values in zip(found_smem, (key, _or_nothing(key, rank)), strict=True):
            ref.at[pl.ds(0, config.blocks)][...] = values
        plgpu.commit_smem()
        return _ranked(config.blocks, found_smem, places_smem, choice.top_k, with_keys)
    warp = plgpu.broadcasted_iota(jnp.int32, (config.chunk, _WARPS), 1, layout=_LAYOUT)
    found = entries(load(scores_gmem, _LAYOUT), _row(config.chunk // _LANES) * _WARPS + warp)
    return _best_of_warps(found, found_smem, places_smem, choice.top_k, with_keys)


@functools.partial(jax.jit, static_argnames=("choice", "config", "interpret"))
def _choose_scores(scores, positions, share, *, choice: Choice, config: TuningConfig, interpret: Any):
    """The choice if a cluster has all blocks, else the CTAs' best: keys and ranks i32[slabs, columns, n, top_k].

    n is the number of CTAs, rounded up for `_choose_found`; what is beyond is left unwritten.
    """
    slabs, _, blocks = scores.shape
    ctas = blocks // config.blocks
    columns, top_k = choice.num_columns, choice.top_k
    clustered = 1 < ctas <= MOST_CLUSTERED
    apart = ctas > MOST_CLUSTERED
    # The interpreter knows clusters, but not the shared memory of others.
    through_gmem = clustered and interpret is not None
    in_cta = _candidates(top_k, config)
    in_cluster = round_up(ctas * top_k, _LANES) if clustered else 0

    def choose_scores(scores_gmem, positions_gmem, share_gmem, out_gmem, *refs):
        others = None
        if apart:
            others, refs = (out_gmem, refs[0]), refs[1:]
        elif through_gmem:
            others, refs = refs[:2], refs[2:]
        found_smem, places_smem, refs = refs[:2], refs[2], refs[3:]
        share = choice.shares.of(share_gmem)
        slab, column, cta = lax.axis_index("slab"), lax.axis_index("column"), lax.axis_index("cta")
        own = _own_block(column, positions_gmem[slab], choice)
        best = functools.partial(
            _best,
            scores_gmem.at[slab, column, cta],
            own,
            cta * config.blocks,
            blocks,
            share,
            (*found_smem, places_smem),
            choice=choice,
            config=config,
        )

        if ctas == 1:
            choice.write(out_gmem, slab, column, *best(with_keys=choice.with_keys), blocks, share)
            return
        if clustered and not through_gmem:
            cluster.expect(refs[-1], 2 * ctas * top_k, first_only=True)
        found = best(with_keys=True)
        if apart:
            assert others is not None
            others[0][slab, column, cta], others[1][slab, column, cta] = found
            return
        if others is not None:
            sent = [ref.at[slab, column] for ref in others]
            for ref, vector in zip(sent, found, strict=True):
                ref[pl.ds(cta * top_k, top_k)] = vector
            meet(refs[0])
        else:
            own_smem, sent, mailbox = refs[:2], refs[2:4], refs[4]
            for ref, vector in zip(own_smem, found, strict=True):
                ref[...] = vector
            plgpu.commit_smem()
            cluster.all_expect()
            for ref, to in zip(own_smem, sent, strict=True):
                cluster.send_to_first(ref, to, mailbox)

        @when(cta == 0)
        def _():
            if rest := in_cluster - ctas * top_k:
                for ref, no in zip(sent, (keys.INVISIBLE, -1), strict=True):
                    ref[pl.ds(ctas * top_k, rest)] = full((rest,), no, jnp.int32, _LAYOUT.reduce(0))
                plgpu.commit_smem()
            if not through_gmem:
                cluster.wait(refs[-1])
            found = _ranked(in_cluster, sent, places_smem, top_k, choice.with_keys)
            choice.write(out_gmem, slab, column, *found, blocks, share)

    if apart:
        padded = round_up(ctas * top_k, _WARPS * _LANES) // top_k
        out = [jax.ShapeDtypeStruct((slabs, columns, padded, top_k), jnp.int32)] * 2
    else:
        out = [choice.out_type(slabs)]
    grid: dict[str, Any] = {"grid": (slabs, columns, ctas), "grid_names": ("slab", "column", "cta")}
    scratch: list[Any] = [plgpu.SMEM((max(in_cta, in_cluster),), jnp.int32)] * 3
    if clustered:
        if through_gmem:
            out += [jax.ShapeDtypeStruct((slabs, columns, in_cluster), jnp.int32)] * 2
            scratch.append(plgpu.ClusterBarrier(collective_axes=("cta",)))
        else:
            scratch += [plgpu.SMEM((size,), jnp.int32) for size in (top_k, top_k, in_cluster, in_cluster)]
            scratch.append(cluster.MAILBOX)
        grid = {name: value[:2] for name, value in grid.items()} | {"cluster": (ctas,), "cluster_names": ("cta",)}
    return plgpu.kernel(
        choose_scores,
        out_type=out,
        **grid,
        scratch_types=scratch,
        # Else a barrier before and behind each thing that is written.
        compiler_params=compiler_params(unsafe_no_auto_barriers=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(_by_warp(scores, ctas, config), positions, share)


@functools.partial(jax.jit, static_argnames=("choice", "blocks", "ctas", "interpret"))
def _choose_found(all_keys, ranks, share, *, choice: Choice, blocks: int, ctas: int, interpret: Any):
    """The choice, out of what so many CTAs found in a table of so many blocks."""
    slabs, columns, padded, top_k = ranks.shape
    chunk = padded * top_k // _WARPS

    def choose_found(keys_gmem, ranks_gmem, share_gmem, out_gmem, *scratch):
        share = choice.shares.of(share_gmem)
        slab, column = lax.axis_index("slab"), lax.axis_index("column")
        warp = plgpu.broadcasted_iota(jnp.int32, (chunk, _WARPS), 1, layout=_LAYOUT)
        written = _row(chunk // _LANES) + warp * chunk < ctas * top_k
        found = tuple(load(ref.at[slab, column].T, _LAYOUT) for ref in (keys_gmem, ranks_gmem))
        entries = tuple(jnp.where(written, here, no) for here, no in zip(found, _nothing(chunk // _LANES), strict=True))
        found = _best_of_warps(entries, scratch[:2], scratch[2], top_k, choice.with_keys)
        choice.write(out_gmem, slab, column, *found, blocks, share)

    return plgpu.kernel(
        choose_found,
        out_type=choice.out_type(slabs),
        grid=(slabs, columns),
        grid_names=("slab", "column"),
        scratch_types=[plgpu.SMEM((_kept(top_k) * _WARPS,), jnp.int32)] * 3,
        compiler_params=compiler_params(unsafe_no_auto_barriers=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(*(values.reshape(slabs, columns, _WARPS, chunk) for values in (all_keys, ranks)), share)
