"""The model on a GPU: cuDNN's attention against the XLA path, and the whole model against the CPU's."""

import dataclasses

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from flax import nnx

from m3_jax import Cache, M3Config, M3ForCausalLM, Sampler, generate
from m3_jax.cache import LayerCache, Step, write_kv
from m3_jax.dense_attention import _xla, cudnn_unsupported, dense_attention

pytestmark = pytest.mark.gpu
TINY = M3Config.tiny()

# Attention in the released model's head layout, on a model that is small otherwise.
WIDE = dataclasses.replace(
    TINY,
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    rotary_dim=64,
    sparse_attention=dataclasses.replace(TINY.sparse_attention, num_index_heads=2, index_dim=128, block_size=128),
)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("contexts", [[0, 0, 0], [0, 130, 257]], ids=["first chunk", "later chunk"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cudnn_equals_xla_in_float32(head_dim: int, contexts: list[int], dtype: str) -> None:
    """Ragged lengths, an empty sequence, pages in any order, NaN in every slot that was not written."""
    batch, tokens, heads, kv_heads, page, blocks = 3, 96, 12, 3, 32, 12
    draw = np.random.RandomState(0)
    table = draw.permutation(batch * blocks + 4)[: batch * blocks].reshape(batch, blocks)
    pages = np.full((batch * blocks + 4, kv_heads, page, head_dim), np.nan, np.float32)
    layer = LayerCache(jnp.asarray(pages, dtype), jnp.asarray(pages, dtype), None)
    context, query = jnp.asarray(contexts, jnp.int32), jnp.asarray([96, 61, 0], jnp.int32)
    table = jnp.asarray(table, jnp.int32)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(draw.standard_normal(shape), dtype)

    before = Step(False, jnp.zeros(batch, jnp.int32), context, table, 257)
    layer = write_kv(layer, before, normal(batch, 257, kv_heads, head_dim), normal(batch, 257, kv_heads, head_dim))
    step = Step(False, context, query, table, tokens)
    q = normal(batch, tokens, heads, head_dim)
    k, v = normal(batch, tokens, kv_heads, head_dim), normal(batch, tokens, kv_heads, head_dim)
    layer = write_kv(layer, step, k, v)
    assert cudnn_unsupported(q) is None
    out = np.asarray(jax.jit(lambda q, k, v, layer: dense_attention(q, k, v, layer, step))(q, k, v, layer), np.float32)
    with jax.default_matmul_precision("highest"):
        exact = np.asarray(_xla(q.astype(jnp.float32), layer, step))
    live = np.asarray(step.live)
    assert (out[~live] == 0).all()
    error = np.linalg.norm(out[live] - exact[live]) / np.linalg.norm(exact[live])
    assert error < 4e-3


@pytest.mark.parametrize("config", [TINY, WIDE], ids=["tiny", "128 channels a head"])
def test_float32_logits_equal_the_cpus(config: M3Config) -> None:
    model = models.random_model(config)
    tokens = models.random_tokens(config, 2, 5 * config.sparse_attention.block_size + 3)
    with jax.default_matmul_precision("highest"):
        gpu = np.asarray(model(tokens))
        graphdef, state = nnx.split(model)
        with jax.default_device(jax.devices("cpu")[0]):
            on_cpu = nnx.merge(graphdef, jax.device_put(state, jax.devices("cpu")[0]))
            cpu = np.asarray(on_cpu(tokens))
    np.testing.assert_allclose(gpu, cpu, atol=1e-4 * np.abs(cpu).max(), rtol=0)


@pytest.mark.parametrize("config", [TINY, WIDE], ids=["tiny", "128 channels a head"])
def test_bfloat16_chunks_equal_the_full_pass(config: M3Config) -> None:
    """The merged cuDNN path over chunks against one pass: they differ by the rounding of bf16 alone."""
    model = models.random_model(config, dtype="bfloat16")
    length = 5 * config.sparse_attention.block_size
    tokens = models.random_tokens(config, 1, length)
    full = np.asarray(model(tokens))[0]
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, cache: Cache, tokens: jax.Array) -> tuple[jax.Array, Cache]:
        model = nnx.merge(graphdef, state)
        output = model.forward(tokens, cache)
        return model.logits(output.last_hidden), output.cache

    cache, parts = Cache.allocate(config, 1, length, dtype=jnp.bfloat16), []
    for start in range(0, length, length // 4):
        logits, cache = run(state, cache, jnp.asarray(tokens[:, start : start + length // 4]))
        parts.append(np.asarray(logits[0]))
    error = np.linalg.norm(np.concatenate(parts) - full, axis=-1) / np.linalg.norm(full, axis=-1)
    # A block or an expert that a rounding swaps changes single positions: the median is what rounding does.
    assert np.median(error) < 0.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generate(dtype: str) -> None:
    model: M3ForCausalLM = models.random_model(WIDE, dtype=dtype)
    prompts = [models.random_tokens(WIDE, n, seed=n).tolist() for n in (700, 3, 129)]
    whole = generate(model, prompts, max_new_tokens=20, sampler=Sampler(0.7, top_k=20), seed=5, prefill_chunk=256)
    again = generate(model, prompts, max_new_tokens=20, sampler=Sampler(0.7, top_k=20), seed=5, prefill_chunk=256)
    assert whole == again
    assert [len(tokens) for tokens in whole.tokens] == [20, 20, 20]
    assert np.isfinite(whole.logprobs).all()
