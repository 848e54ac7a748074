"""The best blocks of every row of scores as Triton kernels.

A score and its block become one integer: the score's key (see `keys`) above the block's number, turned so that the
lower block is the larger integer. So no two are equal, and a bitonic network that keeps the largest k of them chooses
exactly.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import jax_triton  # pyright: ignore[reportMissingImports]
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Array, Float32, Int32

from pallas_kernels import triton_support
from pallas_kernels.index_topk import keys
from pallas_kernels.index_topk.shares import Shares
from pallas_kernels.index_topk.triton_score import count_own

# Keys of a program at a time.
_CHUNK = 1024
_PROGRAMS = 512
# Fewer rows than this do not fill a device, unless they are cut; shorter ones are not worth a second kernel.
_FEW_ROWS, _SHORT, _MOST_SPLITS = 32, 256, 16
_LAST = tl.constexpr(2**31 - 1)
_LARGEST = tl.constexpr(3.4028234663852886e38)
_INVISIBLE = tl.constexpr(keys.INVISIBLE)
_FORCED = tl.constexpr(keys.FORCED)
# Below what any block turns into; its key is that of an invisible one.
_NONE = tl.constexpr(-(2**63))


@dataclass(frozen=True)
class TuningConfig:
    """How the work is cut.

    rows: of a program. chunk: blocks that a program looks at together. splits: programs that share a row's blocks;
    if there are several, a second kernel chooses among their choices.
    """

    rows: int
    chunk: int
    splits: int
    num_warps: int

    @classmethod
    def heuristic(cls, num_rows: int, width: int, top_k: int) -> "TuningConfig":
        """Whole rows where there are many, parts of them where there are few and they are long."""
        padded = triton_support.power_of_two(max(width, top_k))
        if num_rows <= _FEW_ROWS and padded > _SHORT:
            chunk = min(max(padded // _MOST_SPLITS, _SHORT // 2, triton_support.power_of_two(top_k)), _CHUNK)
            return cls(1, chunk, min(-(-width // chunk), _MOST_SPLITS), num_warps=max(1, chunk // 256))
        chunk = min(padded, _CHUNK)
        rows = min(_CHUNK // chunk, triton_support.power_of_two(max(1, num_rows // _PROGRAMS)))
        return cls(rows, chunk, 1, num_warps=max(1, min(4, rows * chunk // 256)))


@dataclass(frozen=True)
class Choice:
    """What is chosen from rows of scores, each of a token and a head.

    Row r is token t = r // num_heads, at position positions[t // num_queries] + t % num_queries + shift.
    shares: the blocks that the columns stand for. with_keys: whether to return keys beside the blocks' numbers.
    """

    num_heads: int
    num_queries: int
    shift: int
    page_size: int
    shares: Shares
    top_k: int
    init_blocks: int
    local_blocks: int
    with_keys: bool = False


@triton.jit
def _packed(scores, block, num_blocks, INIT: tl.constexpr, LOCAL: tl.constexpr):
    # Finite, so that an overflowed score neither displaces a forced block nor counts as invisible, and with one zero.
    scores = tl.where(scores == scores, scores, -_LARGEST)
    scores = tl.minimum(tl.maximum(scores, -_LARGEST), _LARGEST)
    scores = tl.where(scores == 0, 0.0, scores)
    bits = scores.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & _LAST)
    key = tl.where((block < INIT) | (block >= num_blocks - LOCAL), _FORCED, key)
    key = tl.where(block < num_blocks, key, _INVISIBLE)
    return (key.to(tl.int64) << 32) | (block ^ _LAST).to(tl.int64)


@triton.jit
def _store(best, row, valid, out_ptr, TOP_K: tl.constexpr, WITH_KEYS: tl.constexpr):
    place = tl.arange(0, best.shape[1])
    key = (best >> 32).to(tl.int32)
    ids = tl.where(key > _INVISIBLE, (best & _LAST).to(tl.int32) ^ _LAST, -1)
    inside = valid[:, None] & (place[None, :] < TOP_K)
    if WITH_KEYS:
        start = row.to(tl.int64)[:, None] * (2 * TOP_K)
        tl.store(out_ptr + start + place[None, :], key, mask=inside)
        tl.store(out_ptr + start + TOP_K + place[None, :], ids, mask=inside)
    else:
        tl.store(out_ptr + row.to(tl.int64)[:, None] * TOP_K + place[None, :], ids, mask=inside)


@triton.jit
def _choose(
    scores_ptr,  # [num_rows, width]
    positions_ptr,  # [num_rows / HEADS / QUERIES]
    share_ptr,  # [1], read if there are several shares
    chosen_ptr,  # [num_rows, TOP_K] or [num_rows, 2, TOP_K]; of several SPLITS upper halves, [num_rows, SPLITS, KEPT]
    blocks_ptr,  # lower halves, [num_rows, SPLITS, KEPT]
    num_rows,
    width,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    SHIFT: tl.constexpr,
    PAGE: tl.constexpr,
    SHARES: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    TOP_K: tl.constexpr,
    KEPT: tl.constexpr,
    WITH_KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < num_rows
    token = row // HEADS
    position = tl.load(positions_ptr + token // QUERIES, mask=valid, other=-1) + token % QUERIES + SHIFT
    num_blocks = (tl.maximum(position, -1) + PAGE) // PAGE
    share = tl.load(share_ptr) if SHARES > 1 else 0
    most = count_own(tl.max(num_blocks, 0), share, SHARES)
    chunks = (most + CHUNK - 1) // CHUNK
    part = (chunks + SPLITS - 1) // SPLITS * CHUNK
    first = tl.program_id(1) * part
    end = tl.minimum(first + part, most)
    row_ptrs = scores_ptr + row.to(tl.int64) * width

    best = tl.full([ROWS, KEPT], _NONE, tl.int64)
    for start in range(first, end, CHUNK):
        column = start + tl.arange(0, CHUNK)
        block = column[None, :] * SHARES + share
        seen = valid[:, None] & (block < num_blocks[:, None])
        scores = tl.load(row_ptrs[:, None] + column[None, :], mask=seen, other=0.0)
        packed = _packed(scores, block, num_blocks[:, None], INIT, LOCAL)
        both = tl.join(best, tl.topk(packed, KEPT))
        best = tl.topk(tl.reshape(both, [ROWS, 2 * KEPT]), KEPT)

    if SPLITS == 1:
        _store(best, row, valid, chosen_ptr, TOP_K, WITH_KEYS)
    else:
        place = (row[:, None] * SPLITS + tl.program_id(1)) * KEPT + tl.arange(0, KEPT)[None, :]
        tl.store(chosen_ptr + place, (best >> 32).to(tl.int32), mask=valid[:, None])
        tl.store(blocks_ptr + place, (best & _LAST).to(tl.int32), mask=valid[:, None])


@triton.jit
def _choose_again(
    keys_ptr,  # [num_rows, CANDIDATES]
    blocks_ptr,  # the same
    chosen_ptr,  # [num_rows, TOP_K] or [num_rows, 2, TOP_K]
    TOP_K: tl.constexpr,
    KEPT: tl.constexpr,
    WITH_KEYS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) + tl.arange(0, 1)
    candidate = tl.arange(0, WIDTH)
    place = row[:, None] * CANDIDATES + candidate[None, :]
    inside = candidate[None, :] < CANDIDATES
    key = tl.load(keys_ptr + place, mask=inside, other=_INVISIBLE)
    block = tl.load(blocks_ptr + place, mask=inside, other=0)
    best = tl.topk((key.to(tl.int64) << 32) | block.to(tl.int64), KEPT)
    _store(best, row, row >= 0, chosen_ptr, TOP_K, WITH_KEYS)


def choose(
    scores: Float32[Array, "R width"],
    positions: Int32[Array, " n"],
    share: Int32[Array, " 1"],
    *,
    choice: Choice,
    config: TuningConfig,
) -> Int32[Array, "R ..."]:
    """Choose as `index_topk_prefill` does; scores of blocks that a row does not see may be anything.

    Returns the blocks' numbers [R, C], or with keys [R, 2, C] as `index_candidates_prefill` defines them.
    """
    num_rows, width = scores.shape
    top_k, splits = choice.top_k, config.splits
    kept = triton_support.power_of_two(top_k)
    out = jax.ShapeDtypeStruct((num_rows, 2, top_k) if choice.with_keys else (num_rows, top_k), jnp.int32)
    halves = (jax.ShapeDtypeStruct((num_rows, splits * kept), jnp.int32),) * 2
    # jax-triton has no optional results.
    unused = jax.ShapeDtypeStruct((1,), jnp.int32)
    first, second = jax_triton.triton_call(
        scores,
        positions,
        share,
        kernel=_choose,
        out_type=(out, unused) if splits == 1 else halves,
        num_rows=num_rows,
        width=width,
        grid=(-(-num_rows // config.rows), splits),
        name="index_choose",
        num_warps=config.num_warps,
        num_stages=1,
        HEADS=choice.num_heads,
        QUERIES=choice.num_queries,
        SHIFT=choice.shift,
        PAGE=choice.page_size,
        SHARES=choice.shares.number,
        INIT=choice.init_blocks,
        LOCAL=choice.local_blocks,
        TOP_K=top_k,
        KEPT=kept,
        WITH_KEYS=choice.with_keys,
        ROWS=config.rows,
        CHUNK=config.chunk,
        SPLITS=splits,
    )
    if splits == 1:
        return first
    return jax_triton.triton_call(
        first,
        second,
        kernel=_choose_again,
        out_type=out,
        grid=(num_rows,),
        name="index_choose_again",
        num_warps=1,
        num_stages=1,
        TOP_K=top_k,
        KEPT=kept,
        WITH_KEYS=choice.with_keys,
        CANDIDATES=splits * kept,
        WIDTH=triton_support.power_of_two(splits * kept),
    )
