"""Runs Mosaic GPU kernels in Pallas' interpreter, with race detection, against the oracle.

    NPROC=16 JAX_PLATFORMS=cpu python tests/kernels/mosaic_interpreter.py CHECK ...

NPROC must be in the environment before jax is imported: the interpreter wants a thread for each warpgroup and warp.
"""

import functools
import sys
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import norm_rope_cases
import numpy as np
import skinny_matmul_cases
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_cases import Case, Sizes, check_attention, every_block, make_batch, random_choice

from pallas_kernels import tuned
from pallas_kernels.index_sparse_attention import mosaic_gpu as both
from pallas_kernels.index_topk import merge_candidates
from pallas_kernels.index_topk import mosaic_gpu as index
from pallas_kernels.index_topk import mosaic_gpu_choose as choosing
from pallas_kernels.index_topk import mosaic_gpu_choose_prefill as choosing_prefill
from pallas_kernels.index_topk.shares import Shares
from pallas_kernels.mosaic import folded
from pallas_kernels.norm_rope_cache import mosaic_gpu as norm_rope
from pallas_kernels.paged_attention import mosaic_gpu as paged
from pallas_kernels.skinny_matmul import mosaic_gpu as skinny
from pallas_kernels.sparse_attention import mosaic_gpu as attention
from pallas_kernels.sparse_attention import mosaic_gpu_decode as attending
from pallas_kernels.sparse_attention import mosaic_gpu_prefill as attending_prefill
from pallas_kernels.sparse_attention import mosaic_gpu_tile as tiles

RACES = plgpu.InterpretGPUParams(detect_races=True)
SIZES = Sizes(
    num_sequences=3,
    num_rows=30,
    table_width=5,
    page_size=128,
    num_kv_heads=2,
    group=16,
    head_dim=128,
    index_dim=128,
    dtype="bfloat16",
)
# A partial last block, an empty sequence, one shorter than its number of queries; garbage in the table, NaN in every
# unused slot.
CASE = Case("interpreted", ((470, 17), (0, 0), (0, 1)), SIZES, num_queries=2, shared=1)


def index_decode() -> None:
    batch = make_batch(CASE, decode=True)
    scores = jax.jit(functools.partial(index._score_decode, interpret=RACES))(*batch.index_args)
    np.testing.assert_array_equal(scores, batch.scores())
    choose = functools.partial(index._topk_decode, **batch.sizes.choice, interpret=RACES)
    np.testing.assert_array_equal(jax.jit(choose)(*batch.index_args), batch.choice())


def index_prefill() -> None:
    batch = make_batch(CASE, decode=False)
    score = functools.partial(index._score_prefill, interpret=RACES)
    np.testing.assert_array_equal(jax.jit(score)(*batch.index_args), batch.scores())
    # Windows of one CTA and windows of several.
    for config in (
        choosing_prefill.TuningConfig(2, piece_cost=1),
        choosing_prefill.TuningConfig(5, piece_cost=2),
    ):
        choose = functools.partial(index._topk_prefill, **batch.sizes.choice, config=config, interpret=RACES)
        np.testing.assert_array_equal(jax.jit(choose)(*batch.index_args), batch.choice())


def index_candidates() -> None:
    """Shares of which some hold nothing; without local blocks, and with one block that all rows want."""
    sizes = replace(SIZES, init_blocks=1, local_blocks=0)
    for decode in (True, False):
        batch = make_batch(replace(CASE, sizes=sizes, data="ties"), decode=decode)
        run = index._candidates_decode if decode else index._candidates_prefill
        options = {} if decode else {"config": choosing_prefill.TuningConfig(3)}
        find = functools.partial(run, num_shares=3, **sizes.choice, **options, interpret=RACES)
        find = jax.jit(find)
        found = np.stack([find(*batch.index_args, np.int32(share)) for share in range(3)])
        np.testing.assert_array_equal(jax.jit(merge_candidates)(found), batch.choice())


def choose_special_scores() -> None:
    """Every way through the choice: ties, zeros of both signs, infinities, NaN; in the last column a warp has the best.

    One CTA, a cluster of several, more than a cluster has; with and without a first choice by each warp, which has to
    look twice where it has more of the best than is likely.
    """
    blocks, columns = 288, 8
    rng = np.random.default_rng(0)
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-40], np.float32)
    scores = rng.choice(special, (2, columns, blocks))
    scores[:, -2] = rng.standard_normal((2, blocks))
    scores[:, -1] = rng.standard_normal((2, blocks))
    scores[:, -1, ::4] += 100
    scores[:, -1, ::128] += 100  # and a lane the best of those
    positions = np.array([287 * 128 + 5, -1], np.int32)
    ordered = np.nan_to_num(np.where(np.isnan(scores), -np.inf, scores))
    for top_k, chunk in ((8, 96), (8, 32), (8, 16), (8, 8), (16, 96), (16, 32)):
        config = choosing.TuningConfig(chunk)
        padded = np.pad(scores, ((0, 0), (0, 0), (0, -blocks % config.blocks)), constant_values=np.nan)
        choice = choosing.Choice(4, columns, Shares(blocks), top_k, init_blocks=1, local_blocks=2)
        choose = jax.jit(functools.partial(choosing.choose, choice=choice, config=config, interpret=RACES))
        got = np.asarray(choose(padded, positions, np.zeros(1, np.int32)))
        for slab, position in enumerate(positions):
            for column in range(columns):
                own = (position + column // 4) // 128
                forced = sorted({block for block in (0, own - 1, own) if 0 <= block <= own})
                rest = [block for block in range(own + 1) if block not in forced]
                rest.sort(key=lambda block: (-ordered[slab, column, block], block))
                expected = (forced + rest + [-1] * top_k)[:top_k]
                np.testing.assert_array_equal(got[slab, column], expected)


def attention_decode() -> None:
    """A row's blocks in one CTA, and in several that merge what they have."""
    batch = make_batch(CASE, decode=True)
    block_ids = random_choice(batch)
    args = batch.attention_args(block_ids)
    for config in (attending.TuningConfig(1, 2), attending.TuningConfig(2, 1), attending.TuningConfig(8, 1)):
        with tuned.choosing(lambda _kernel, _bucket, _heuristic, config=config: config):
            attend = functools.partial(attention.attend_decode, scale=batch.scale, interpret=RACES)
            check_attention(batch, jax.jit(attend)(*args), block_ids)


def index_attention_decode() -> None:
    """The choice within the attention: few blocks, and more of them than are compared at once; the table in lines.

    A row's first block is known before the others, or, without forced blocks, is not.
    """
    wide = replace(SIZES, table_width=96, init_blocks=1)
    for sizes, shares in ((SIZES, 1), (SIZES, 8), (wide, 2), (replace(SIZES, local_blocks=0), 2)):
        batch = make_batch(replace(CASE, sizes=sizes), decode=True)
        block_ids = batch.choice()
        q, k, v, *_ = batch.attention_args(block_ids)
        index_q, index_k, *tables = batch.index_args
        config = attending.TuningConfig(shares, 1)
        with tuned.choosing(lambda _kernel, _bucket, _heuristic, config=config: config):
            run = functools.partial(both._decode, scale=batch.scale, **sizes.choice, interpret=RACES)
            out, chosen = jax.jit(run)(index_q, index_k, q, k, v, *tables)
        np.testing.assert_array_equal(chosen, block_ids)
        check_attention(batch, out, block_ids)


def norm_rope_cache() -> None:
    for case in norm_rope_cases.CASES:
        if case.head_dim == 128:
            run = jax.jit(functools.partial(norm_rope._run, eps=norm_rope_cases.EPS, interpret=RACES))
            norm_rope_cases.check(case, run(*norm_rope_cases.make_arguments(case)))


def paged_attention_decode() -> None:
    """Eight heads a KV head, as one of eight devices has; more shares than some rows have blocks."""
    batch = make_batch(replace(CASE, sizes=replace(SIZES, group=8)), decode=True)
    block_ids = every_block(batch)
    q, k, v, _, *lengths = batch.attention_args(block_ids)
    attend = functools.partial(paged._decode, scale=batch.scale, interpret=RACES)
    check_attention(batch, jax.jit(attend)(q, k, v, *lengths), block_ids)


def skinny_matmul() -> None:
    """One CTA for its channels, and several that add what they have; more stages than steps, and fewer."""
    for case in skinny_matmul_cases.CASES:
        rows, matrices = skinny_matmul_cases.make(case)
        for config in (skinny.TuningConfig(1, 3, 128), skinny.TuningConfig(3, 1, 128)):
            product = skinny.multiply(rows, *matrices, config=config, interpret=RACES)
            skinny_matmul_cases.check(rows, [jnp.concatenate(matrices)], [product])


def attention_prefill() -> None:
    batch = make_batch(CASE, decode=False)
    block_ids = batch.choice()
    args = batch.attention_args(block_ids)
    # Windows of few rows, and chunks of which a CTA has several; parts of the rows, each merged into its part of the
    # result, and in the end more of them than are planned at a time.
    for pairs, config in (
        (128, attending_prefill.TuningConfig(window=7, chunk=6, ctas=2)),
        (48, attending_prefill.TuningConfig(window=16, chunk=9, ctas=3)),
    ):
        attend = functools.partial(attention._prefill, scale=batch.scale, config=config, pairs=pairs, interpret=RACES)
        check_attention(batch, jax.jit(attend)(*args), block_ids)


def attention_prefill_in_common() -> None:
    """Blocks that neighbours have in common in a kernel of their own: all, some or none of a group's; several parts.

    Of 36 blocks, so that they take two words.
    """
    sizes = replace(SIZES, num_rows=40, table_width=36)
    case = replace(CASE, lens=((470, 20), (0, 1), (4400, 14)), sizes=sizes, data="normal")
    batch = make_batch(case, decode=False)
    chosen = batch.choice()
    some = chosen.copy()
    # In every group some rows that chose otherwise, or nothing.
    some[::6], some[1::12] = random_choice(batch)[::6], -1
    config = attending_prefill.TuningConfig(window=16, chunk=6, ctas=2)
    for block_ids, pairs in ((chosen, 40 * 8), (some, 16 * 8)):
        options = {"scale": batch.scale, "config": config, "pairs": pairs, "in_common": True, "interpret": RACES}
        attend = functools.partial(attention._prefill, **options)
        check_attention(batch, jax.jit(attend)(*batch.attention_args(block_ids)), block_ids)


def attention_prefill_in_common_bounds() -> None:
    """As below; and a logit beyond float32 of a row with a block that it did not choose, and its neighbours did."""
    sizes = replace(SIZES, num_rows=12, num_kv_heads=1)
    case = replace(CASE, lens=((400, 12), (0, 0), (0, 0)), sizes=sizes, data="normal", poison=0.0)
    batch = make_batch(case, decode=False)
    block_ids = np.tile(np.array([0, 1, 2, 3], np.int32), (12, 1, 1))
    block_ids[5] = [[-1, 3, 2, -1]]
    large = np.ones_like(batch.q)
    large[3] = 200
    q, k = batch.q.copy(), batch.k.copy()
    pages = batch.block_table[0]
    q[..., 0], k[pages[2:4], :, :, 0], k[pages[:2], :, :, 0] = 0, 0, 2.0**100
    q[5, :, 0] = 2.0**100
    config = attending_prefill.TuningConfig(window=16, chunk=6, ctas=1)
    options = {"config": config, "in_common": True, "interpret": RACES}
    for case in (replace(batch, q=batch.q * large), replace(batch, q=q, k=k)):
        attend = functools.partial(attention._prefill, scale=batch.scale, **options)
        check_attention(case, jax.jit(attend)(*case.attention_args(block_ids)), block_ids)


def attention_prefill_bounds() -> None:
    """CTAs begin anew where something is out of bounds, all else stands as it was first found."""
    case = replace(CASE, lens=((300, 7), (0, 0), (0, 1)), sizes=replace(SIZES, num_rows=9), data="normal", poison=0.0)
    within = make_batch(case, decode=False)
    of_rows = np.ones_like(within.q)
    of_rows[::7] = 200  # Logits of hundreds.
    # The second of them: values whose sums are more than float32 holds.
    beyond = (replace(within, q=within.q * of_rows), replace(within, v=within.v * within.v.dtype.type(2.0**110)))
    config = attending_prefill.TuningConfig(window=16, chunk=6, ctas=3)
    block_ids = within.choice()

    def attend():
        run = jax.jit(functools.partial(attention._prefill, scale=within.scale, config=config, interpret=RACES))
        return [run(*batch.attention_args(block_ids)) for batch in (within, *beyond)]

    for batch, result in zip((within, *beyond), attend(), strict=True):
        check_attention(batch, result, block_ids)

    def spoil(operation, logits):
        """For the largest logit, which only the second attempt looks for."""
        return folded(operation, logits) * jnp.nan

    with mock.patch.object(tiles, "folded", spoil):
        jax.clear_caches()
        first, *others = attend()
    jax.clear_caches()
    check_attention(within, first, block_ids)
    assert all(np.isnan(other).any() for other in others)


CHECKS = {
    check.__name__: check
    for check in (
        index_decode,
        index_prefill,
        index_candidates,
        choose_special_scores,
        attention_decode,
        index_attention_decode,
        norm_rope_cache,
        paged_attention_decode,
        attention_prefill,
        attention_prefill_in_common,
        attention_prefill_in_common_bounds,
        attention_prefill_bounds,
        skinny_matmul,
    )
}

if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    for name in sys.argv[1:]:
        CHECKS[name]()
