"""What the Mosaic GPU kernels say they do not serve, in the order in which one would mend it."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import hopper
from pallas_kernels.index_sparse_attention.api import OPERATIONS as BOTH
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


def why_not_both(*, heads=4, group=16, top_k=16) -> str | None:
    cache = array((9, heads, 128, 128))
    index = array((4, heads, 128)), array((9, 128, 128))
    arrays = (*index, array((4, group * heads, 128)), cache, cache, array((2, 3)), array((2,)))
    options = {"top_k": top_k, "init_blocks": 0, "local_blocks": 1, "scale": 1.0}
    return BOTH["index_sparse_attention_decode"].why_not("mosaic_gpu", *arrays, **options)


@pytest.mark.parametrize(
    ("reason", "sizes"),
    [
        ("there are 3 KV heads, not one of 1, 2, 4", {"heads": 3}),
        ("24 query heads share a KV head, more than 16", {"group": 24}),
        ("top_k is 12, not one of 4, 8, 16, 32", {"top_k": 12}),
    ],
)
def test_sizes_of_both(reason: str, sizes: dict, monkeypatch):
    """What either does not serve, where nothing else is in the way."""
    monkeypatch.setattr(hopper, "why_not_here", lambda: None)
    assert why_not_both() is None
    assert why_not_both(**sizes) == reason


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_no_gpu():
    assert why_not_index() == why_not_attention() == why_not_both() == "the backend is cpu, not gpu"
