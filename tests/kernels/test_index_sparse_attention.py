"""Every implementation of choice and attention in one against the oracle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import EVERY_CASE, Batch, Case, check_attention, compiled, make_batch
from test_index_topk import drawn_cases

from pallas_kernels.index_sparse_attention.api import OPERATIONS

OPERATION = OPERATIONS["index_sparse_attention_decode"]
every_impl = pytest.mark.parametrize("impl", sorted(OPERATION.modules))


def check(impl: str, batch: Batch) -> None:
    q, k, v, _, *tables = batch.attention_args(batch.choice())
    args = (*batch.index_args[:2], q, k, v, *tables)
    options = {"scale": batch.scale, **batch.sizes.choice}
    reason = OPERATION.why_not(impl, *args, **options)
    if reason is not None:
        pytest.skip(reason)
    out, block_ids = (np.asarray(x) for x in compiled(OPERATION, impl, **options)(*args))
    assert (out.dtype, block_ids.dtype) == (batch.q.dtype, np.int32)
    # Of real numbers scores may be closer than float32 can tell apart, so there its own choice is what counts.
    if batch.exact:
        np.testing.assert_array_equal(block_ids, batch.choice())
    check_attention(batch, out, block_ids)
    assert not out[batch.position < 0].any()


@every_impl
@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_choice_and_attention(case: Case, impl: str):
    check(impl, make_batch(case, decode=True))


@every_impl
@settings(max_examples=20, deadline=None)
@given(case=drawn_cases(data="ties"), seed=st.integers(0, 99))
def test_drawn_batches(impl: str, case: Case, seed: int):
    check(impl, make_batch.__wrapped__(case, decode=True, seed=seed))
