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
from pallas_kernels.index_topk.mosaic_gpu_lists import insert
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


def _own_blocks(slab_position, first_column, choice: Choice):
    """The own block of each of four columns, as scalars; -1 in a dead row."""

    def own(column):
        token = lax.div(first_column + column, jnp.int32(choice.num_heads))
        position = slab_position + choice.shift + token
        block = lax.div(jnp.maximum(position, 0), jnp.int32(PAGE_SIZE))
        block = jnp.minimum(block, choice.shares.table_width - 1)
        return jnp.where(position >= 0, block, -1)

    return [own(column) for column in range(_COLUMNS)]


def _over_columns(scalars):
    column = plgpu.broadcasted_iota(jnp.int32, (_COLUMNS,), 0, layout=_LAYOUT.reduce(0))
    first, second, third, fourth = scalars
    return jnp.where(column == 0, first, jnp.where(column == 1, second, jnp.where(column == 2, third, fourth)))


def _over_lanes(vector):
    return lax.broadcast_in_dim(vector, (_LANES, _COLUMNS), [1])


def _lane():
    return plgpu.broadcasted_iota(jnp.int32, (_LANES, _COLUMNS), 0, layout=_LAYOUT)


def _load(ref):
    return plgpu.load(ref, layout=_LAYOUT, optimized=False)


def _key(scores, block, own, choice: Choice):
    """Keys of scores [32, 4] of blocks i32[32, 4], given the own block of each column [4]."""
    own = _over_lanes(own)
    forced = block > own - choice.local_blocks
    if choice.init_blocks:
        forced = jnp.logical_or(forced, block < choice.init_blocks)
    key = jnp.where(forced, jnp.int32(keys.FORCED), keys.keys_of(scores))
    return jnp.where(block <= own, key, jnp.int32(keys.INVISIBLE))


def _sorted(entries):
    """Each lane's entries (key, rank) [32, 4], given in descending order of their ranks, as a list."""
    entries = list(entries)
    best = ((), ())
    for key, rank in entries:
        best = insert(best, key, rank, len(entries))
    return best


def _take(best, top_k: int, emit, state=None):
    """state = emit(state, j, largest key, its rank) for the top_k best of each column, both i32[4], best first.

    A rank is distinct in a column, larger for lower blocks, and 0 or more. Once only invisible entries are left their
    ranks mean nothing. A loop, since the kernel's code takes long to make.
    """

    def step(j, carry):
        (all_keys, ranks), state = carry
        largest = all_keys[0].max(axis=0)
        rank = jnp.where(all_keys[0] == _over_lanes(largest), ranks[0], jnp.int32(-1)).max(axis=0)
        gives = ranks[0] == _over_lanes(rank)
        all_keys, ranks = (
            tuple(
                jnp.where(gives, following, here)
                for here, following in zip(values, (*values[1:], nothing), strict=True)
            )
            for values, nothing in ((all_keys, jnp.int32(keys.INVISIBLE)), (ranks, jnp.int32(-1)))
        )
        return (all_keys, ranks), emit(state, j, largest, rank)

    return lax.fori_loop(0, top_k, step, (best, state))[1]


def _winners(best, top_k: int):
    """Keys and ranks of the top_k best in registers: lane j has the j-th best, and the others invisible ones."""
    lane = _lane()
    nothing = tuple(jnp.where(lane < 0, 0, jnp.int32(value)) for value in (keys.INVISIBLE, -1))

    def keep(state, j, largest, rank):
        return tuple(
            jnp.where(lane == j, _over_lanes(new), old) for new, old in zip((largest, rank), state, strict=True)
        )

    return _take(best, top_k, keep, nothing)


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
        owns = _own_blocks(positions_gmem[slab], first_column, choice)
        visible = choice.shares.count(functools.reduce(jnp.maximum, owns) + 1, share)

        def entries(own):
            first_block = cta * config.blocks + wg * chunk
            columns = pl.ds(first_column, _COLUMNS)
            # All of them, before the first is waited for.
            tiles = [
                _load(scores_gmem.at[slab, pl.ds(first_block + i * _LANES, _LANES), columns])
                for i in range(chunk // _LANES)
            ]
            for i, tile in enumerate(tiles):
                block = _lane() + (first_block + i * _LANES)
                yield _key(tile, choice.shares.block(block, share), own, choice), (blocks - 1) - block

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
            best = _sorted(entries(_over_columns(owns)))
            if warpgroups == 1:
                finish(best)
                return
            keys_smem.at[wg][...], ranks_smem.at[wg][...] = _winners(best, choice.top_k)
            plgpu.commit_smem()
            plgpu.barrier_arrive(barrier)

            @pl.when(wg == 0)
            def _():
                plgpu.barrier_wait(barrier)
                found = [(_load(keys_smem.at[i]), _load(ranks_smem.at[i])) for i in range(warpgroups)]
                finish(_sorted(found))

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
                write(_sorted((found(i, 0), found(i, 1)) for i in range(ctas)))

            # Nobody leaves before that has been read.
            plgpu.commit_smem()
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)

        if apart:
            pl.when(visible > cta * config.blocks)(go)
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
        last = functools.reduce(jnp.maximum, _own_blocks(positions_gmem[slab], first_column, choice))
        visible = choice.shares.count(last + 1, share)
        found = [(_load(keys_gmem.at[slab, group, i]), _load(ranks_gmem.at[slab, group, i])) for i in range(ctas)]

        def entries():
            for i, (key, rank) in enumerate(found):
                # A CTA that saw nothing wrote nothing. A rank must be distinct where it counts.
                written = _lane() * 0 + visible > i * config.blocks
                yield jnp.where(written, key, jnp.int32(keys.INVISIBLE)), jnp.where(written, rank, jnp.int32(-1))

        def emit(_, j, key, rank):
            block = choice.shares.block((blocks - 1) - rank, share)
            choice.write(out_gmem, slab, first_column, j, key, block)

        _take(_sorted(entries()), choice.top_k, emit)

    return plgpu.kernel(
        choose_found,
        out_type=choice.out_type(slabs),
        grid=(slabs, groups),
        grid_names=("slab", "group"),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(all_keys, ranks, positions, share)
