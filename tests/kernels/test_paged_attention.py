"""Every implementation of dense attention to a paged cache against the oracle, which is given all blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CASES, KERNEL_CASES, Batch, Case, check_attention, every_block, make_batch
from test_index_topk import drawn_cases

from pallas_kernels.paged_attention.api import OPERATIONS
from pallas_kernels.sparse_attention.mosaic_gpu_decode import TuningConfig

OPERATION = OPERATIONS["paged_attention_decode"]


def check(impl: str, batch: Batch) -> np.ndarray:
    block_ids = every_block(batch)
    q, k, v, _, *lengths = batch.attention_args(block_ids)
    reason = OPERATION.why_not(impl, q, k, v, *lengths, scale=batch.scale)
    if reason is not None:
        pytest.skip(reason)
    got = np.asarray(OPERATION(q, k, v, *lengths, scale=batch.scale, impl=impl))
    assert got.dtype == batch.q.dtype
    check_attention(batch, got, block_ids)
    return got


# The kernel at the sizes that it is written for; the reference does not depend on them.
@pytest.mark.parametrize(
    ("impl", "case"),
    [
        *(pytest.param("reference", case, id=f"reference-{case}") for case in CASES),
        *(pytest.param("mosaic_gpu", c, id=f"mosaic_gpu-{c}", marks=pytest.mark.gpu) for c in KERNEL_CASES),
    ],
)
def test_all_blocks(case: Case, impl: str):
    batch = make_batch(case, decode=True)
    assert not check(impl, batch)[batch.position < 0].any()


@settings(max_examples=30, deadline=None)
@given(case=drawn_cases(data="normal"), seed=st.integers(0, 99))
def test_drawn_batches(case: Case, seed: int):
    check("reference", make_batch.__wrapped__(case, decode=True, seed=seed))


def test_derivative_does_not_see_unused_slots():
    """Against the derivative over keys and values laid out densely, with NaN in every slot that holds no token."""
    batch = make_batch(next(case for case in CASES if case.name == "normal"), decode=True)
    k, v = (np.where(batch.written[:, None, :, None], x, np.nan) for x in (batch.k, batch.v))
    lengths = (batch.block_table, *batch.lengths)

    def loss(q, k, v):
        return jnp.sum(jnp.sin(OPERATION(q, k, v, *lengths, scale=batch.scale, impl="reference")))

    def dense_loss(q, k, v):
        seq_lens = batch.lengths[0]
        rows = []
        for row, position in enumerate(batch.position):
            if position < 0:
                continue
            b = row * len(seq_lens) // len(batch.position)
            pages = batch.block_table[b, : position // k.shape[2] + 1]
            keys, values = (jnp.concatenate([x[p] for p in pages], axis=1)[:, : position + 1] for x in (k, v))
            queries = q[row].reshape(keys.shape[0], -1, q.shape[-1])
            weights = jax.nn.softmax(batch.scale * jnp.einsum("kgh,ksh->kgs", queries, keys), axis=-1)
            rows.append(jnp.sin(jnp.einsum("kgs,ksh->kgh", weights, values)))
        return sum(map(jnp.sum, rows))

    for got, expected in zip(
        jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(batch.q, k, v),
        jax.jit(jax.grad(dense_loss, argnums=(0, 1, 2)))(batch.q, k, v),
        strict=True,
    ):
        got, expected = np.asarray(got), np.asarray(expected)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, np.nan_to_num(expected), atol=1e-5 * np.nanmax(np.abs(expected)))


@pytest.mark.parametrize("units", [1, 4, 64, 256, 2048])
@pytest.mark.parametrize("table_width", [1, 3, 64, 1024, 8192])
def test_shares_fit_the_table(units: int, table_width: int):
    shares = TuningConfig.for_all_blocks(units, table_width).shares
    assert 1 <= shares <= table_width
    # One round of CTAs where the table has the blocks for it, and no more than four.
    assert shares * units >= min(264 - units, units * table_width)
    assert shares == 1 or shares * units <= 4 * 264
