"""Choice of the best blocks on Hopper: exact top-k of each column of scores, one warp a column.

A score becomes an int32 that orders like it (NaN lowest, infinities as the largest finite numbers, one
zero), forced blocks the largest integer and invisible ones the smallest. Then, k times over: the largest
key, the lowest block that has it, and that block is struck out. The lanes of a warp lie along the blocks, so
that a reduction is one instruction.
"""

# jax does not export every name of Mosaic GPU, and calls its transforms abstract.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import PAGE_SIZE, round_up

# A warpgroup owns four columns, and each of its warps one of them.
_COLUMNS = 4
_LANES = 32
_LAYOUT = plgpu.Layout.TILED(plgpu.Tiling(((_LANES, _COLUMNS), (1,))), (-2,), (-3,), -1)
_SMALLEST, _LARGEST = -(2**31), 2**31 - 1
# The keys of the lowest and the largest finite float32, and of the infinities beyond them.
_LOWEST_FINITE, _LARGEST_FINITE, _INFINITY = -0x7F800000, 0x7F7FFFFF, 0x7F800000


@dataclass(frozen=True)
class Choice:
    """What is chosen from a slab of scores, a table of blocks x columns.

    Column c belongs to head c % num_heads of a token, and the token stands at the slab's position + shift +
    c // num_heads, negative when dead. Of the columns of a slab the first num_columns mean something.
    """

    num_heads: int
    num_columns: int
    table_width: int
    top_k: int
    init_blocks: int
    local_blocks: int
    shift: int = 0

    @property
    def groups(self) -> int:
        """Groups of four columns."""
        return -(-self.num_columns // _COLUMNS)


@dataclass(frozen=True)
class TuningConfig:
    """chunk: blocks held in registers at a time. warpgroups: of a CTA, each with its own four columns."""

    chunk: int = 512
    warpgroups: int = 4

    def __post_init__(self) -> None:
        if self.chunk % _LANES or not _LANES <= self.chunk <= 1024:
            raise ValueError(f"chunk={self.chunk} must be a multiple of {_LANES} up to 1024")
        if self.warpgroups not in (1, 2, 4):
            raise ValueError(f"warpgroups={self.warpgroups} must be 1, 2 or 4")

    @classmethod
    def for_decode(cls, table_width: int) -> "TuningConfig":
        """Few columns: one warpgroup a CTA, and many chunks where a long context is spread over CTAs."""
        return cls(chunk=1024 if table_width <= 1024 else 256, warpgroups=1)

    @classmethod
    def for_prefill(cls) -> "TuningConfig":
        """Many columns: smaller chunks leave room for more warpgroups on an SM."""
        return cls(chunk=512, warpgroups=4)

    def padded(self, table_width: int) -> int:
        """Blocks that a table of scores must have room for: whole chunks."""
        return round_up(table_width, self.chunk_of(table_width))

    def chunk_of(self, table_width: int) -> int:
        """The chunk, or less where the table is narrower."""
        return min(self.chunk, round_up(table_width, _LANES))


def choose(scores, positions, *, choice: Choice, spread: bool, config: TuningConfig, interpret: Any):
    """Choose for each column: i32[slabs, 4 * choice.groups, top_k].

    scores: f32[slabs, config.padded(table_width), width]; what is invisible may hold anything.
    positions: i32[slabs].
    spread: give each chunk its own CTA and choose among their winners in a second kernel, for few columns.
    """
    if spread and scores.shape[1] > config.chunk_of(choice.table_width):
        winners = _winners_of_chunks(scores, positions, choice=choice, config=config, interpret=interpret)
        return _choose_winners(*winners, positions, choice=choice, config=config, interpret=interpret)
    return _choose_columns(scores, positions, choice=choice, config=config, interpret=interpret)


def _own_blocks(slab_position, first_column, choice: Choice):
    """The own block of each of four columns, as scalars; -1 in a dead row."""

    def own(column):
        token = lax.div(first_column + column, jnp.int32(choice.num_heads))
        position = slab_position + choice.shift + token
        block = jnp.minimum(lax.div(jnp.maximum(position, 0), jnp.int32(PAGE_SIZE)), choice.table_width - 1)
        return jnp.where(position >= 0, block, -1)

    return [own(column) for column in range(_COLUMNS)]


def _over_columns(scalars):
    column = plgpu.broadcasted_iota(jnp.int32, (_COLUMNS,), 0, layout=_LAYOUT.reduce(0))
    first, second, third, fourth = scalars
    return jnp.where(column == 0, first, jnp.where(column == 1, second, jnp.where(column == 2, third, fourth)))


def _down(vector, rows: int):
    return lax.broadcast_in_dim(vector, (rows, _COLUMNS), [1])


def _keys(scores, block, own, choice: Choice):
    """Order-preserving int32 of scores [n, 4] of blocks i32[n, 4], given the own block of each column [4]."""
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    # Negative floats order backwards as integers; -0 would come out as -1 and is lifted to +0's 0.
    key = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
    key = jnp.where(key == -1, jnp.int32(0), key)
    # NaN: beyond the infinities; a negative one is clamped as it is.
    key = jnp.where(key > jnp.int32(_INFINITY), jnp.int32(_LOWEST_FINITE), key)
    key = jnp.minimum(jnp.maximum(key, jnp.int32(_LOWEST_FINITE)), jnp.int32(_LARGEST_FINITE))
    rows = block.shape[0]
    own = _down(own, rows)
    forced = block > own - choice.local_blocks
    if choice.init_blocks:
        forced = jnp.logical_or(forced, block < choice.init_blocks)
    key = jnp.where(forced, jnp.int32(_LARGEST), key)
    return jnp.where(block <= own, key, jnp.int32(_SMALLEST))


def _best(key, rank, top_k: int, emit):
    """Call emit(j, rank of the j-th best, its key) for the top_k best of each column, best first.

    rank: distinct in a column, larger for lower blocks, 0 or more. Once only struck or invisible entries are
    left, their key is the smallest integer and their rank means nothing.
    """
    rows = key.shape[0]
    for j in range(top_k):
        largest = key.max(axis=0)
        best = jnp.where(key == _down(largest, rows), rank, jnp.int32(-1)).max(axis=0)
        if j + 1 < top_k:
            key = jnp.where(rank == _down(best, rows), jnp.int32(_SMALLEST), key)
        emit(j, best, largest)


def _load_keys(scores_gmem, slab, first_column, first_block, chunk, own, choice: Choice):
    where = scores_gmem.at[slab, pl.ds(first_block, chunk), pl.ds(first_column, _COLUMNS)]
    scores = plgpu.load(where, layout=_LAYOUT, optimized=False)
    block = plgpu.broadcasted_iota(jnp.int32, (chunk, _COLUMNS), 0, layout=_LAYOUT) + first_block
    return _keys(scores, block, own, choice), (scores_gmem.shape[1] - 1) - block


def _of_candidates(keys, ranks, num_chunks, top_k: int):
    """Keys and ranks [n, 4] of the winners of `num_chunks` chunks; what lies beyond was never written."""
    row = plgpu.broadcasted_iota(jnp.int32, keys.shape, 0, layout=_LAYOUT)
    written = row < num_chunks * top_k
    # A rank must be distinct, so that a struck out entry is one entry.
    return jnp.where(written, keys, jnp.int32(_SMALLEST)), jnp.where(written, ranks, -2 - row)


@functools.partial(jax.jit, static_argnames=("choice", "config", "interpret"))
def _choose_columns(scores, positions, *, choice: Choice, config: TuningConfig, interpret: Any):
    slabs, blocks, _ = scores.shape
    groups = choice.groups
    warpgroups = min(config.warpgroups, groups)
    while groups % warpgroups:
        warpgroups -= 1
    chunk = config.chunk_of(choice.table_width)
    candidates = round_up(blocks // chunk * choice.top_k, _LANES)

    def choose_columns(scores_gmem, positions_gmem, out_gmem, keys_smem, ranks_smem):
        slab, wg = lax.axis_index("slab"), lax.axis_index("wg")
        first_column = (lax.axis_index("group") * warpgroups + wg) * _COLUMNS
        owns = _own_blocks(positions_gmem[slab], first_column, choice)
        own = _over_columns(owns)
        last = functools.reduce(jnp.maximum, owns)

        def emit(j, best, largest):
            ids = jnp.where(largest > jnp.int32(_SMALLEST), (blocks - 1) - best, jnp.int32(-1))
            out_gmem[slab, pl.ds(first_column, _COLUMNS), j] = ids

        def keys_of(first_block):
            return _load_keys(scores_gmem, slab, first_column, first_block, chunk, own, choice)

        if blocks == chunk:
            _best(*keys_of(0), choice.top_k, emit)
            return

        def winners(c, _):
            def keep(j, best, largest):
                keys_smem[wg, c * choice.top_k + j] = largest
                ranks_smem[wg, c * choice.top_k + j] = best

            _best(*keys_of(c * chunk), choice.top_k, keep)

        num_chunks = lax.div(last, jnp.int32(chunk)) + 1
        num_chunks = jnp.where(last >= 0, num_chunks, 0)
        lax.fori_loop(0, num_chunks, winners, None)
        keys = plgpu.load(keys_smem.at[wg], layout=_LAYOUT, optimized=False)
        ranks = plgpu.load(ranks_smem.at[wg], layout=_LAYOUT, optimized=False)
        _best(*_of_candidates(keys, ranks, num_chunks, choice.top_k), choice.top_k, emit)

    return plgpu.kernel(
        choose_columns,
        out_type=jax.ShapeDtypeStruct((slabs, groups * _COLUMNS, choice.top_k), jnp.int32),
        grid=(slabs, groups // warpgroups),
        grid_names=("slab", "group"),
        num_threads=warpgroups,
        thread_name="wg",
        scratch_types=[plgpu.SMEM((warpgroups, candidates, _COLUMNS), jnp.int32)] * 2,
        **({} if interpret is None else {"interpret": interpret}),
    )(scores, positions)


@functools.partial(jax.jit, static_argnames=("choice", "config", "interpret"))
def _winners_of_chunks(scores, positions, *, choice: Choice, config: TuningConfig, interpret: Any):
    """The top_k best of each chunk: keys and ranks i32[slabs, groups, n, 4]; none of invisible chunks."""
    slabs, blocks, _ = scores.shape
    groups = choice.groups
    chunk = config.chunk_of(choice.table_width)
    num_chunks = blocks // chunk

    def winners_of_chunks(scores_gmem, positions_gmem, keys_gmem, ranks_gmem):
        slab, group, c = lax.axis_index("slab"), lax.axis_index("group"), lax.axis_index("chunk")
        first_column = group * _COLUMNS
        owns = _own_blocks(positions_gmem[slab], first_column, choice)

        def emit(j, best, largest):
            keys_gmem[slab, group, c * choice.top_k + j] = largest
            ranks_gmem[slab, group, c * choice.top_k + j] = best

        @pl.when(functools.reduce(jnp.maximum, owns) >= c * chunk)
        def _():
            keys = _load_keys(scores_gmem, slab, first_column, c * chunk, chunk, _over_columns(owns), choice)
            _best(*keys, choice.top_k, emit)

    shape = (slabs, groups, round_up(num_chunks * choice.top_k, _LANES), _COLUMNS)
    return plgpu.kernel(
        winners_of_chunks,
        out_type=[jax.ShapeDtypeStruct(shape, jnp.int32)] * 2,
        grid=(slabs, groups, num_chunks),
        grid_names=("slab", "group", "chunk"),
        **({} if interpret is None else {"interpret": interpret}),
    )(scores, positions)


@functools.partial(jax.jit, static_argnames=("choice", "config", "interpret"))
def _choose_winners(keys, ranks, positions, *, choice: Choice, config: TuningConfig, interpret: Any):
    slabs, groups, _, _ = keys.shape
    chunk = config.chunk_of(choice.table_width)
    blocks = config.padded(choice.table_width)

    def choose_winners(keys_gmem, ranks_gmem, positions_gmem, out_gmem):
        slab, group = lax.axis_index("slab"), lax.axis_index("group")
        first_column = group * _COLUMNS
        last = functools.reduce(jnp.maximum, _own_blocks(positions_gmem[slab], first_column, choice))

        def emit(j, best, largest):
            ids = jnp.where(largest > jnp.int32(_SMALLEST), (blocks - 1) - best, jnp.int32(-1))
            out_gmem[slab, pl.ds(first_column, _COLUMNS), j] = ids

        num_chunks = jnp.where(last >= 0, lax.div(last, jnp.int32(chunk)) + 1, 0)
        keys = plgpu.load(keys_gmem.at[slab, group], layout=_LAYOUT, optimized=False)
        ranks = plgpu.load(ranks_gmem.at[slab, group], layout=_LAYOUT, optimized=False)
        _best(*_of_candidates(keys, ranks, num_chunks, choice.top_k), choice.top_k, emit)

    return plgpu.kernel(
        choose_winners,
        out_type=jax.ShapeDtypeStruct((slabs, groups * _COLUMNS, choice.top_k), jnp.int32),
        grid=(slabs, groups),
        grid_names=("slab", "group"),
        **({} if interpret is None else {"interpret": interpret}),
    )(keys, ranks, positions)
