"""Where the Triton kernels run, what they say they do not serve, and their place among the implementations."""

import importlib.util
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import triton_support
from pallas_kernels.index_topk.api import OPERATIONS as INDEX
from pallas_kernels.sparse_attention.api import OPERATIONS as ATTENTION


@pytest.fixture
def everywhere(monkeypatch):
    """As if this machine could run them: what is left are the sizes."""
    monkeypatch.setattr(triton_support, "why_not_here", lambda: None)


def array(shape: tuple[int, ...], dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def why_not_index(*, kind="decode", rows=4, heads=4, dim=128, page=128, dtype=jnp.bfloat16, top_k=16) -> str | None:
    arrays = (array((rows, heads, dim), dtype), array((9, page, dim), dtype), array((2, 3)))
    lengths = (array((2,)),) if kind == "decode" else (array((3,)), array((2,)), array((2,)))
    operation = INDEX[f"index_topk_{kind}"]
    return operation.why_not("triton", *arrays, *lengths, top_k=top_k, init_blocks=0, local_blocks=1)


def why_not_attention(*, heads=64, kv_heads=4, dim=128, page=128, top_k=16, dtype=jnp.bfloat16) -> str | None:
    cache = array((9, kv_heads, page, dim), dtype)
    ids = array((4, kv_heads, top_k))
    arrays = (array((4, heads, dim), dtype), cache, cache, ids, array((2, 3)), array((2,)))
    return ATTENTION["sparse_attention_decode"].why_not("triton", *arrays, scale=1.0)


@pytest.mark.parametrize(
    ("reason", "sizes"),
    [
        ("the dtype is float32, not one of bfloat16, float16", {"dtype": jnp.float32}),
        ("the index dim is 96, not one of 64, 128", {"dim": 96}),
        ("the page size is 96, not a power of two of at least 16", {"page": 96}),
        ("the page size is 8, not a power of two of at least 16", {"page": 8}),
        ("top_k is 65, more than 64", {"top_k": 65}),
        ("there are 129 index heads, more than 128", {"heads": 129, "kind": "prefill"}),
        ("there are 33 query tokens of 4 heads a sequence, more than 128 together", {"rows": 66}),
    ],
)
def test_index_sizes(everywhere, reason: str, sizes: dict):
    assert why_not_index(**sizes) == reason


@pytest.mark.parametrize(
    ("reason", "sizes"),
    [
        ("the dtype is float32, not one of bfloat16, float16", {"dtype": jnp.float32}),
        ("the head dim is 256, not one of 64, 128", {"dim": 256}),
        ("the page size is 24, not a power of two of at least 16", {"page": 24}),
        ("65 query heads share a KV head, more than 64", {"heads": 65, "kv_heads": 1}),
    ],
)
def test_attention_sizes(everywhere, reason: str, sizes: dict):
    assert why_not_attention(**sizes) == reason


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"dtype": jnp.float16},
        {"page": 16, "dim": 64},
        {"page": 1024, "top_k": 5},
        {"top_k": 64},
    ],
)
def test_sizes_that_are_served(everywhere, sizes: dict):
    assert why_not_index(**sizes, heads=3) is None
    assert why_not_index(**sizes, heads=3, kind="prefill", rows=10_000) is None
    assert why_not_attention(**sizes, heads=21, kv_heads=3) is None


@pytest.mark.parametrize("missing", triton_support.PACKAGES)
def test_no_package(monkeypatch, missing: str):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    reason = f"it needs the package {missing!r}, which is not installed"
    assert why_not_index() == why_not_attention() == reason
    rows = jnp.zeros((2, 1, 128), jnp.bfloat16)
    keys, table, lens = jnp.zeros((1, 128, 128), jnp.bfloat16), jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32)
    with pytest.raises(NotImplementedError, match=f"index_score_decode: impl='triton' is not supported here: {reason}"):
        INDEX["index_score_decode"](rows, keys, table, lens, impl="triton")


@pytest.mark.parametrize(
    ("capability", "served"),
    [("7.5", False), ("8.0", True), ("8.9", True), ("9.0", True), ("12.0", True), ("gfx942", False), (None, False)],
)
def test_devices(monkeypatch, capability: str | None, served: bool):
    device = SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(triton_support, "default_device", lambda: device)
    reason = None if served else f"the GPU has compute capability {capability}, not 8.0 or above"
    assert why_not_index() == why_not_attention() == reason


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_no_gpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert why_not_index() == why_not_attention() == "the backend is cpu, not gpu"


def test_order():
    """Hopper has better; whatever Triton cannot serve has the reference."""
    for operation in (*INDEX.values(), *ATTENTION.values()):
        assert list(operation.modules) == ["mosaic_gpu", "triton", "reference"]
