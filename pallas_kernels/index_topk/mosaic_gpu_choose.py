"""Choice of the best blocks of a decode call on Hopper: exact top-k of each column of scores, one warp a column.

A score becomes a key (`keys`). A warpgroup holds the blocks of a chunk for four columns, and each of its warps those
of one, its lanes side by side along the blocks, so that a reduction is one instruction. Each lane sorts its few blocks
into a list. Then, k times over: the largest of the first keys of the lists, the lowest block that has it, and that
lane goes on to its next. What several warpgroups found goes through the same once more, in a list for each lane of what
they found in the same place. So does what several CTAs found: up to 8 are a cluster, whose first one takes it from the
others' shared memory, and more leave it to a second kernel.
"""

# jax does not export every name of Mosaic GPU, and calls its transforms abstract.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import PAGE_SIZE, round_up
from pallas_kernels.index_topk import keys
from pallas_kernels.index_topk.mosaic_gpu_lists import nothing
from pallas_kernels.index_topk.shares import Shares

# A warpgroup owns four columns, and each of its warps one of them.
_COLUMNS = 4
_LANES = 32
_LARGEST_CHUNK, _MOST_WARPGROUPS = 512, 4
# CTAs of a cluster that any Hopper GPU can run.
_MOST_CLUSTERED = 8
_LAYOUT = plgpu.Layout.TILED(plgpu.Tiling(((_LANES, _COLUMNS), (1,))), (-2,), (-3,), -1)


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

    @property
    def groups(self) -> int:
        """Groups of four columns."""
        return -(-self.num_columns // _COLUMNS)

    def out_type(self, slabs: int) -> jax.ShapeDtypeStruct:
        """What is chosen for the columns of all slabs."""
        inner = (2, self.top_k) if self.with_keys else (self.top_k,)
        return jax.ShapeDtypeStruct((slabs, self.groups * _COLUMNS, *inner), jnp.int32)

    def write(self, out_gmem: Any, slab: Any, first_column: Any, j: Any, key: Any, block: Any) -> None:
        """Write the j-th best of four columns, given its number in the table, which means nothing if invisible."""
        block = jnp.where(key > jnp.int32(keys.INVISIBLE), block, jnp.int32(-1))
        columns = pl.ds(first_column, _COLUMNS)
        if self.with_keys:
            out_gmem[slab, columns, 0, j] = key
            out_gmem[slab, columns, 1, j] = block
        else:
            out_gmem[slab, columns, j] = block


@dataclass(frozen=True)
class TuningConfig:
    """chunk: blocks of a warpgroup. warpgroups: of a CTA, each with its own chunk of the same four columns."""

    CANDIDATES: ClassVar = {"chunk": (64, 128, 256), "warpgroups": (1, 4)}

    # Several CTAs rather than warpgroups, which take turns in an SM: 3.7 us instead of 4.7 for 1,024 blocks of an H200.
    chunk: int = 256
    warpgroups: int = 1

    def __post_init__(self) -> None:
        if self.chunk % _LANES or not _LANES <= self.chunk <= _LARGEST_CHUNK:
            raise ValueError(f"chunk={self.chunk} must be a multiple of {_LANES} up to {_LARGEST_CHUNK}")
        if self.warpgroups not in (1, 2, 4):
            raise ValueError(f"warpgroups={self.warpgroups} must be 1, 2 or 4")

    def fitted(self, table_width: int) -> "TuningConfig":
        """No larger than a narrow table wants, and large enough for a cluster to see all of a wide one if it can."""
        chunk = min(self.chunk, round_up(table_width, _LANES))
        warpgroups = self.warpgroups
        while warpgroups > 1 and chunk * warpgroups // 2 >= table_width:
            warpgroups //= 2
        while warpgroups < _MOST_WARPGROUPS and chunk * warpgroups * _MOST_CLUSTERED < table_width:
            warpgroups *= 2
        while chunk < _LARGEST_CHUNK and chunk * warpgroups * _MOST_CLUSTERED < table_width:
            chunk = min(2 * chunk, _LARGEST_CHUNK)
        return TuningConfig(chunk, warpgroups)

    @property
    def blocks(self) -> int:
        """Blocks of a CTA: a table of scores must have room for a multiple of them."""
        return self.chunk * self.warpgroups


def choose(scores, positions, share, *, choice: Choice, config: TuningConfig, interpret: Any):
    """Choose for each column: i32[slabs, 4 * choice.groups, top_k], or [..., 2, top_k] with keys.

    scores: f32[slabs, n * config.blocks, width]; what is invisible may hold anything. positions: i32[slabs].
    share: i32[1].
    """
    if scores.shape[1] <= config.blocks * _MOST_CLUSTERED:
        return _choose_scores(scores, positions, share, choice=choice, config=config, interpret=interpret)
    found = _choose_scores(scores, positions, share, choice=choice, config=config, interpret=interpret)
    blocks = scores.shape[1]
    return _choose_found(*found, positions, share, choice=choice, config=config, blocks=blocks, interpret=interpret)


def _own_block(column, slab_position, choice: Choice):
    """The own block of columns, one or several; -1 in a dead row."""
    position = lax.div(column, jnp.int32(choice.num_heads)) + (slab_position + choice.shift)
    block = lax.div(jnp.maximum(position, 0), jnp.int32(PAGE_SIZE))
    return jnp.where(position >= 0, jnp.minimum(block, choice.shares.table_width - 1), jnp.int32(-1))


def _own_blocks(slab_position, first_column, choice: Choice):
    """The own blocks of four columns: as a vector, and the last of them as a scalar."""
    column = plgpu.broadcasted_iota(jnp.int32, (_COLUMNS,), 0, layout=_LAYOUT.reduce(0)) + first_column
    return tuple(_own_block(which, slab_position, choice) for which in (column, first_column + (_COLUMNS - 1)))


def _over_rows(vector, like):
    return lax.broadcast_in_dim(vector, like.shape, [1])


def _row(tiles: int):
    """Row numbers of so many tiles of 32 rows and 4 columns, one below the other."""
    return plgpu.broadcasted_iota(jnp.int32, (tiles * _LANES, _COLUMNS), 0, layout=_LAYOUT)


def _tiles(values, first: int, end: int):
    return lax.slice(values, (first * _LANES, 0), (end * _LANES, _COLUMNS))


def _load(ref):
    return plgpu.load(ref, layout=_LAYOUT, optimized=False)


def _key(scores, block, own, choice: Choice):
    """Keys of scores [n, 4] of blocks i32[n, 4], given the own block of each column [4]."""
    own = _over_rows(own, block)
    forced = block > own - choice.local_blocks
    if choice.init_blocks:
        forced = jnp.logical_or(forced, block < choice.init_blocks)
    key = jnp.where(forced, jnp.int32(keys.FORCED), keys.keys_of(scores))
    return jnp.where(block <= own, key, jnp.int32(keys.INVISIBLE))


def _nothing(tiles: int):
    return nothing(tiles * _LANES, _COLUMNS)


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
        pairs = (values.reshape(half, 2, _LANES, _COLUMNS) for values in entries)
        first, end = (0, parity, 0, 0), (half, parity + 1, _LANES, _COLUMNS)
        return tuple(lax.slice(pair, first, end).reshape(-1, _COLUMNS) for pair in pairs)

    def step(_, places):
        even, odd = _exchanged(*places)
        if half > 1:
            heads, tails = (tuple(_tiles(x, 0, half - 1) for x in odd), tuple(_tiles(x, 1, half) for x in even))
            heads, tails = _exchanged(heads, tails)
            even = tuple(jnp.concatenate([_tiles(x, 0, 1), tail]) for x, tail in zip(even, tails, strict=True))
            odd = tuple(jnp.concatenate([head, _tiles(x, half - 1, half)]) for x, head in zip(odd, heads, strict=True))
        return even, odd

    return lax.fori_loop(0, half, step, (places(0), places(1)))


def _take(best, top_k: int, emit, state=None):
    """state = emit(state, j, largest key, its rank) for the top_k best of each column, both i32[4], best first.

    A rank is distinct in a column, larger for lower blocks, and 0 or more. Once only invisible entries are left their
    ranks mean nothing. A loop, since the kernel's code takes long to make.
    """
    half = best[0][0].shape[0] // _LANES

    def following(best):
        """The lists without their first entries."""
        even, odd = best
        rest = _nothing(1)
        if half > 1:
            rest = tuple(jnp.concatenate([_tiles(x, 1, half), no]) for x, no in zip(even, rest, strict=True))
        return (odd, rest) if odd else (rest, ())

    def step(j, carry):
        best, state = carry
        first_keys, first_ranks = (_tiles(values, 0, 1) for values in best[0])
        largest = first_keys.max(axis=0)
        is_largest = first_keys == _over_rows(largest, first_keys)
        rank = jnp.where(is_largest, first_ranks, jnp.int32(-1)).max(axis=0)
        gives = first_ranks == _over_rows(rank, first_ranks)
        gives = jnp.concatenate([gives] * half) if half > 1 else gives
        best = jax.tree.map(lambda new, old: jnp.where(gives, new, old), following(best), best)
        return best, emit(state, j, largest, rank)

    return lax.fori_loop(0, top_k, step, (best, state))[1]


def _winners(best, top_k: int):
    """Keys and ranks of the top_k best in registers: lane j has the j-th best, and the others invisible ones."""
    lane = _row(1)

    def keep(state, j, largest, rank):
        return tuple(
            jnp.where(lane == j, _over_rows(new, old), old) for new, old in zip((largest, rank), state, strict=True)
        )

    return _take(best, top_k, keep, _nothing(1))


@functools.partial(jax.jit, static_argnames=("choice", "config", "interpret"))
def _choose_scores(scores, positions, share, *, choice: Choice, config: TuningConfig, interpret: Any):
    """The choice if a cluster has all blocks, else the CTAs' winners: keys and ranks i32[slabs, groups, n, 32, 4]."""
    slabs, blocks, _ = scores.shape
    chunk, warpgroups = config.chunk, config.warpgroups
    ctas = blocks // config.blocks
    clustered = 1 < ctas <= _MOST_CLUSTERED
    apart = ctas > _MOST_CLUSTERED
    # The interpreter knows clusters, but not the shared memory of others.
    through_gmem = clustered and interpret is not None

    def choose_scores(scores_gmem, positions_gmem, share_gmem, out_gmem, *refs):
        found_gmem, refs = (refs[:2], refs[2:]) if through_gmem else (None, refs)
        if apart:
            found_gmem, refs = (out_gmem, refs[0]), refs[1:]
        keys_smem, ranks_smem, barrier, *refs = refs
        share = choice.shares.of(share_gmem)
        slab, group, cta = lax.axis_index("slab"), lax.axis_index("group"), lax.axis_index("cta")
        wg = lax.axis_index("wg")
        first_column = group * _COLUMNS
        own, last_own = _own_blocks(positions_gmem[slab], first_column, choice)

        def entries():
            first_block = cta * config.blocks + wg * chunk
            scores = _load(scores_gmem.at[slab, pl.ds(first_block, chunk), pl.ds(first_column, _COLUMNS)])
            block = _row(chunk // _LANES) + first_block
            return _key(scores, choice.shares.block(block, share), own, choice), (blocks - 1) - block

        def write(best):
            def emit(_, j, key, rank):
                block = choice.shares.block((blocks - 1) - rank, share)
                choice.write(out_gmem, slab, first_column, j, key, block)

            _take(best, choice.top_k, emit)

        def finish(best):
            if ctas == 1:
                write(best)
            elif found_gmem is not None:
                found_gmem[0][slab, group, cta], found_gmem[1][slab, group, cta] = _winners(best, choice.top_k)
            else:
                refs[0][...], refs[1][...] = _winners(best, choice.top_k)

        def go():
            best = _sorted(entries())
            if warpgroups == 1:
                finish(best)
                return
            keys_smem.at[wg][...], ranks_smem.at[wg][...] = _winners(best, choice.top_k)
            plgpu.commit_smem()
            plgpu.barrier_arrive(barrier)

            @pl.when(wg == 0)
            def _():
                plgpu.barrier_wait(barrier)
                finish(_sorted(tuple(_load(ref).reshape(-1, _COLUMNS) for ref in (keys_smem, ranks_smem))))

        def merge():
            """The first CTA of a cluster takes what all have found."""

            def found(i, which):
                if found_gmem is not None:
                    return _load(found_gmem[which].at[slab, group, i])
                return _load(plgpu.cluster_ref(refs[which], {"cta": i}))

            barrier = refs[-1]
            plgpu.commit_smem()
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)

            @pl.when(cta == 0)
            def _():
                write(_sorted(tuple(jnp.concatenate([found(i, which) for i in range(ctas)]) for which in range(2))))

            # Nobody leaves before that has been read.
            plgpu.commit_smem()
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)

        if apart:
            pl.when(choice.shares.count(last_own + 1, share) > cta * config.blocks)(go)
            return
        # Whatever is visible: the position is not waited for before scores are read.
        go()
        if clustered:
            pl.when(wg == 0)(merge)

    found = jax.ShapeDtypeStruct((slabs, choice.groups, ctas, _LANES, _COLUMNS), jnp.int32)
    out = [found, found] if apart else [choice.out_type(slabs), *([found, found] if through_gmem else [])]
    scratch = [
        plgpu.SMEM((warpgroups, _LANES, _COLUMNS), jnp.int32),
        plgpu.SMEM((warpgroups, _LANES, _COLUMNS), jnp.int32),
        plgpu.Barrier(num_arrivals=warpgroups),
    ]
    grid: dict[str, Any] = {"grid": (slabs, choice.groups, ctas), "grid_names": ("slab", "group", "cta")}
    if clustered:
        if not through_gmem:
            scratch += [plgpu.SMEM((_LANES, _COLUMNS), jnp.int32)] * 2
        scratch.append(plgpu.ClusterBarrier(collective_axes=("cta",)))
        grid = {name: value[:2] for name, value in grid.items()} | {"cluster": (ctas,), "cluster_names": ("cta",)}
    chosen = plgpu.kernel(
        choose_scores,
        out_type=out,
        **grid,
        num_threads=warpgroups,
        thread_name="wg",
        scratch_types=scratch,
        # Else a barrier before and behind each thing that is written.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(scores, positions, share)
    return chosen if apart else chosen[0]


@functools.partial(jax.jit, static_argnames=("choice", "config", "blocks", "interpret"))
def _choose_found(
    all_keys, ranks, positions, share, *, choice: Choice, config: TuningConfig, blocks: int, interpret: Any
):
    """The choice, out of the winners of the CTAs of a table of so many blocks."""
    slabs, groups, ctas, _, _ = all_keys.shape

    def choose_found(keys_gmem, ranks_gmem, positions_gmem, share_gmem, out_gmem):
        share = choice.shares.of(share_gmem)
        slab, group = lax.axis_index("slab"), lax.axis_index("group")
        first_column = group * _COLUMNS
        last_own = _own_block(first_column + (_COLUMNS - 1), positions_gmem[slab], choice)
        visible = choice.shares.count(last_own + 1, share)
        found = tuple(_load(ref.at[slab, group]).reshape(-1, _COLUMNS) for ref in (keys_gmem, ranks_gmem))
        # A CTA that saw nothing wrote nothing. A rank must be distinct where it counts.
        written = lax.div(_row(ctas), jnp.int32(_LANES)) * config.blocks < visible
        entries = tuple(jnp.where(written, here, no) for here, no in zip(found, _nothing(ctas), strict=True))

        def emit(_, j, key, rank):
            block = choice.shares.block((blocks - 1) - rank, share)
            choice.write(out_gmem, slab, first_column, j, key, block)

        _take(_sorted(entries), choice.top_k, emit)

    return plgpu.kernel(
        choose_found,
        out_type=choice.out_type(slabs),
        grid=(slabs, groups),
        grid_names=("slab", "group"),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(all_keys, ranks, positions, share)
