"""Every implementation of the block indexer against the oracle."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CASES, EVERY_CASE, KERNEL_CASES, Batch, Case, Sizes, at_kernel_sizes, compiled, make_batch

from pallas_kernels.index_topk.api import OPERATIONS

IMPLS = sorted({impl for operation in OPERATIONS.values() for impl in operation.modules})
BOTH = pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
every_impl = pytest.mark.parametrize("impl", IMPLS)


def run(name: str, impl: str, batch: Batch, **options) -> np.ndarray:
    operation = OPERATIONS[f"{name}_{batch.kind}"]
    reason = operation.why_not(impl, *batch.index_args, **options)
    if reason is not None:
        pytest.skip(reason)
    return np.asarray(compiled(operation, impl, **options)(*batch.index_args))


@BOTH
@every_impl
@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_scores(case: Case, impl: str, decode: bool):
    batch = make_batch(case, decode=decode)
    got, expected = run("index_score", impl, batch), batch.scores()
    assert got.dtype == np.float32
    visible = np.isfinite(expected)
    np.testing.assert_array_equal(np.isneginf(got), ~visible)
    if batch.exact:
        np.testing.assert_array_equal(got, expected)
    elif visible.any():
        largest = np.abs(expected[visible]).max()
        np.testing.assert_allclose(got[visible], expected[visible], rtol=0, atol=1e-6 * largest)


@BOTH
@every_impl
@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_choice(case: Case, impl: str, decode: bool):
    batch = make_batch(case, decode=decode)
    if not batch.exact:
        pytest.skip("real numbers: scores may be closer than float32 can tell apart")
    got = run("index_topk", impl, batch, **batch.sizes.choice)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, batch.choice())


@BOTH
@every_impl
def test_choice_of_distinct_scores(impl: str, decode: bool):
    """Real numbers: equal in order, since no two scores here are closer than float32 can tell apart."""
    case = next(case for case in CASES if case.name == "normal")
    batch = make_batch(case, decode=decode)
    ranked = np.sort(batch.scores(), axis=-1)
    with np.errstate(invalid="ignore"):
        gaps = np.diff(ranked, axis=-1)
    assert np.nanmin(np.where(np.isfinite(gaps), gaps, np.inf)) > 1e-5
    np.testing.assert_array_equal(run("index_topk", impl, batch, **batch.sizes.choice), batch.choice())


def test_cases_reach_what_they_name():
    """The oracle's own results show that the table holds ties, short choices and more blocks than fit."""
    ties = make_batch(next(case for case in CASES if case.name == "ties"), decode=False)
    scores = ties.scores()[ties.position == ties.position.max()]
    assert len(np.unique(scores)) < scores.size / 4
    lengths = {n for case in CASES for n in np.array(case.lens).sum(axis=1) if case.sizes == Sizes()}
    assert {0, 1, 7, 8, 9, 31, 32, 33, 168} <= lengths
    assert any((make_batch(case, decode=False).choice()[..., -1] >= 0).any() for case in CASES)
    assert {case.sizes.init_blocks for case in CASES} == {case.sizes.local_blocks for case in CASES} == {0, 1, 2}
    assert {case.num_queries for case in CASES} == {1, 2, 3, 4}
    lengths = {n for case in KERNEL_CASES for pair in case.lens for n in (sum(pair), pair[0])}
    assert {0, 1, 127, 128, 129, 511, 512, 513} <= lengths
    assert {case.sizes.num_kv_heads for case in KERNEL_CASES} == {1, 2, 4}
    assert {case.sizes.top_k for case in KERNEL_CASES} == {4, 8, 16, 32}


_OVERFLOW = Case("overflow", ((56, 8),) * 5, Sizes(init_blocks=1), data="equal")


@BOTH
@every_impl
@pytest.mark.parametrize("case", [_OVERFLOW, pytest.param(at_kernel_sizes(_OVERFLOW), marks=pytest.mark.gpu)], ids=str)
def test_overflow_and_nan(case: Case, impl: str, decode: bool):
    """Scores of +inf, -inf and NaN: forced blocks stay in front, and visible ones come before none."""
    sizes = case.sizes
    batch = make_batch(case, decode=decode)
    dtype = batch.index_q.dtype.type
    index_q, index_k = batch.index_q * dtype(1e10), batch.index_k.copy()
    for block, value in enumerate((-1.0, np.nan, -1e30, 2.0, 1e30, 1.0, 1e30, -1.0)):
        index_k[batch.block_table[:, block]] *= dtype(value)
    batch = replace(batch, index_q=index_q, index_k=index_k)
    last = batch.position == 8 * sizes.page_size - 1
    assert last.any()
    for top_k, expected in ((4, [0, 7, 4, 6]), (16, [0, 7, 4, 6, 3, 5, 1, 2] + [-1] * 8)):
        got = run("index_topk", impl, batch, **sizes.choice | {"top_k": top_k})
        np.testing.assert_array_equal(got[last], np.broadcast_to(expected, got[last].shape))
        np.testing.assert_array_equal(got[batch.position < 0], -1)


@BOTH
@every_impl
def test_zeros_of_both_signs_tie(impl: str, decode: bool):
    """A score of -0 equals one of +0, so the lower block comes first. One channel: a sum would hide the sign."""
    sizes = Sizes(index_dim=1, local_blocks=0)
    batch = make_batch(Case("zeros", ((56, 8),) * 5, sizes, data="equal"), decode=decode)
    index_k = np.zeros_like(batch.index_k)
    index_k[batch.block_table[:, 0:8:2]] = -0.0
    got = run("index_topk", impl, replace(batch, index_k=index_k), **sizes.choice)
    last = batch.position == 63
    np.testing.assert_array_equal(got[last], np.broadcast_to([0, 1, 2, 3], got[last].shape))


@st.composite
def drawn_cases(draw, data: str = "fine"):
    """Ragged batches of the base sizes."""
    sizes = Sizes()
    capacity = sizes.table_width * sizes.page_size
    boundaries = st.sampled_from([0, 1, 7, 8, 9, 31, 32, 33, 120])
    lens = []
    for _ in range(sizes.num_sequences):
        context = draw(boundaries | st.integers(0, capacity - 12))
        lens.append((context, draw(st.integers(0, 12))))
    layout = draw(st.sampled_from(["packed", "padded"]))
    shared = draw(st.integers(0, 6))
    poison = draw(st.sampled_from([np.nan, np.inf]))
    return Case("drawn", tuple(lens), sizes, layout, data, poison, shared, draw(st.integers(1, 4)))


@every_impl
@settings(max_examples=40, deadline=None)
@given(case=drawn_cases(data="ties"), decode=st.booleans(), seed=st.integers(0, 99))
def test_drawn_batches(impl: str, case: Case, decode: bool, seed: int):
    batch = make_batch.__wrapped__(case, decode=decode, seed=seed)
    np.testing.assert_array_equal(run("index_topk", impl, batch, **batch.sizes.choice), batch.choice())
    np.testing.assert_array_equal(run("index_score", impl, batch), batch.scores())
