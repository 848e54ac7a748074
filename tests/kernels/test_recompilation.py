"""Static shapes are all that an operation is compiled for: other lengths and tables of the same shapes cost nothing."""

from collections.abc import Iterator
from functools import partial

import jax
import numpy as np
import pytest
from compilations import COMPILED, TRACED, compilations
from kernel_cases import Batch, Case, Sizes, make_batch

import pallas_kernels as ops

SMALL = Sizes()
RELEASED = Sizes(
    num_rows=600,
    page_size=128,
    num_kv_heads=4,
    group=16,
    head_dim=128,
    index_dim=128,
    top_k=16,
    dtype="bfloat16",
)


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Grows by what jax traces and compiles."""
    with compilations(TRACED, COMPILED) as seen:
        yield seen


@pytest.mark.parametrize(
    ("impl", "sizes"), [("reference", SMALL), pytest.param("mosaic_gpu", RELEASED, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
def test_other_lengths_compile_nothing(impl: str, sizes: Sizes, decode: bool, compiled: list[str]) -> None:
    page, rows = sizes.page_size, sizes.num_rows
    cases = (
        Case("one has all", ((0, 0), (0, 0), (3 * page, rows), (0, 0), (0, 0)), sizes),
        Case("even", ((page, rows // 5),) * 5, sizes),
        Case("few", ((0, 1), (17 * page + 1, 5), (page, 0), (7 * page - 1, 2), (0, 0)), sizes, layout="loose"),
    )
    batches = [make_batch(case, decode=decode, seed=seed) for seed, case in enumerate(cases)]
    kind = batches[0].kind
    # As a user calls them. The kernels are called inside of a jit, as a model does; the references have their own.
    wrap = jax.jit if impl == "mosaic_gpu" else lambda function: function
    score = wrap(partial(getattr(ops, f"index_score_{kind}"), impl=impl))
    choose = wrap(partial(getattr(ops, f"index_topk_{kind}"), **sizes.choice, impl=impl))
    attend = wrap(partial(getattr(ops, f"sparse_attention_{kind}"), impl=impl))

    def call(batch: Batch) -> tuple[jax.Array, ...]:
        index = tuple(map(jax.device_put, batch.index_args))
        ids = choose(*index)
        return score(*index), ids, attend(*map(jax.device_put, batch.attention_args(ids)))

    first = call(batches[0])
    assert compiled
    compiled.clear()
    others = [call(batch) for batch in batches[1:]]
    assert compiled == []
    assert all((np.asarray(a) != np.asarray(b)).any() for other in others for a, b in zip(first, other, strict=True))
