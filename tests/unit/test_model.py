"""The whole text model against the NumPy oracle, and its passes against each other."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import models
import numpy as np
import oracle
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from m3_jax import Cache, M3Config, M3ForCausalLM
from m3_jax.checkpoint.names import parts
from m3_jax.model import ForwardOutput

TINY = M3Config.tiny().with_layers(M3Config.tiny().layer_kinds[:3])
MAX_LENGTH = 160  # five times the tokens that top-k blocks hold


def with_sparse(config: M3Config, **changes: int) -> M3Config:
    return dataclasses.replace(config, sparse_attention=dataclasses.replace(config.sparse_attention, **changes))


CONFIGS = {
    "tiny": TINY,
    "init blocks, two local blocks": with_sparse(TINY, init_blocks=1, local_blocks=2),
    "nothing forced": with_sparse(TINY, local_blocks=0),
    "tied head": dataclasses.replace(TINY, tie_word_embeddings=True),
    "beta": dataclasses.replace(TINY, swiglu_beta=0.5, swiglu_limit=0.7, swiglu_alpha=2.5),
    "sparse attention first, MoE first": dataclasses.replace(
        TINY,
        sparse_attention_layers=(True, True, False),
        moe_layers=(True, False, True),
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_the_oracle(config: M3Config) -> None:
    model = models.random_model(config)
    tokens = models.random_tokens(config, 117)
    expected = oracle.forward(config, models.weights_by_path(model), tokens)
    logits = np.asarray(model(tokens[None])[0])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_bfloat16_follows_float32() -> None:
    """bf16 keeps 8 bits: where both choose the same blocks and experts the logits agree to a few of them."""
    exact, rounded = models.random_model(TINY), models.random_model(TINY, dtype="bfloat16")
    tokens = models.random_tokens(TINY, 1, 64)
    expected, logits = np.asarray(exact(tokens)), np.asarray(rounded(tokens))
    assert logits.dtype == np.float32
    # Choices that flip change single positions, so the median over positions is what rounding alone does.
    error = np.linalg.norm(logits - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(error) < 0.05


def test_parameter_count_of_the_released_model() -> None:
    """By shape alone: the text model's own weights, and the vision part's as the checkpoint names them."""
    config = M3Config.m3()
    abstract = nnx.eval_shape(lambda: M3ForCausalLM(config, rngs=nnx.Rngs(0)))
    text = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(abstract)))
    vision = sum(math.prod(w.shape) for part in parts(config) if part.name == "vision" for w in part.weights)
    assert text + vision == 427_040_140_160


def test_router_is_float32_in_a_bfloat16_model() -> None:
    model = models.random_model(TINY, dtype="bfloat16")
    dtypes = {path: value.dtype for path, value in models.weights_by_path(model).items()}
    float32 = {path for path, dtype in dtypes.items() if dtype == np.float32}
    assert float32 == {f"layers.2.mlp.gate.{w}" for w in ("weight", "e_score_correction_bias")}


def test_right_padding_changes_nothing(tiny: M3ForCausalLM) -> None:
    tokens = models.random_tokens(TINY, 3, 96)
    lengths = np.array([96, 41, 1])
    padded = tiny(tokens, jnp.asarray(lengths))
    for row, length in enumerate(lengths):
        other = np.where(np.arange(96) < length, tokens[row], 7)
        np.testing.assert_array_equal(
            padded[row, :length], tiny(np.stack([other] * 3), jnp.asarray(lengths))[row, :length]
        )
        np.testing.assert_allclose(padded[row, :length], tiny(tokens[row : row + 1])[0, :length], atol=1e-4)


def test_model_is_differentiable(tiny: M3ForCausalLM) -> None:
    graphdef, state = nnx.split(tiny)
    tokens = jnp.asarray(models.random_tokens(TINY, 2, 40))

    def loss(state: nnx.State) -> jax.Array:
        return -jnp.mean(jax.nn.log_softmax(nnx.merge(graphdef, state)(tokens), axis=-1)[..., 3])

    gradients = nnx.to_flat_state(jax.jit(jax.grad(loss))(state))
    for path, gradient in gradients:
        value = np.asarray(gradient.get_value())
        assert np.isfinite(value).all(), path
        # The choice of blocks and experts is not differentiable: nothing flows into what only chooses.
        chooses = "indexer" in path or path[-1] == "e_score_correction_bias"
        assert (np.abs(value).max() == 0) == chooses, path


def test_chosen_blocks(tiny: M3ForCausalLM) -> None:
    chosen = tiny.chosen_blocks(models.random_tokens(TINY, 2, 50))
    sparse = TINY.sparse_attention
    assert sorted(chosen) == [1, 2]
    for ids in map(np.asarray, chosen.values()):
        assert ids.shape == (2, 50, TINY.num_key_value_heads, sparse.topk_blocks)
        own = np.arange(50) // sparse.block_size
        assert (ids == own[None, :, None, None]).any(-1).all()
        assert (ids <= own[None, :, None, None]).all()


@jax.jit
def passes(state: nnx.State, cache: Cache, tokens: jax.Array, query_lens: jax.Array) -> tuple[jax.Array, Cache]:
    model = nnx.merge(GRAPHDEF, state)
    output = model.forward(tokens, cache, query_lens)
    return model.logits(output.last_hidden), output.cache


@jax.jit
def decodes(state: nnx.State, cache: Cache, tokens: jax.Array, query_lens: jax.Array) -> tuple[jax.Array, Cache]:
    model = nnx.merge(GRAPHDEF, state)
    output = model.forward(tokens, cache, query_lens, decode=True)
    return model.logits(output.last_hidden), output.cache


MODEL = models.random_model(TINY)
GRAPHDEF, STATE = nnx.split(MODEL)


def poisoned_cache(batch: int, permutation: np.ndarray | None = None) -> Cache:
    """A cache whose every slot is NaN and whose pages lie in any order, with pages that belong to nobody."""
    cache = Cache.allocate(TINY, batch, MAX_LENGTH, dtype=jnp.float32)
    pages, (_, blocks) = batch * cache.block_table.shape[1], cache.block_table.shape
    poison = jax.tree.map(lambda x: jnp.full((x.shape[0] + 5, *x.shape[1:]), jnp.nan), cache.layers)
    order = np.arange(pages) if permutation is None else permutation
    return Cache(poison, jnp.asarray(order[: batch * blocks].reshape(batch, blocks), jnp.int32), cache.seq_lens)


def run_in_splits(tokens: np.ndarray, lengths: list[int], splits: list[int], cache: Cache) -> np.ndarray:
    """Logits of right-padded rows, prefilled in chunks that end at `splits`."""
    logits = np.zeros((*tokens.shape, TINY.vocab_size), np.float32)
    for start, end in zip([0, *splits], [*splits, tokens.shape[1]], strict=True):
        # One compiled size for every chunk: padding behind the chunk's own tokens must change nothing.
        chunk = np.full((tokens.shape[0], MAX_LENGTH), 5, np.int32)
        chunk[:, : end - start] = tokens[:, start:end]
        query_lens = np.clip(np.asarray(lengths) - start, 0, end - start)
        out, cache = passes(STATE, cache, jnp.asarray(chunk), jnp.asarray(query_lens))
        for row, count in enumerate(query_lens):
            logits[row, start : start + count] = out[row, :count]
    return logits


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_chunking_gives_the_full_pass(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 120), min_size=3, max_size=3))
    splits = sorted(data.draw(st.sets(st.integers(1, 119), max_size=4)))
    tokens = models.random_tokens(TINY, 3, 120, seed=data.draw(st.integers(0, 99)))
    permutation = np.random.RandomState(data.draw(st.integers(0, 99))).permutation(3 * 20 + 5)
    full = np.asarray(MODEL(tokens, jnp.asarray(lengths)))
    logits = run_in_splits(tokens, lengths, splits, poisoned_cache(3, permutation))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            logits[row, :length], full[row, :length], atol=1e-5 * max(1, np.abs(full).max()), rtol=0
        )


def test_every_split_in_two_gives_the_full_pass() -> None:
    """Past the top-k blocks, so that every offset of a block boundary is a place where a chunk ends."""
    tokens = models.random_tokens(TINY, 3, 75, seed=11)
    full = np.asarray(MODEL(tokens))
    for split in range(1, 75):
        logits = run_in_splits(tokens, [75] * 3, [split], poisoned_cache(3))
        np.testing.assert_allclose(logits, full, atol=1e-5 * np.abs(full).max(), rtol=0, err_msg=f"{split=}")


@pytest.mark.parametrize("num_queries", [1, 3])
def test_decode_gives_the_full_pass(num_queries: int) -> None:
    """Prefill, then decode with 1 or several tokens a step, one sequence pausing on every other step."""
    total, prompts = 99, [57, 63, 3]
    tokens = models.random_tokens(TINY, 3, total, seed=4)
    full = np.asarray(MODEL(tokens))
    cache = poisoned_cache(3)
    chunk = np.zeros((3, MAX_LENGTH), np.int32)
    chunk[:, :total] = tokens
    _, cache = passes(STATE, cache, jnp.asarray(chunk), jnp.asarray(prompts))
    done = np.asarray(prompts)
    for step in range(10):
        rows = np.stack([tokens[b, done[b] : done[b] + num_queries] for b in range(3)])
        query_lens = np.full(3, num_queries)
        query_lens[1] *= step % 2
        logits, cache = decodes(STATE, cache, jnp.asarray(rows), jnp.asarray(query_lens))
        for b in range(3):
            if query_lens[b]:
                np.testing.assert_allclose(
                    logits[b], full[b, done[b] : done[b] + num_queries], atol=1e-5 * np.abs(full).max(), rtol=0
                )
        done = done + query_lens
    np.testing.assert_array_equal(cache.seq_lens, done)


def test_hidden_states_are_the_residual_stream() -> None:
    tokens = jnp.asarray(models.random_tokens(TINY, 1, 20))

    @jax.jit
    def run(state: nnx.State) -> ForwardOutput:
        cache = Cache.allocate(TINY, 1, 20, dtype=jnp.float32)
        return nnx.merge(GRAPHDEF, state).forward(tokens, cache, hidden_layers=(0, 2))

    output = run(STATE)
    assert sorted(output.hidden_states) == [0, 2]
    np.testing.assert_allclose(MODEL.norm(output.hidden_states[2]), output.last_hidden, atol=1e-5)
    short = TINY.with_layers(TINY.layer_kinds[:1])
    first = M3ForCausalLM(short, dtype="float32", rngs=nnx.Rngs(0))
    nnx.update(first.embed_tokens, nnx.state(MODEL.embed_tokens))
    nnx.update(first.layers[0], nnx.state(MODEL.layers[0]))
    alone = first.forward(tokens, Cache.allocate(short, 1, 20, dtype=jnp.float32), hidden_layers=(0,))
    np.testing.assert_allclose(output.hidden_states[0], alone.hidden_states[0], atol=1e-5)


def test_dtype_is_checked() -> None:
    with pytest.raises(ValueError, match=r"dtype=float16: must be one of float32, bfloat16"):
        M3ForCausalLM(TINY, dtype="float16", rngs=nnx.Rngs(0))
