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
from pallas_kernels import hopper, triton_support
from pallas_kernels.index_topk.api import OPERATIONS

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


def test_kernels_generate_the_references_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy in bf16: equal up to the first step at which the reference's two best logits are within 5e-2."""
    model = models.random_model(WIDE, dtype="bfloat16")
    prompts = [models.random_tokens(WIDE, n, seed=n).tolist() for n in (1700, 900, 5, 640)]
    rows = (jnp.zeros((1, 2, 128), jnp.bfloat16), jnp.zeros((1, 128, 128), jnp.bfloat16))
    tables = (jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32))
    why_not = OPERATIONS["index_topk_decode"].why_not
    if reason := why_not("mosaic_gpu", *rows, *tables, top_k=4, init_blocks=0, local_blocks=1):
        pytest.skip(f"no kernels to compare with: {reason}")
    ours = generate(model, prompts, max_new_tokens=24, prefill_chunk=512)
    for kernels in (hopper, triton_support):
        monkeypatch.setattr(kernels, "why_not_here", lambda: "a test asks for the reference")
    assert why_not("mosaic_gpu", *rows, *tables, top_k=4, init_blocks=0, local_blocks=1)
    # What was compiled with the kernels in it would be used again.
    jax.clear_caches()
    reference = generate(model, prompts, max_new_tokens=24, prefill_chunk=512)
    compared = 0
    for prompt, expected, tokens in zip(prompts, reference.tokens, ours.tokens, strict=True):
        sequence = np.zeros((1, 2048), np.int32)
        sequence[0, : len(prompt) + 24] = [*prompt, *expected]
        best = np.sort(np.asarray(model(sequence))[0, len(prompt) - 1 : len(prompt) + 23], axis=-1)[:, -2:]
        clear = best[:, 1] - best[:, 0] > 5e-2
        count = int(np.argmin(clear)) if not clear.all() else 24
        assert tokens[:count] == expected[:count]
        compared += count
    assert compared > 24
    jax.clear_caches()


def test_gradients_flow_through_the_kernels() -> None:
    """The kernels' derivative is the reference's: finite everywhere, zero only in what merely chooses."""
    model = models.random_model(WIDE, dtype="bfloat16")
    graphdef, state = nnx.split(model)
    tokens = jnp.asarray(models.random_tokens(WIDE, 2, 700))

    def loss(state: nnx.State) -> jax.Array:
        return -jnp.mean(jax.nn.log_softmax(nnx.merge(graphdef, state)(tokens), axis=-1)[..., 3])

    for path, gradient in nnx.to_flat_state(jax.jit(jax.grad(loss))(state)):
        value = np.asarray(gradient.get_value(), np.float32)
        assert np.isfinite(value).all(), path
        chooses = "indexer" in path or path[-1] == "e_score_correction_bias"
        assert (np.abs(value).max() == 0) == chooses, path
