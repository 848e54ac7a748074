"""Attention of every row to its chosen blocks as Triton kernels: a program walks over the blocks of a (row, KV head).

With few rows several programs share the blocks, and a second kernel merges what they found. The softmax is in base 2.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import jax_triton  # pyright: ignore[reportMissingImports]
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Array, Float, Int32

from pallas_kernels import triton_support

_LOG2_E = 1.4426950408889634
# Below every logit, and finite: the difference of two infinities would be NaN.
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_PROGRAMS = 512


@dataclass(frozen=True)
class TuningConfig:
    """How the work is cut.

    keys: of one step, a page or a part of it. splits: programs that share the steps of a (row, KV head).
    """

    keys: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def for_decode(cls, units: int, top_k: int, page_size: int) -> "TuningConfig":
        """As many programs as fill the device a few times; `units` are (row, KV head)."""
        keys = min(page_size, 64)
        steps = top_k * (page_size // keys)
        splits = min(triton_support.power_of_two(steps), max(1, _PROGRAMS // units))
        return cls(keys, 1 << (splits.bit_length() - 1))

    @classmethod
    def for_prefill(cls, page_size: int) -> "TuningConfig":
        """One program for each (row, KV head): there are thousands."""
        return cls(min(page_size, 64))


@triton.jit
def _attend(
    q_ptr,  # [T, KV_HEADS, GROUP, DIM]
    k_ptr,  # [P, KV_HEADS, PAGE, DIM]
    v_ptr,  # the same
    ids_ptr,  # [T, KV_HEADS, CHOSEN]
    table_ptr,  # [B, table_width]
    sequences_ptr,  # [T] of a prefill call
    positions_ptr,  # [T] of a prefill call, sequences' lengths [B] of a decode call
    out_ptr,  # [T, KV_HEADS, GROUP, DIM], or the sums of SPLITS programs, [T, KV_HEADS, SPLITS, GROUP, DIM]
    stats_ptr,  # largest logit and total weight of SPLITS programs, [T, KV_HEADS, SPLITS, 2, GROUP]
    table_width,
    factor,
    QUERIES: tl.constexpr,  # tokens a sequence of a decode call, else 0
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    CHOSEN: tl.constexpr,
    SPLITS: tl.constexpr,
):
    PARTS: tl.constexpr = PAGE // KEYS
    STEPS: tl.constexpr = CHOSEN * PARTS
    SHARE: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    # Programs of one head run at a time: of its pages more fit into the L2 cache.
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    unit = token * KV_HEADS + kv_head
    if QUERIES:
        sequence = token // QUERIES
        position = tl.load(positions_ptr + sequence) - QUERIES + (token % QUERIES).to(tl.int32)
    else:
        sequence = tl.load(sequences_ptr + token).to(tl.int64)
        position = tl.load(positions_ptr + token)
    num_blocks = (tl.maximum(position, -1) + PAGE) // PAGE
    first = split * SHARE
    end = tl.where(position >= 0, tl.minimum(first + SHARE, STEPS), first)

    row = tl.arange(0, ROWS)
    channel = tl.arange(0, DIM)
    key = tl.arange(0, KEYS)
    real = row < GROUP
    q_offsets = (unit * GROUP + row[:, None]) * DIM + channel[None, :]
    q = tl.load(q_ptr + q_offsets, mask=real[:, None], other=0.0)
    pages_ptr = table_ptr + sequence * table_width

    largest = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, DIM], tl.float32)
    for step in range(first, end):
        block = tl.load(ids_ptr + unit * CHOSEN + step // PARTS)
        chosen = (block >= 0) & (block < num_blocks)
        block = tl.where(chosen, block, 0)
        page = tl.load(pages_ptr + block).to(tl.int64)
        slot = (step % PARTS) * KEYS + key
        seen = block * PAGE + slot <= tl.where(chosen, position, -1)
        start = (page * KV_HEADS + kv_head) * (PAGE * DIM)
        # What is not seen is not read either: in an unused slot it may be NaN.
        k = tl.load(k_ptr + start + slot[None, :] * DIM + channel[:, None], mask=seen[None, :], other=0.0)
        dots = tl.where(seen[None, :], tl.dot(q, k), float("-inf"))
        larger = tl.maximum(largest, tl.max(dots, 1))
        # The difference before the factor: it is exact where dots are.
        weights = tl.exp2((dots - larger[:, None]) * factor)
        decay = tl.exp2((largest - larger) * factor)
        total = total * decay + tl.sum(weights, 1)
        v = tl.load(v_ptr + start + slot[:, None] * DIM + channel[None, :], mask=seen[:, None], other=0.0)
        result = tl.dot(weights.to(v.dtype), v, result * decay[:, None])
        largest = larger

    if SPLITS == 1:
        result = result / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + q_offsets, result.to(out_ptr.dtype.element_ty), mask=real[:, None])
    else:
        part = unit * SPLITS + split
        offsets = (part * GROUP + row[:, None]) * DIM + channel[None, :]
        tl.store(out_ptr + offsets, result, mask=real[:, None])
        tl.store(stats_ptr + part * 2 * GROUP + row, largest, mask=real)
        tl.store(stats_ptr + (part * 2 + 1) * GROUP + row, total, mask=real)


@triton.jit
def _merge(
    sums_ptr,  # [units, SPLITS, GROUP, DIM]
    stats_ptr,  # [units, SPLITS, 2, GROUP]
    out_ptr,  # [units, GROUP, DIM]
    factor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    unit = (tl.program_id(0) // GROUP).to(tl.int64)
    row = tl.program_id(0) % GROUP
    channel = tl.arange(0, DIM)
    part = unit * SPLITS + tl.arange(0, SPLITS)
    largest = tl.load(stats_ptr + part * 2 * GROUP + row)
    total = tl.load(stats_ptr + (part * 2 + 1) * GROUP + row)
    sums = tl.load(sums_ptr + (part[:, None] * GROUP + row) * DIM + channel[None, :])
    weights = tl.exp2((largest - tl.max(largest, 0)) * factor)
    total = tl.sum(total * weights, 0)
    result = tl.sum(sums * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + (unit * GROUP + row) * DIM + channel, result.to(out_ptr.dtype.element_ty))


def attend(
    q: Float[Array, "T N H"],
    k: Float[Array, "P K S H"],
    v: Float[Array, "P K S H"],
    block_ids: Int32[Array, "T K C"],
    block_table: Int32[Array, "B M"],
    sequences: Int32[Array, " t"],
    positions: Int32[Array, " t"],
    *,
    num_queries: int,
    scale: float,
    config: TuningConfig,
) -> Float[Array, "T N H"]:
    """Attend as `sparse_attention_prefill` does.

    sequences, positions: of each row with num_queries = 0; else the lengths of the sequences, twice, the last
    num_queries tokens of each of which are the rows.
    """
    num_rows, num_heads, dim = q.shape
    kv_heads, page_size = k.shape[1:3]
    group, top_k, splits = num_heads // kv_heads, block_ids.shape[2], config.splits
    out_type = jax.ShapeDtypeStruct(q.shape, q.dtype)
    sums_type = jax.ShapeDtypeStruct((num_rows, kv_heads, splits, group, dim), jnp.float32)
    stats_shape = (1,) if splits == 1 else (num_rows, kv_heads, splits, 2, group)
    result, stats = jax_triton.triton_call(
        q,
        k,
        v,
        block_ids,
        block_table,
        sequences,
        positions,
        kernel=_attend,
        out_type=(out_type if splits == 1 else sums_type, jax.ShapeDtypeStruct(stats_shape, jnp.float32)),
        table_width=block_table.shape[1],
        factor=scale * _LOG2_E,
        grid=(num_rows, kv_heads, splits),
        name="sparse_attend",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        QUERIES=num_queries,
        KV_HEADS=kv_heads,
        GROUP=group,
        ROWS=max(triton_support.LEAST_ROWS, triton_support.power_of_two(group)),
        DIM=dim,
        PAGE=page_size,
        KEYS=config.keys,
        CHOSEN=top_k,
        SPLITS=splits,
    )
    if splits == 1:
        return result
    return jax_triton.triton_call(
        result,
        stats,
        kernel=_merge,
        out_type=out_type,
        factor=scale * _LOG2_E,
        grid=(num_rows * num_heads,),
        name="sparse_merge",
        num_warps=1,
        num_stages=1,
        GROUP=group,
        DIM=dim,
        SPLITS=splits,
    )
