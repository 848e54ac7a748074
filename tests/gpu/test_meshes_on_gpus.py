"""Passes over several GPUs: float32 against one GPU, and bf16 on the kernels inside a mesh. Needs two GPUs or more."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from m3_jax import GenerateOutput, M3Config, M3ForCausalLM, generate, make_mesh
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


def generated(model: M3ForCausalLM) -> GenerateOutput:
    """Two chunks of the prompts, then steps; float32 is float32 in the matmuls too."""
    with jax.default_matmul_precision("highest" if model.dtype == jnp.float32 else "default"):
        return generate(model, PROMPTS, max_new_tokens=NEW, prefill_chunk=512)


@functools.cache
def reference(dtype: str) -> GenerateOutput:
    return generated(one_device(dtype))


def placed(dtype: str, sizes: dict[str, int]) -> M3ForCausalLM:
    needed = math.prod(sizes.values())
    if len(jax.devices()) < needed:
        pytest.skip(f"needs {needed} GPUs, there are {len(jax.devices())}")
    return models.placed(one_device(dtype), make_mesh(**sizes, devices=jax.devices()))


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill exchanges pairs, decode gathers rows."""
    monkeypatch.setattr(moe_module, "GATHER_ROWS", 256)


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: ",".join(f"{axis}={size}" for axis, size in sizes.items()))
def test_float32(sizes: dict[str, int]) -> None:
    found, expected = generated(placed("float32", sizes)), reference("float32")
    assert found.tokens == expected.tokens
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: ",".join(f"{axis}={size}" for axis, size in sizes.items()))
def test_bfloat16(sizes: dict[str, int]) -> None:
    """On the kernels inside a mesh: the same from run to run, and one GPU's up to rounding."""
    sharded = placed("bfloat16", sizes)
    found, expected = generated(sharded), reference("bfloat16")
    assert found == generated(sharded)
    apart = []
    for index, (ours, theirs) in enumerate(zip(found.tokens, expected.tokens, strict=True)):
        # Behind the first token that differs, sequences are different ones.
        same = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=True)))
        apart += np.abs(np.subtract(found.logprobs[index], expected.logprobs[index]))[: len(same)].tolist()
    assert len(apart) > NEW, f"{found.tokens} against {expected.tokens}"
    # A block or an expert that a rounding swaps changes single tokens: the median is what rounding does.
    assert np.median(apart) < 0.05
