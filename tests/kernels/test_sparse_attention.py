"""Every implementation of block-sparse attention against the oracle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CASES, EVERY_CASE, Batch, Case, check_attention, compiled, make_batch, random_choice
from test_index_topk import BOTH, drawn_cases

from pallas_kernels.sparse_attention.api import OPERATIONS

IMPLS = sorted({impl for operation in OPERATIONS.values() for impl in operation.modules})
every_impl = pytest.mark.parametrize("impl", IMPLS)


def check(impl: str, batch: Batch, block_ids: np.ndarray) -> np.ndarray:
    operation = OPERATIONS[f"sparse_attention_{batch.kind}"]
    args = batch.attention_args(block_ids)
    reason = operation.why_not(impl, *args, scale=batch.scale)
    if reason is not None:
        pytest.skip(reason)
    got = np.asarray(compiled(operation, impl, scale=batch.scale)(*args))
    assert got.dtype == batch.q.dtype
    check_attention(batch, got, block_ids)
    return got


@BOTH
@every_impl
@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_chosen_blocks(case: Case, impl: str, decode: bool):
    batch = make_batch(case, decode=decode)
    got = check(impl, batch, batch.choice())
    assert not got[batch.position < 0].any()


@BOTH
@every_impl
@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_any_blocks(case: Case, impl: str, decode: bool):
    """Blocks in any order and number: rows whose blocks hold no visible key among them."""
    batch = make_batch(case, decode=decode)
    block_ids = random_choice(batch)
    got = check(impl, batch, block_ids)
    by_head = got.reshape(len(got), batch.sizes.num_kv_heads, -1)
    assert not by_head[(block_ids < 0).all(axis=-1)].any()


@BOTH
@every_impl
def test_no_blocks(impl: str, decode: bool):
    batch = make_batch(next(case for case in CASES if case.name == "mixed"), decode=decode)
    block_ids = np.full_like(batch.choice(), -1)
    assert not check(impl, batch, block_ids).any()


@every_impl
@settings(max_examples=40, deadline=None)
@given(case=drawn_cases(data="normal"), decode=st.booleans(), seed=st.integers(0, 99))
def test_drawn_batches(impl: str, case: Case, decode: bool, seed: int):
    batch = make_batch.__wrapped__(case, decode=decode, seed=seed)
    check(impl, batch, random_choice(batch, seed))
