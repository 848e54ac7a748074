"""The paged cache: sizes, and where writes go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3_jax import Cache, M3Config
from m3_jax.cache import Step, elements_per_token, write_index_k, write_kv

TINY = M3Config.tiny()
S = TINY.sparse_attention.block_size


def test_memory_per_token() -> None:
    """2*K*H + I elements on a sparse layer, 2*K*H on a dense one, and nothing else that grows with tokens."""
    cache = Cache.allocate(TINY, 3, 5 * S, dtype=jnp.bfloat16)
    tokens = 3 * 5 * S
    kv, index = 2 * TINY.num_key_value_heads * TINY.head_dim, TINY.sparse_attention.index_dim
    for layer, sparse in zip(cache.layers, TINY.sparse_attention_layers, strict=True):
        size = sum(x.nbytes for x in jax.tree.leaves(layer))
        assert size == 2 * tokens * (kv + index * sparse)
    assert sum(x.nbytes for x in jax.tree.leaves(cache.layers)) == 2 * tokens * elements_per_token(TINY)


def test_memory_per_token_of_the_released_model() -> None:
    assert elements_per_token(M3Config.m3()) == 60 * 2 * 4 * 128 + 57 * 128


def test_lengths_are_rounded_up_to_pages() -> None:
    assert Cache.allocate(TINY, 2, S + 1).block_table.tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("batch", "length", "message"),
    [(0, 8, "batch=0"), (1, 0, "max_length=0"), (1, 65_537, "max_position_embeddings=65536")],
)
def test_allocation_is_checked(batch: int, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cache.allocate(TINY, batch, length)


def test_writes_touch_their_slots_alone() -> None:
    """Live rows land at their page and slot; padded rows and rows past the table change nothing at all."""
    cache = Cache.allocate(TINY, 3, 2 * S, dtype=jnp.float32)
    layer = jax.tree.map(lambda x: jnp.full(x.shape, -1.0), cache.layers[1])
    table = jnp.asarray([[5, 0], [3, 1], [2, 4]], jnp.int32)
    context, query = np.array([S - 2, 0, 2 * S - 1]), np.array([4, 0, 3])
    step = Step(False, jnp.asarray(context), jnp.asarray(query), table, 5)
    draw = np.random.RandomState(0)
    k, v = draw.standard_normal((2, 3, 5, TINY.num_key_value_heads, TINY.head_dim)).astype(np.float32)
    index_k = draw.standard_normal((3, 5, TINY.sparse_attention.index_dim)).astype(np.float32)
    written = write_index_k(write_kv(layer, step, jnp.asarray(k), jnp.asarray(v)), step, jnp.asarray(index_k))

    expected = jax.tree.map(np.array, layer)
    for b in range(3):
        for i in range(query[b]):
            position = context[b] + i
            if position < 2 * S:
                page, slot = int(table[b, position // S]), position % S
                expected.k[page, :, slot], expected.v[page, :, slot] = k[b, i], v[b, i]
                expected.index_k[page, slot] = index_k[b, i]
    jax.tree.map(np.testing.assert_array_equal, written, expected)


def test_writes_are_in_place_when_donated() -> None:
    """A donated cache comes back in the same memory: no second copy of it ever exists."""

    def write(cache: Cache, rows: jax.Array) -> Cache:
        step = Step(True, cache.seq_lens, jnp.ones(1, jnp.int32), cache.block_table, 1)
        return Cache(tuple(write_kv(layer, step, rows, rows) for layer in cache.layers), *step_state(cache, step))

    def step_state(cache: Cache, step: Step) -> tuple[jax.Array, jax.Array]:
        return cache.block_table, step.seq_lens

    cache = Cache.allocate(TINY, 1, 64 * S, dtype=jnp.float32)
    rows = jnp.ones((1, 1, TINY.num_key_value_heads, TINY.head_dim))
    memory = jax.jit(write, donate_argnums=0).lower(cache, rows).compile().memory_analysis()
    assert memory is not None
    kv_bytes = sum(layer.k.nbytes + layer.v.nbytes for layer in cache.layers)
    assert memory.alias_size_in_bytes >= kv_bytes
    assert memory.temp_size_in_bytes < cache.layers[0].k.nbytes
