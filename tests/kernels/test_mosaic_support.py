"""What the Mosaic GPU kernels say they do not serve, in the order in which one would mend it."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.index_topk.api import OPERATIONS as INDEX
from pallas_kernels.sparse_attention.api import OPERATIONS as ATTENTION


def array(shape: tuple[int, ...], dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def why_not_index(*, rows=4, heads=4, dim=128, page=128, batch=2, dtype=jnp.bfloat16, top_k=16) -> str | None:
    arrays = (array((rows, heads, dim), dtype), array((9, page, dim), dtype), array((batch, 3)), array((batch,)))
    return INDEX["index_topk_decode"].why_not("mosaic_gpu", *arrays, top_k=top_k, init_blocks=0, local_blocks=1)


def why_not_attention(*, heads=64, kv_heads=4, top_k=16, batch=2) -> str | None:
    cache = array((9, kv_heads, 128, 128))
    arrays = (array((4, heads, 128)), cache, cache, array((4, kv_heads, top_k)), array((batch, 3)), array((batch,)))
    return ATTENTION["sparse_attention_decode"].why_not("mosaic_gpu", *arrays, scale=1.0)


@pytest.mark.parametrize(
    ("reason", "sizes"),
    [
        ("the dtype is float32, not one of bfloat16, float16", {"dtype": jnp.float32}),
        ("the index dim is 64, not 128", {"dim": 64}),
        ("the page size is 64, not 128", {"page": 64}),
        ("there are 3 KV heads, not one of 1, 2, 4", {"heads": 3}),
        ("top_k is 12, not one of 4, 8, 16, 32", {"top_k": 12}),
        ("there are 257 sequences, more than 256", {"batch": 257, "rows": 257}),
        ("there are 9 query tokens a sequence, more than 8", {"batch": 2, "rows": 18}),
    ],
)
def test_index_sizes(reason: str, sizes: dict):
    assert why_not_index(**sizes) == reason


@pytest.mark.parametrize(
    ("reason", "sizes"),
    [
        ("24 query heads share a KV head, more than 16", {"heads": 96}),
        ("there are 5 chosen blocks, not one of 4, 8, 16, 32", {"top_k": 5}),
    ],
)
def test_attention_sizes(reason: str, sizes: dict):
    assert why_not_attention(**sizes) == reason


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_no_gpu():
    assert why_not_index() == why_not_attention() == "the backend is cpu, not gpu"
