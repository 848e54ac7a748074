"""Passes over several GPUs: float32 against one GPU, and bf16 on the kernels inside a mesh. Needs two GPUs or more."""

import dataclasses
import functools

import jax
import models
import numpy as np
import pytest

from m3_jax import M3Config, M3ForCausalLM, generate, make_mesh
from m3_jax import moe as moe_module

pytestmark = pytest.mark.gpu
# Heads as the kernels want them; everything but the KV heads divides by eight.
CONFIG = dataclasses.replace(
    M3Config.tiny(),
    hidden_size=512,
    num_hidden_layers=2,
    num_attention_heads=64,
    num_key_value_heads=4,
    head_dim=128,
    rotary_dim=64,
    dense_intermediate_size=1024,
    moe_intermediate_size=1024,
    shared_intermediate_size=1024,
    num_experts=16,
    sparse_attention_layers=(False, True),
    moe_layers=(False, True),
    sparse_attention=dataclasses.replace(
        M3Config.tiny().sparse_attention, num_index_heads=4, index_dim=128, block_size=128
    ),
)
SIZES = [
    {"tensor": 2},
    {"expert": 2},
    {"data": 2},
    {"tensor": 4},
    {"expert": 4},
    {"expert": 2, "tensor": 2},
    {"tensor": 8},
    {"expert": 8},
    {"expert": 2, "tensor": 4},
]
PROMPTS = [models.random_tokens(CONFIG, n, seed=n).tolist() for n in (1000, 900, 5)]
NEW = 16


@functools.cache
def one_device(dtype: str) -> M3ForCausalLM:
    return models.random_model(CONFIG, dtype=dtype)


def placed(model: M3ForCausalLM, sizes: dict[str, int]) -> M3ForCausalLM:
    needed = int(np.prod(list(sizes.values())))
    if len(jax.devices()) < needed:
        pytest.skip(f"needs {needed} GPUs, there are {len(jax.devices())}")
    return models.placed(model, make_mesh(**sizes, devices=jax.devices()))


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill exchanges pairs, decode gathers rows."""
    monkeypatch.setattr(moe_module, "GATHER_ROWS", 256)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_float32(sizes: dict[str, int]) -> None:
    sharded = placed(one_device("float32"), sizes)
    tokens = models.random_tokens(CONFIG, 2, 700)
    with jax.default_matmul_precision("highest"):
        expected, logits = np.asarray(one_device("float32")(tokens)), np.asarray(sharded(tokens))
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        one = generate(one_device("float32"), PROMPTS, max_new_tokens=NEW, prefill_chunk=512)
        assert generate(sharded, PROMPTS, max_new_tokens=NEW, prefill_chunk=512).tokens == one.tokens


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_bfloat16(sizes: dict[str, int]) -> None:
    """Logits to the rounding of bf16, and greedy tokens equal up to the first step whose two best are within 5e-2."""
    one, sharded = one_device("bfloat16"), placed(one_device("bfloat16"), sizes)
    tokens = models.random_tokens(CONFIG, 2, 700)
    expected, logits = np.asarray(one(tokens)), np.asarray(sharded(tokens))
    # A block or an expert that a rounding swaps changes single positions: the median is what rounding does.
    error = np.linalg.norm(logits - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(error) < 0.02
    found = generate(sharded, PROMPTS, max_new_tokens=NEW, prefill_chunk=512)
    reference = generate(one, PROMPTS, max_new_tokens=NEW, prefill_chunk=512)
    assert found == generate(sharded, PROMPTS, max_new_tokens=NEW, prefill_chunk=512)
    compared = 0
    for prompt, ours, theirs in zip(PROMPTS, found.tokens, reference.tokens, strict=True):
        sequence = np.zeros((1, 1152), np.int32)
        sequence[0, : len(prompt) + NEW] = [*prompt, *theirs]
        best = np.sort(np.asarray(one(sequence))[0, len(prompt) - 1 : len(prompt) + NEW - 1], axis=-1)[:, -2:]
        clear = best[:, 1] - best[:, 0] > 5e-2
        count = int(np.argmin(clear)) if not clear.all() else NEW
        assert ours[:count] == theirs[:count]
        compared += count
    assert compared > NEW
