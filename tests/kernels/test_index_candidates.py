"""Candidates of shares of the blocks, and their merge: the choice of the unsharded operations, bit for bit."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CASES, KERNEL_CASES, Batch, Case, Sizes, at_kernel_sizes, make_batch

from pallas_kernels.index_topk import index_candidates_decode, keys, merge_candidates
from pallas_kernels.index_topk.api import OPERATIONS

BOTH = pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
SHARES = (1, 3, 8)
# Operation by operation, each shape would compile a dozen times.
merge = jax.jit(merge_candidates)
keys_of = jax.jit(keys.keys_of)
# Those in which something else than the scores of one device may go wrong; each of other sizes is another compilation.
NAMES = (
    "around-top-k-blocks",
    "all-empty",
    "mixed-loose",
    "poison-inf",
    "ties",
    "normal",
    "three-heads-init-1-local-2",
    "one-head-init-2-local-0",
    "all-forced",
    "narrow-table",
    "page-of-one",
    "long",
)
KERNEL_NAMES = ("mixed-loose-128", "ties-128", "three-heads-init-1-local-2-128", "long-128")
# The reference at the sizes of the kernels shows nothing that it does not show at smaller ones.
NAMED = (
    *((case, "reference") for case in CASES if case.name in NAMES),
    *(
        pytest.param(case, impl, marks=pytest.mark.gpu)
        for case in KERNEL_CASES
        for impl in OPERATIONS["index_candidates_decode"].modules
        if case.name in KERNEL_NAMES and impl != "reference"
    ),
)


def candidates(impl: str, batch: Batch, num_shares: int, **choice) -> np.ndarray:
    """Those of all shares, [N, T, K, 2, C]."""
    operation = OPERATIONS[f"index_candidates_{batch.kind}"]
    each = [(*batch.index_args, jnp.int32(share)) for share in range(num_shares)]
    choice = batch.sizes.choice | choice
    reason = operation.why_not(impl, *each[0], num_shares=num_shares, **choice)
    if reason is not None:
        pytest.skip(reason)
    return np.stack([np.asarray(operation(*args, num_shares=num_shares, impl=impl, **choice)) for args in each])


def unsharded(impl: str, batch: Batch, **choice) -> np.ndarray:
    return np.asarray(
        OPERATIONS[f"index_topk_{batch.kind}"](*batch.index_args, impl=impl, **batch.sizes.choice | choice)
    )


@BOTH
@pytest.mark.parametrize(("case", "impl"), NAMED, ids=str)
def test_merged_candidates_are_the_choice(case: Case, impl: str, decode: bool):
    batch = make_batch(case, decode=decode)
    # Another number of shares is another compilation: one suffices for most.
    for num_shares in SHARES if case.name == "ties" else (3,):
        found = candidates(impl, batch, num_shares)
        assert found.dtype == np.int32
        merged = np.asarray(merge(found))
        if not batch.exact:
            np.testing.assert_array_equal(merged, unsharded(impl, batch))
        else:
            np.testing.assert_array_equal(merged, batch.choice())
            check_candidates(batch, found)


def check_candidates(batch: Batch, found: np.ndarray) -> None:
    """Each share's are its own best, of those that the oracle ranks, with the keys of their scores."""
    num_shares, sizes, scores = len(found), batch.sizes, batch.scores()
    every = sizes.choice | {"top_k": sizes.table_width}
    ranked = oracle.choose_blocks(scores, batch.position, page_size=sizes.page_size, **every)
    for share in range(num_shares):
        key, block = found[share, :, :, 0], found[share, :, :, 1]
        np.testing.assert_array_equal(key == keys.INVISIBLE, block < 0)
        for row, head in np.ndindex(*ranked.shape[:2]):
            mine = [b for b in ranked[row, head] if b >= 0 and b % num_shares == share][: sizes.top_k]
            np.testing.assert_array_equal(block[row, head], mine + [-1] * (sizes.top_k - len(mine)))
        of_block = np.take_along_axis(scores.astype(np.float32), np.maximum(block, 0), axis=-1)
        free = (block >= 0) & (key < keys.FORCED)
        np.testing.assert_array_equal(key[free], np.asarray(keys_of(of_block))[free])


_OVERFLOW = Case("overflow", ((56, 8),) * 5, Sizes(init_blocks=1), data="equal")


@BOTH
@pytest.mark.parametrize(
    ("case", "impl"),
    [(_OVERFLOW, "reference"), pytest.param(at_kernel_sizes(_OVERFLOW), "mosaic_gpu", marks=pytest.mark.gpu)],
    ids=str,
)
def test_infinities_and_nan(case: Case, impl: str, decode: bool):
    """A choice among scores of +inf, -inf and NaN survives the exchange."""
    batch = make_batch(case, decode=decode)
    dtype = batch.index_q.dtype.type
    index_q, index_k = batch.index_q * dtype(1e10), batch.index_k.copy()
    for block, value in enumerate((-1.0, np.nan, -1e30, 2.0, 1e30, 1.0, 1e30, -1.0)):
        index_k[batch.block_table[:, block]] *= dtype(value)
    batch = replace(batch, index_q=index_q, index_k=index_k)
    expected = unsharded(impl, batch, top_k=16)
    for num_shares, top_k in ((8, 4), (3, 16)):
        merged = merge(candidates(impl, batch, num_shares, top_k=top_k))
        np.testing.assert_array_equal(merged, expected[..., :top_k])
    last = batch.position == 8 * case.sizes.page_size - 1
    expected = [0, 7, 4, 6, 3, 5, 1, 2] + [-1] * 8
    np.testing.assert_array_equal(np.asarray(merged)[last], np.broadcast_to(expected, np.asarray(merged)[last].shape))


def test_keys_order_as_scores():
    special = [np.nan, -np.inf, -3e38, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 3e38, np.inf]
    got = np.asarray(keys.keys_of(jnp.asarray(special, jnp.float32))).astype(np.int64)
    lowest, largest = np.asarray(keys.keys_of(jnp.asarray([-1, 1], jnp.float32) * np.finfo(np.float32).max))
    assert got[0] == got[1] == lowest
    assert got[-1] == largest
    assert got[5] == got[6] == 0
    assert (np.diff(got)[[1, 2, 3, 4, 6, 7, 8, 9]] > 0).all()
    assert lowest > keys.INVISIBLE
    assert largest < keys.FORCED


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from([(1, 5), (3, 4), (8, 16)]))
def test_merge(seed: int, shape: tuple[int, int]):
    """Counted and sorted. Few different keys, blocks dealt at random, shares with fewer blocks than candidates."""
    num_shares, top_k = shape
    rng = np.random.default_rng(seed)
    found = np.empty((num_shares, 2, 3, 2, top_k), np.int32)
    expected = np.empty((2, 3, top_k), np.int32)
    for row, head in np.ndindex(2, 3):
        blocks = rng.permutation(num_shares * top_k).reshape(num_shares, top_k).astype(np.int32)
        key = rng.choice([keys.FORCED, 7, 0, -5, keys.INVISIBLE], blocks.shape).astype(np.int32)
        blocks[key == keys.INVISIBLE] = -1
        found[:, row, head, 0], found[:, row, head, 1] = key, blocks
        ranked = sorted((-int(k), b) for k, b in zip(key.flat, blocks.flat, strict=True) if b >= 0)
        expected[row, head] = ([b for _, b in ranked] + [-1] * top_k)[:top_k]
    np.testing.assert_array_equal(merge(found), expected)
    # So many rows that they are sorted.
    many = merge(np.tile(found, (1, 150, 1, 1, 1)))
    np.testing.assert_array_equal(many, np.tile(expected, (150, 1, 1)))


@pytest.mark.parametrize(
    ("share", "num_shares", "error", "message"),
    [
        (jnp.int32(0), 0, ValueError, "num_shares=0 must be at least 1"),
        (jnp.int32(0), 2.0, TypeError, "num_shares=2.0 must be a Python int, not float"),
        (1, 2, TypeError, "share=1 must be a scalar array"),
        (jnp.zeros(1, jnp.int32), 2, TypeError, "must be a scalar array"),
        (jnp.float32(1), 2, TypeError, "share has dtype float32, which must be int32"),
    ],
)
def test_bad_shares_are_refused(share, num_shares, error: type[Exception], message: str):
    batch = make_batch(CASES[0], decode=True)
    arrays: list[Any] = [*batch.index_args, share]
    with pytest.raises(error, match=message):
        index_candidates_decode(*arrays, num_shares=num_shares, **batch.sizes.choice)


def test_bad_candidates_are_refused():
    with pytest.raises(ValueError, match=r"candidates has shape .*, of which axis 3 must be 2"):
        merge_candidates(jax.ShapeDtypeStruct((2, 3, 4, 3, 5), jnp.int32))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="candidates has dtype float32, which must be int32"):
        merge_candidates(jnp.zeros((2, 3, 4, 2, 5)))
