"""What only the references promise: derivatives, bounded memory, and one compilation for all lengths."""

from functools import partial
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from kernel_cases import Case, Sizes, make_batch, random_choice

import pallas_kernels
from pallas_kernels.index_topk.api import OPERATIONS as INDEX
from pallas_kernels.sparse_attention.api import OPERATIONS as ATTENTION

BOTH = pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
MIB = 2**20
NUM_TOKENS = 32_768


def temp_bytes(compiled: Any) -> int:
    """Memory that a compiled function needs beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def directional(function, arrays, directions, step=1e-6) -> float:
    """Central difference of a float64 function along `directions`."""
    ahead = function(*(a + step * d for a, d in zip(arrays, directions, strict=True)))
    behind = function(*(a - step * d for a, d in zip(arrays, directions, strict=True)))
    return (ahead - behind) / (2 * step)


def check_gradient(gradients, function, arrays, used, seed=3) -> None:
    """Gradients are finite, 0 where nothing is used, and agree with differences of the oracle."""
    rng = np.random.default_rng(seed)
    for number, (gradient, mask) in enumerate(zip(gradients, used, strict=True)):
        gradient = np.asarray(gradient, np.float64)
        assert np.isfinite(gradient).all()
        assert not gradient[~mask].any()
        assert gradient[mask].any()
        for _ in range(3):
            directions = [np.zeros(a.shape) for a in arrays]
            directions[number][mask] = rng.standard_normal(mask.sum())
            expected = directional(function, arrays, directions)
            got = (gradient * directions[number]).sum()
            scale = np.sqrt((gradient**2).sum())
            assert abs(got - expected) <= 1e-5 * scale


_GRADIENT_CASE = Case("gradients", ((20, 9), (0, 5), (0, 0), (8, 0), (0, 1)), data="normal", num_queries=3)


@BOTH
def test_gradients_of_attention(decode: bool):
    batch = make_batch(_GRADIENT_CASE, decode=decode)
    block_ids = random_choice(batch)
    operation = ATTENTION[f"sparse_attention_{batch.kind}"]
    cotangent = np.random.default_rng(2).standard_normal(batch.q.shape)

    def ours(q, k, v):
        args = (q, k, v, *batch.attention_args(block_ids)[3:])
        result = operation(*args, scale=batch.scale, impl="reference")
        return jnp.sum(result * cotangent.astype(np.float32))

    def judge(q, k, v):
        rest = (block_ids, batch.block_table, batch.sequence, batch.position, batch.scale)
        return (oracle.sparse_attention(q, k, v, *rest) * cotangent).sum()

    live = np.broadcast_to((batch.position >= 0)[:, None, None], batch.q.shape)
    written = np.broadcast_to(batch.written[:, None, :, None], batch.k.shape)
    arrays = (batch.q, batch.k, batch.v)
    check_gradient(
        jax.grad(ours, argnums=(0, 1, 2))(*arrays),
        judge,
        [a.astype(np.float64) for a in arrays],
        (live, written, written),
    )


@BOTH
def test_gradients_of_scores(decode: bool):
    batch = make_batch(_GRADIENT_CASE, decode=decode)
    operation = INDEX[f"index_score_{batch.kind}"]
    visible = np.isfinite(batch.scores())
    cotangent = np.random.default_rng(2).standard_normal(visible.shape)

    def ours(index_q, index_k):
        scores = operation(index_q, index_k, *batch.index_args[2:], impl="reference")
        return jnp.sum(jnp.where(visible, scores, 0) * cotangent.astype(np.float32))

    def judge(index_q, index_k):
        scores = oracle.index_scores(index_q, index_k, batch.block_table, batch.sequence, batch.position)
        return (np.where(visible, scores, 0) * cotangent).sum()

    live = np.broadcast_to((batch.position >= 0)[:, None, None], batch.index_q.shape)
    written = np.broadcast_to(batch.written[:, :, None], batch.index_k.shape)
    arrays = (batch.index_q, batch.index_k)
    check_gradient(
        jax.grad(ours, argnums=(0, 1))(*arrays),
        judge,
        [a.astype(np.float64) for a in arrays],
        (live, written),
    )


@BOTH
def test_the_choice_has_no_derivative(decode: bool):
    batch = make_batch(_GRADIENT_CASE, decode=decode)
    operation = INDEX[f"index_topk_{batch.kind}"]

    def function(index_q, index_k):
        block_ids = operation(index_q, index_k, *batch.index_args[2:], **batch.sizes.choice)
        return jnp.sum(index_q[0]) + jnp.sum(block_ids)

    finite = (np.nan_to_num(batch.index_q), np.nan_to_num(batch.index_k))
    of_q, of_k = jax.grad(function, argnums=(0, 1))(*finite)
    np.testing.assert_array_equal(np.asarray(of_q[0]), 1)
    assert not np.asarray(of_q[1:]).any()
    assert not np.asarray(of_k).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_prefill_in_bounded_memory(dtype: str):
    """32,768 tokens: 64 MiB for the choice and 96 MiB for attention, and sampled rows are right.

    One head's scores of all tokens would be 4 GiB, and the chosen keys and values of all rows 1.1 GiB.
    """
    sizes = Sizes(
        num_sequences=1,
        num_rows=NUM_TOKENS,
        table_width=NUM_TOKENS // 16,
        page_size=16,
        num_kv_heads=3,
        group=2,
        head_dim=12,
        index_dim=24,
        dtype=dtype,
    )
    batch = make_batch(Case("long-prefill", ((0, NUM_TOKENS),), sizes), decode=False)
    choose = jax.jit(partial(pallas_kernels.index_topk_prefill, impl="reference", **sizes.choice))
    chosen = choose.lower(*batch.index_args).compile()
    assert temp_bytes(chosen) <= 64 * MIB
    attention = partial(pallas_kernels.sparse_attention_prefill, impl="reference", scale=batch.scale)
    abstract_ids = jax.ShapeDtypeStruct((NUM_TOKENS, sizes.num_kv_heads, sizes.top_k), jnp.int32)
    attended = jax.jit(attention).lower(*batch.attention_args(abstract_ids)).compile()  # pyright: ignore[reportArgumentType]
    assert temp_bytes(attended) <= 96 * MIB
    if dtype != "float32":
        return

    block_ids = chosen(*batch.index_args)
    result = np.asarray(attended(*batch.attention_args(block_ids)))
    sample = np.random.default_rng(5).integers(0, NUM_TOKENS, 12)
    where = (batch.block_table, batch.sequence[sample], batch.position[sample])
    scores = oracle.index_scores(batch.index_q[sample], batch.index_k, *where)
    expected_ids = oracle.choose_blocks(scores, where[2], page_size=sizes.page_size, **sizes.choice)
    np.testing.assert_array_equal(np.asarray(block_ids)[sample], expected_ids)
    expected = oracle.sparse_attention(batch.q[sample], batch.k, batch.v, expected_ids, *where, batch.scale)
    assert np.abs(result[sample] - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_million_keys_in_bounded_memory():
    """The released sizes at 1,048,576 keys, compiled only: less than 128 MiB beside arguments and results."""
    num_kv_heads, dim, page_size, num_pages = 4, 128, 128, 8192

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    bf16, i32 = jnp.bfloat16, jnp.int32
    index_k = array(bf16, num_pages, page_size, dim)
    cache = array(bf16, num_pages, num_kv_heads, page_size, dim)
    table = array(i32, 1, num_pages)
    for kind, num_rows, lengths in (
        ("prefill", 2048, (array(i32, 2), array(i32, 1), array(i32, 1))),
        ("decode", 8, (array(i32, 1),)),
    ):
        index_q = array(bf16, num_rows, num_kv_heads, dim)
        choose = partial(INDEX[f"index_topk_{kind}"], top_k=16, init_blocks=0, local_blocks=1, impl="reference")
        choice = jax.jit(choose).lower(index_q, index_k, table, *lengths).compile()
        assert temp_bytes(choice) <= 128 * MIB
        q, ids = array(bf16, num_rows, 64, dim), array(i32, num_rows, num_kv_heads, 16)
        attend = partial(ATTENTION[f"sparse_attention_{kind}"], scale=dim**-0.5, impl="reference")
        attention = jax.jit(attend).lower(q, cache, cache, ids, table, *lengths).compile()
        assert temp_bytes(attention) <= 128 * MIB


@BOTH
def test_other_lengths_compile_nothing(decode: bool):
    """Whether called bare or inside jit."""
    sizes = Sizes(num_rows=65, index_dim=13, head_dim=18)
    first = Case("first", ((0, 9), (3, 0), (40, 11), (0, 0), (7, 2)), sizes)
    other = Case("other", ((160, 8), (0, 13), (0, 0), (1, 1), (64, 12)), sizes)
    batches = [make_batch(case, decode=decode) for case in (first, other)]
    kind = batches[0].kind
    choose = getattr(pallas_kernels, f"index_topk_{kind}")
    attend = getattr(pallas_kernels, f"sparse_attention_{kind}")

    def both(index_args, q, k, v):
        block_ids = choose(*index_args, **sizes.choice)
        return attend(q, k, v, block_ids, *index_args[2:])

    compiled = []

    def listen(event: str, duration_secs: float, **kwargs) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jitted = jax.jit(both)
        for number, batch in enumerate(batches):
            args = (batch.index_args, batch.q, batch.k, batch.v)
            bare, inside = np.asarray(both(*args)), np.asarray(jitted(*args))
            np.testing.assert_allclose(bare, inside, rtol=1e-6, atol=1e-6)
            if number == 0:
                assert compiled
                compiled.clear()
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
