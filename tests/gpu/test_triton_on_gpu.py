"""The Triton kernels against the oracle and the reference, on a GPU.

The case table at the released sizes runs in tests/kernels, as for every implementation; here it runs at sizes that the
Mosaic kernels refuse, and the random batches of test_kernels_on_gpu.py run through these kernels.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_index_topk
import test_kernels_on_gpu as on_gpu
import test_sparse_attention
from kernel_cases import CASES, Case, make_batch

from pallas_kernels.index_topk.api import OPERATIONS as INDEX
from pallas_kernels.sparse_attention.api import OPERATIONS as ATTENTION

pytestmark = pytest.mark.gpu
BOTH = test_index_topk.BOTH


def at_other_sizes(case: Case, page_size: int, dim: int) -> Case:
    """A case of pages of 8 tokens with larger ones; its groups, heads and numbers of blocks stay odd."""
    sizes = case.sizes
    assert sizes.page_size == 8

    def tokens(length: int) -> int:
        blocks, rest = divmod(length, 8)
        return page_size * blocks + {0: 0, 1: 1, 7: page_size - 1}.get(rest, rest * page_size // 8)

    lens = tuple((tokens(context), tokens(context + new) - tokens(context)) for context, new in case.lens)
    news = [new for _, new in lens]
    num_rows = {"packed": sum(news), "padded": len(news) * max(news), "loose": sum(news) + 40}[case.layout]
    dtype = "bfloat16" if sizes.dtype == "float32" else sizes.dtype
    larger = replace(sizes, page_size=page_size, head_dim=dim, index_dim=dim, dtype=dtype)
    return replace(
        case,
        name=f"{case.name}-{page_size}-{dim}",
        lens=lens,
        sizes=replace(larger, num_rows=max(num_rows, len(news))),
    )


# Page size and channels of a case.
OTHER_SIZES = tuple(
    at_other_sizes(next(case for case in CASES if case.name == name), *sizes)
    for name, sizes in {
        "mixed-loose": (16, 64),
        "ties": (16, 64),
        "three-heads-init-1-local-2": (16, 64),
        "float16-normal": (16, 128),
        "bfloat16-huge": (32, 128),
        "one-head-init-2-local-0": (32, 128),
        "nothing-forced": (64, 64),
        "short-decode-2": (256, 64),
    }.items()
)


@BOTH
@pytest.mark.parametrize("case", OTHER_SIZES, ids=str)
def test_other_sizes(case: Case, decode: bool):
    test_index_topk.test_scores(case, "triton", decode)
    if make_batch(case, decode=decode).exact:
        test_index_topk.test_choice(case, "triton", decode)
    test_sparse_attention.test_chosen_blocks(case, "triton", decode)
    test_sparse_attention.test_any_blocks(case, "triton", decode)


# One for each way through: parts of rows, shared pages, several chunks of blocks.
@pytest.mark.parametrize("bucket", [on_gpu.BUCKETS[number] for number in (4, 8, 10)], ids=str)
def test_random_batches(bucket: on_gpu.Bucket, monkeypatch):
    """A few of them, whatever M3_KERNEL_DRAWS says: it asks for thousands for the kernels that are preferred."""
    skip_unless_supported()
    monkeypatch.setattr(on_gpu, "DRAWS", min(on_gpu.DRAWS, 4))
    on_gpu.check_random_batches(replace(bucket, impl="triton"))


def skip_unless_supported() -> None:
    shapes = ((4, 4, 128), (9, 128, 128))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    tables = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 3), (2,))]
    reason = INDEX["index_score_decode"].why_not("triton", *arrays, *tables)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("num_shares", [1, 3])
def test_groups_of_tiles_and_candidates(num_shares: int, monkeypatch):
    """Tiles that are worked off in groups, the last one not full, and shares of the blocks: as the reference."""
    skip_unless_supported()
    from pallas_kernels.index_topk import triton_gpu as index

    case = at_other_sizes(next(case for case in CASES if case.name == "mixed-loose"), 64, 64)
    batch = make_batch(case, decode=False)
    monkeypatch.setattr(index, "_TABLE_BYTES", 3 * 128 * 21 * 4)
    np.testing.assert_array_equal(index._topk_prefill(*batch.index_args, **batch.sizes.choice), batch.choice())
    np.testing.assert_array_equal(index._score_prefill(*batch.index_args), batch.scores())
    for decode in (False, True):
        batch = make_batch(case, decode=decode)
        candidates = INDEX[f"index_candidates_{batch.kind}"]
        for share in range(num_shares):
            args = (*batch.index_args, jnp.int32(share))
            got, expected = (
                candidates(*args, num_shares=num_shares, impl=impl, **batch.sizes.choice)
                for impl in ("triton", "reference")
            )
            np.testing.assert_array_equal(got, expected)


@BOTH
def test_derivatives(decode: bool):
    """Those of the reference, through a jitted call."""
    skip_unless_supported()
    case = at_other_sizes(next(case for case in CASES if case.name == "normal"), 16, 64)
    batch = make_batch(case, decode=decode)
    q, k, v, *rest = (jnp.asarray(array) for array in batch.attention_args(batch.choice()))
    q = jnp.where((batch.position >= 0)[:, None, None], q, 0)

    def gradients(impl: str):
        def loss(q, k, v):
            attend = ATTENTION[f"sparse_attention_{batch.kind}"]
            out = attend(q, k, v, *rest, scale=batch.scale, impl=impl).astype(jnp.float32)
            return jnp.sum(jnp.where((batch.position >= 0)[:, None, None], out, 0) ** 2)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    for got, expected in zip(gradients("triton"), gradients("reference"), strict=True):
        got, expected = (np.asarray(x, np.float32) for x in (got, expected))
        assert np.isfinite(expected).any()
        np.testing.assert_allclose(got, expected, rtol=2e-2, atol=2e-2 * np.nanmax(np.abs(expected)))
